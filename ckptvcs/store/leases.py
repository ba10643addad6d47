"""Leases: writers and a sweeping gc keep out of each other's way, without waiting for locks.

A writer puts a lease, then looks for an exclusive mark.  gc puts an exclusive mark, then looks for
leases and for marks of others.  All publish before they look, so at least one of two sees the other
and backs off; it tries again for a while.  gc has the exclusive mark only while it deletes.  While
it looks at what can go, and copies what stays, its mark keeps out other gcs alone.
Each file is its holder's own: none is ever taken over.
A process that dies leaves its file behind, and so does a copy of a repository: `store/holders.py`
judges whether a holder may still be at work.  One that lives on may fail to delete its file: it
holds that no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

from ckptvcs.errors import BusyError, CkptError, ConflictError, CorruptionError, StorageError
from ckptvcs.parallel import start_thread
from ckptvcs.store import holders
from ckptvcs.store.backend import Backend, Hold, read_small
from ckptvcs.store.holders import Holder, Silence, describe, judge
from ckptvcs.store.host import boot_id, host_name

_LEASE, _EXCLUSIVE, _CHANGE = "leases/", "marks/exclusive-", "marks/change-"
_SOLE = "marks/gc-"
_LEAST_TURN = 10.0  # seconds
_REST, _SAY_AFTER = 0.05, 1.0  # seconds
_MAX_BYTES = 4096
_GRACE, _LOOK = 2.0, 0.05  # seconds

_log = logging.getLogger("ckptvcs")
_patience = ContextVar("patience", default=60.0)  # seconds
_leases: WeakKeyDictionary[Backend, set[str]] = WeakKeyDictionary()  # those of this process
os.register_at_fork(after_in_child=_leases.clear)  # a child holds none
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


class Renewals:
    """Renews what this process holds, for those who cannot see the process, by one thread that ends
    a while after nothing is held any more.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is held, and no thread runs: so it is in a forked child."""
        self._lock, self._holds = threading.Lock(), set[Hold]()
        self._is_running = False

    def begin(self) -> bool:
        """Whether what is added from now on will be renewed."""
        with self._lock:
            if not self._is_running:
                self._is_running = start_thread(self._run)
            return self._is_running

    def add(self, hold: Hold) -> None:
        """Renew something."""
        with self._lock:
            self._holds.add(hold)
        self.begin()  # the thread may have ended just before

    def remove(self, hold: Hold) -> None:
        """Renew it no more."""
        with self._lock:
            self._holds.discard(hold)

    def _run(self) -> None:
        while True:
            time.sleep(holders.BEAT)
            with self._lock:
                holds = list(self._holds)
                self._is_running = bool(holds)
            if not holds:
                return
            for hold in holds:
                hold.renew()


_renewals = Renewals()


def _forked() -> None:
    """A child holds nothing of its parent's."""
    _renewals.forget()
    _meant.clear()


os.register_at_fork(after_in_child=_forked)


@contextmanager
def _held(backend: Backend, prefix: str, *, brief: bool = False) -> Iterator[str]:
    """Say in a file of one's own that this process is at work, for so long.  What is held for a
    `brief` time only needs no renewal.
    """
    name = f"{prefix}{os.urandom(12).hex()}"
    _meant.add(name)
    hold = None
    is_renewed = brief or _renewals.begin()
    try:
        hold = backend.hold(
            name, lambda trace: describe(trace, host_name(), boot_id(), is_renewed=is_renewed)
        )
        if not brief:
            _renewals.add(hold)
        yield name
    finally:
        if hold is not None:
            _renewals.remove(hold)
        _meant.discard(name)
        # Where it cannot be deleted it counts no more: nobody holds it.
        with contextlib.suppress(StorageError):
            backend.delete(name) if hold is None else hold.release()


@contextmanager
def lease(backend: Backend) -> Iterator[str]:
    """Hold a lease while writing; it names the lease, to be checked before publishing.  Waits while
    gc deletes; see `patience`.  Who holds one already does not: gc waits for him.

    Raises:
        BusyError: gc still deletes when patience ends.
    """
    waiting, own = _Waiting(_patience.get()), _leases.setdefault(backend, set())
    while True:
        with _held(backend, _LEASE) as name:
            # First whether there is another one: who ends it does so before he deletes its file.
            sweeping = [] if own else live_leases(backend, _EXCLUSIVE)
            if not sweeping:
                own.add(name)
                try:
                    yield name
                finally:
                    own.discard(name)
                return
        waiting.go_on("gc is sweeping this repository", _who(backend, sweeping[0]))


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """What this thread does meanwhile waits for so long at most where others are at work."""
    before = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(before)


