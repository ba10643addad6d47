"""Leases: writers and a sweeping gc keep out of each other's way, without waiting for locks.

A writer puts a lease, then looks for an exclusive mark.  gc puts an exclusive mark, then looks for
leases and for marks of others.  All publish before they look, so at least one of two sees the other
and backs off.  Each file is its holder's own: none is ever taken over.
A process that dies leaves its file behind, and so does a copy of a repository: `store/holders.py`
judges whether a holder may still be at work.  One that lives on may fail to delete its file: it
holds that no more.
"""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ckptvcs.errors import BusyError, CkptError, ConflictError, CorruptionError, StorageError
from ckptvcs.store import holders
from ckptvcs.store.backend import Backend, Hold, read_small
from ckptvcs.store.holders import Holder, Silence, describe, judge
from ckptvcs.store.host import boot_id, host_name

_LEASE, _EXCLUSIVE, _CHANGE = "leases/", "marks/exclusive-", "marks/change-"
_TURNS, _PAUSE = 400, 0.05  # seconds
_TRIES, _REST = 60, 1.0  # seconds, while gc sweeps
_MAX_BYTES = 4096
_GRACE, _LOOK = 2.0, 0.05  # seconds

T = TypeVar("T")

_meant: set[str] = set()  # the files of this process that it has not withdrawn
_silence = Silence()


def _judge(backend: Backend, name: str) -> Holder:
    try:
        data, trace = backend.look(name, _MAX_BYTES)
    except (FileNotFoundError, CorruptionError):  # what is no file is nobody's
        return Holder.GONE
    found = judge(
        data, trace, host_name(), boot_id(), is_meant=name in _meant, clock_ns=backend.clock_ns
    )
    return _silence.judge(backend, name, trace) if found is Holder.UNKNOWN else found


def _who(backend: Backend, name: str) -> str:
    """Who holds a lease or mark, and what to do if he is gone and nobody here can know."""
    with contextlib.suppress(FileNotFoundError, CkptError, ValueError, KeyError, TypeError):
        fields = json.loads(read_small(backend, name, _MAX_BYTES))
        host, pid = str(fields["host"])[:64], int(fields["pid"])
        return f"process {pid} on {host!r}; if that is gone for good, delete {name}"
    return "try again later"


def live_leases(backend: Backend, prefix: str = _LEASE) -> list[str]:
    """The leases or marks whose holders may still be at work."""
    folder = prefix.partition("/")[0]
    names = [name for name in backend.names(folder) if name.startswith(prefix)]
    return [name for name in names if _judge(backend, name) not in holders.NO_MORE]


def dead_leases(backend: Backend) -> list[str]:
    """What dead writers and sweepers left behind."""
    names = [*backend.names("leases"), *backend.names("marks")]
    return [name for name in names if _judge(backend, name) in holders.NO_MORE]


def await_others(backend: Backend, others: Iterable[str]) -> bool:
    """Wait a moment for the holders of some leases to end; whether all have.  One that only keeps
    silent has not.
    """
    end = time.monotonic() + _GRACE
    left = list(others)
    while left := [name for name in left if _judge(backend, name) is not Holder.GONE]:
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK)
    return True


class _Renewal:
    """Renews what this process holds, for those who cannot see the process."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._hold: Hold | None = None
        try:
            threading.Thread(target=self._run, name="ckpt-lease", daemon=True).start()
        except RuntimeError:  # no thread can be started
            self.is_there = False
        else:
            self.is_there = True

    def of(self, hold: Hold | None) -> None:
        """What is to be renewed from now on."""
        self._hold = hold

    def end(self) -> None:
        """Nothing is renewed any more."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(holders.BEAT):
            if self._hold is not None:
                self._hold.renew()


@contextmanager
def _held(backend: Backend, prefix: str, *, brief: bool = False) -> Iterator[str]:
    """Say in a file of one's own that this process is at work, for so long.  What is held for a
    `brief` time only needs no renewal.
    """
    name = f"{prefix}{secrets.token_hex(12)}"
    _meant.add(name)
    hold = None
    renewal = None if brief else _Renewal()
    is_renewed = renewal is None or renewal.is_there
    try:
        hold = backend.hold(
            name, lambda trace: describe(trace, host_name(), boot_id(), is_renewed=is_renewed)
        )
        if renewal is not None:
            renewal.of(hold)
        yield name
    finally:
        if renewal is not None:
            renewal.end()
        _meant.discard(name)
        # Where it cannot be deleted it counts no more: nobody holds it.
        with contextlib.suppress(StorageError):
            backend.delete(name) if hold is None else hold.release()


@contextmanager
def lease(backend: Backend) -> Iterator[str]:
    """Hold a lease while writing; it names the lease, to be checked before publishing.

    Raises:
        BusyError: gc is sweeping.
    """
    with _held(backend, _LEASE) as name:
        if live_leases(backend, _EXCLUSIVE):
            raise BusyError("gc is sweeping this repository", hint="try again in a moment")
        yield name


def patiently(work: Callable[[], T]) -> T:
    """Do something when no gc sweeps any more.

    Raises:
        BusyError: it sweeps for as long as a minute.
    """
    for _ in range(_TRIES - 1):
        try:
            return work()
        except BusyError:
            time.sleep(_REST)
    return work()


def check_lease(backend: Backend, name: str) -> None:
    """Raises ConflictError where somebody has taken the lease away meanwhile."""
    try:
        read_small(backend, name, _MAX_BYTES)
    except FileNotFoundError:
        raise ConflictError("the lease of this writer is gone", hint="commit again") from None


@contextmanager
def exclusive(backend: Backend) -> Iterator[None]:
    """Keep new writers out while sweeping.  Of two that come at once one goes on at most.

    Raises:
        BusyError: a writer or another gc is at work.
    """
    with _held(backend, _EXCLUSIVE) as own:
        others = [name for name in live_leases(backend, _EXCLUSIVE) if name != own]
        if others:
            _silence.keep(backend)
            raise BusyError("another gc is at work", hint=_who(backend, others[0]))
        writers = live_leases(backend, _LEASE)
        if writers:
            _silence.keep(backend)
            what = f"{len(writers)} writer(s) are at work"
            raise BusyError(what, hint=_who(backend, writers[0]))
        # Who was only silent finds his lease gone before he publishes what is swept now.
        for name in dead_leases(backend):
            backend.delete(name)
        yield


@contextmanager
def turn(backend: Backend) -> Iterator[None]:
    """Wait until nobody else is about to change what is changed in place, or to move a ref so that
    it leads elsewhere, or to delete an original that a ref leads to; for a moment.

    Raises:
        BusyError: somebody is, and stays so.
    """
    for _ in range(_TURNS):
        with _held(backend, _CHANGE, brief=True) as own:
            others = [name for name in live_leases(backend, _CHANGE) if name != own]
            if not others:
                yield
                return
        time.sleep(random.random() * _PAUSE)
    _silence.keep(backend)
    raise BusyError("the repository is being changed", hint=_who(backend, others[0]))
