"""Leases and marks keep writers and a deleting gc apart, without waiting for locks.

A writer creates a lease, then looks for exclusive marks.  gc creates an exclusive mark, then looks
for leases and other marks.  Both publish before they look, so at least one of them sees the other;
it backs off and tries again for a while.  gc holds the exclusive mark only while it records or
deletes.  While it plans and copies, its mark `gc-` keeps out only other gcs.

No process takes over the file of another.  A killed process leaves its file behind, and a copy of a
repository contains files of processes elsewhere: `store/holders.py` decides whether a holder may
still be at work.  A running process that cannot delete its file no longer holds it.
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
from ckptvcs.text import counted

_LEASE, EXCLUSIVE, _CHANGE = "leases/", "marks/exclusive-", "marks/change-"
_SOLE = "marks/gc-"
MIN_TURN = 10.0  # seconds
_REST, WARN_AFTER = 0.05, 1.0  # seconds
_MAX_BYTES = 4096
GRACE, POLL_INTERVAL = 2.0, 0.05  # seconds

_log = logging.getLogger("ckptvcs")
_patience = ContextVar("patience", default=60.0)  # seconds
_leases: WeakKeyDictionary[Backend, set[str]] = WeakKeyDictionary()  # those of this process
_held_names: set[str] = set()  # leases and marks that this process holds
silence = Silence()


def judge_lease(backend: Backend, name: str) -> Holder:
    """Return whether the holder of a lease is alive, as far as this process can tell."""
    try:
        data, trace = backend.look(name, _MAX_BYTES)
    except (FileNotFoundError, CorruptionError):  # CorruptionError: something other than a file
        return Holder.GONE
    is_held = name in _held_names
    holder = judge(data, trace, host_name(), boot_id(), is_held=is_held, clock_ns=backend.clock_ns)
    return silence.judge(backend, name, trace) if holder is Holder.UNKNOWN else holder


def _who(backend: Backend, name: str) -> str:
    """Return a hint: who holds a lease or mark, and what the user can do if that one is gone."""
    with contextlib.suppress(FileNotFoundError, CkptError, *holders.MALFORMED):
        fields = json.loads(read_small(backend, name, _MAX_BYTES))
        host, pid = str(fields["host"])[:64], int(fields["pid"])
        return f"process {pid} on {host!r}; if that is gone for good, delete {name}"
    return "try again later"


def live_leases(backend: Backend, prefix: str = _LEASE) -> list[str]:
    """Return the leases or marks whose holders may still be at work."""
    folder = prefix.partition("/")[0]
    names = [name for name in backend.names(folder) if name.startswith(prefix)]
    return [name for name in names if judge_lease(backend, name) not in holders.DEAD]


def dead_leases(backend: Backend) -> list[str]:
    """Return the leases and marks whose holders are gone or silent."""
    names = [*backend.names("leases"), *backend.names("marks")]
    return [name for name in names if judge_lease(backend, name) in holders.DEAD]


def await_others(backend: Backend, others: Iterable[str]) -> bool:
    """Wait a moment for the holders of leases; return whether all are gone, not just silent."""
    end = time.monotonic() + GRACE
    while others := [name for name in others if judge_lease(backend, name) is not Holder.GONE]:
        if time.monotonic() > end:
            return False
        time.sleep(POLL_INTERVAL)
    return True


class Renewals:
    """Renews the files that this process holds, for machines that cannot see the process.

    One thread does so, and ends some time after the last file was released.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Reset for a forked child, which holds nothing and has no such thread."""
        self._lock, self._holds = threading.Lock(), set[Hold]()
        self._is_running = False

    def begin(self) -> bool:
        """Start the thread if needed; return whether it runs."""
        with self._lock:
            if not self._is_running:
                self._is_running = start_thread(self._run)
            return self._is_running

    def add(self, hold: Hold) -> None:
        """Renew a file from now on."""
        with self._lock:
            self._holds.add(hold)
        self.begin()  # the thread may just have ended

    def remove(self, hold: Hold) -> None:
        """Stop renewing a file."""
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


renewals = Renewals()


def _forked() -> None:
    """Forget the files of the parent: a forked child holds none."""
    renewals.forget()
    _held_names.clear()
    _leases.clear()


os.register_at_fork(after_in_child=_forked)


@contextmanager
def hold_file(backend: Backend, prefix: str, *, brief: bool = False) -> Iterator[str]:
    """Create a lease or mark, and delete it at the end.  A `brief` one is not renewed."""
    name = f"{prefix}{os.urandom(12).hex()}"
    _held_names.add(name)
    hold = None
    is_renewed = brief or renewals.begin()
    try:
        hold = backend.hold(
            name, lambda trace: describe(trace, host_name(), boot_id(), is_renewed=is_renewed)
        )
        if not brief:
            renewals.add(hold)
        yield name
    finally:
        if hold is not None:
            renewals.remove(hold)
        _held_names.discard(name)
        # If the file cannot be deleted, it is ignored, because nobody holds it.
        with contextlib.suppress(StorageError):
            backend.delete(name) if hold is None else hold.release()


@contextmanager
def lease(backend: Backend) -> Iterator[str]:
    """Hold a lease while writing; return its name, for `check_lease` before publishing.

    This waits while gc deletes (see `patience`), unless the process holds another lease: gc waits
    for that one.

    Raises:
        BusyError: gc still deletes at the end of the wait.
    """
    waiting, held = _Waiting(_patience.get()), _leases.setdefault(backend, set())
    while True:
        with hold_file(backend, _LEASE) as name:
            # As long as another lease is in `held`, its file exists: gc has not begun to delete.
            sweeping = [] if held else live_leases(backend, EXCLUSIVE)
            if not sweeping:
                held.add(name)
                try:
                    yield name
                finally:
                    held.discard(name)
                return
        waiting.go_on("gc is sweeping this repository", _who(backend, sweeping[0]))


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Limit how long this thread waits for other processes inside the block."""
    before = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(before)