class _Waiting:
    """A wait that ends, and that says once what it is for."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds, self._said = time.monotonic(), seconds, False

    @property
    def left(self) -> float:
        """Seconds until it ends."""
        return self._start + self._seconds - time.monotonic()

    def go_on(self, what: str, hint: str) -> None:
        """Rest for a moment.  Raises BusyError where the time is over."""
        if self.left <= 0:
            raise BusyError(what, hint=hint)
        if not self._said and time.monotonic() - self._start > _SAY_AFTER:
            self._said = True
            _log.warning("%s: waiting", what)
        time.sleep(_REST * (0.5 + random.random()))


def check_lease(backend: Backend, name: str) -> None:
    """Raises ConflictError where somebody has taken the lease away meanwhile."""
    try:
        read_small(backend, name, _MAX_BYTES)
    except FileNotFoundError:
        raise ConflictError("the lease of this writer is gone", hint="commit again") from None


@contextmanager
def exclusive(backend: Backend, own: str = "", *, wait: bool = False) -> Iterator[None]:
    """Keep writers out, and any other gc but that which holds the mark `own`.  Of two that come at
    once one goes on at most.  With `wait` it waits for writers that are at work; see `patience`.
    New ones are let in meanwhile, until half of that time is over.

    Raises:
        BusyError: a writer or another gc is at work.
    """
    waiting = _Waiting(_patience.get() if wait else 0.0)
    if not wait:
        with _alone(backend, own, waiting, stays=True):
            yield
        return
    half = waiting.left / 2
    while True:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(_alone(backend, own, waiting, stays=waiting.left <= half))
            except _WritersError as error:
                busy = error
            else:
                yield
                return
        waiting.go_on(busy.message, busy.hint or "")


class _WritersError(BusyError):
    """Writers are at work."""


@contextmanager
def _alone(backend: Backend, own: str, waiting: _Waiting, *, stays: bool) -> Iterator[None]:
    """Put the exclusive mark, and wait for writers with it in place, where it `stays`."""
    with _held(backend, _EXCLUSIVE) as mark:
        others = [*live_leases(backend, _EXCLUSIVE), *live_leases(backend, _SOLE)]
        others = [name for name in others if name not in (mark, own)]
        if others:
            _silence.keep(backend)
            raise BusyError("another gc is at work", hint=_who(backend, others[0]))
        while writers := live_leases(backend, _LEASE):
            _silence.keep(backend)
            what, who = f"{len(writers)} writer(s) are at work", _who(backend, writers[0])
            if not stays or waiting.left <= 0:
                raise _WritersError(what, hint=who)
            waiting.go_on(what, who)
        # Who was only silent finds his lease gone before he publishes what is swept now.
        for name in dead_leases(backend):
            backend.delete(name)
        yield


@contextmanager
def sole(backend: Backend) -> Iterator[str]:
    """Be the only gc, beside writers; the name of the mark.

    Raises:
        BusyError: another gc is at work.
    """
    with _held(backend, _SOLE) as mark:
        others = [*live_leases(backend, _EXCLUSIVE), *live_leases(backend, _SOLE)]
        others = [name for name in others if name != mark]
        if others:
            raise BusyError("another gc is at work", hint=_who(backend, others[0]))
        yield mark


@contextmanager
def turn(backend: Backend) -> Iterator[None]:
    """Wait until nobody else is about to change what is changed in place, or to move a ref so that
    it leads elsewhere, or to delete an original that a ref leads to; see `patience`.

    Raises:
        BusyError: somebody is, and stays so.
    """
    waiting = _Waiting(max(_patience.get(), _LEAST_TURN))
    while True:
        with _held(backend, _CHANGE, brief=True) as own:
            others = [name for name in live_leases(backend, _CHANGE) if name != own]
            if not others:
                yield
                return
        if waiting.left <= 0:
            _silence.keep(backend)
        waiting.go_on("the repository is being changed", _who(backend, others[0]))