class _Waiting:
    """A wait with a time limit, which logs its reason once."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds, self._has_warned = time.monotonic(), seconds, False

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._start + self._seconds - time.monotonic()

    def go_on(self, what: str, hint: str) -> None:
        """Sleep for a moment.  Raises BusyError at the limit."""
        if self.left <= 0:
            raise BusyError(what, hint=hint)
        if not self._has_warned and time.monotonic() - self._start > WARN_AFTER:
            self._has_warned = True
            _log.warning("%s: waiting", what)
        time.sleep(_REST * (0.5 + random.random()))


def check_lease(backend: Backend, name: str) -> None:
    """Raise ConflictError if gc has deleted the lease."""
    try:
        read_small(backend, name, _MAX_BYTES)
    except FileNotFoundError:
        raise ConflictError("the lease of this writer is gone", hint="commit again") from None


@contextmanager
def exclusive(backend: Backend, own: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive mark: keep out writers and other gcs, except the holder of the mark `own`.

    With `wait`, this waits for running writers (see `patience`).  During the first half of that
    time, new writers may start.

    Raises:
        BusyError: a writer or another gc is at work.
    """
    waiting = _Waiting(_patience.get() if wait else 0.0)
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
    """Create an exclusive mark; wait for the writers if it `stays`, otherwise raise."""
    with hold_file(backend, EXCLUSIVE) as mark:
        _refuse_other_gcs(backend, mark, own)
        while writers := live_leases(backend, _LEASE):
            silence.keep(backend)
            what = f"the repository is in use by {counted(len(writers), 'writer')}"
            who = _who(backend, writers[0])
            if not stays or waiting.left <= 0:
                raise _WritersError(what, hint=who)
            waiting.go_on(what, who)
        # A silent writer that is still alive then finds its lease gone before it publishes.
        for name in dead_leases(backend):
            backend.delete(name)
        yield


@contextmanager
def sole(backend: Backend) -> Iterator[str]:
    """Hold the mark of a gc, which keeps out other gcs but no writers; return its name.

    Raises:
        BusyError: another gc is at work.
    """
    with hold_file(backend, _SOLE) as mark:
        _refuse_other_gcs(backend, mark)
        yield mark


def _refuse_other_gcs(backend: Backend, *marks: str) -> None:
    """Raise BusyError if another gc has a mark that is not one of `marks`."""
    others = [*live_leases(backend, EXCLUSIVE), *live_leases(backend, _SOLE)]
    others = [name for name in others if name not in marks]
    if others:
        silence.keep(backend)
        raise BusyError("another gc is at work", hint=_who(backend, others[0]))


@contextmanager
def turn(backend: Backend) -> Iterator[None]:
    """Take a turn, and wait for the turns of other processes (see `patience`).

    A turn is needed to change `format` or `config.toml`, to move a ref so that commits may become
    unreachable, and to delete originals.

    Raises:
        BusyError: another process still holds a turn at the end of the wait.
    """
    waiting = _Waiting(max(_patience.get(), MIN_TURN))
    while True:
        with hold_file(backend, _CHANGE, brief=True) as mark:
            others = [name for name in live_leases(backend, _CHANGE) if name != mark]
            if not others:
                yield
                return
        if waiting.left <= 0:
            silence.keep(backend)
        waiting.go_on("the repository is being changed", _who(backend, others[0]))
