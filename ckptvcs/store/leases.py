"""Leases: writers and a sweeping gc keep out of each other's way, without locks.

A writer puts a lease, then looks for an exclusive mark.  gc puts an exclusive mark, then looks for
leases and for marks of others.  All publish before they look, so at least one of two sees the other
and backs off.  Each file is its holder's own: none is ever taken over.
A process that dies leaves its file behind: it counts no more once the process is known to be
gone, which only its own host can tell.  One that lives on may fail to delete its file: within it
that counts no more at once, and for others when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ckptvcs.errors import BusyError, CkptError, ConflictError, CorruptionError, StorageError
from ckptvcs.store.backend import Backend, read_small, write_once
from ckptvcs.store.host import boot_id, host_name, is_running, process_space, started

_LEASE, _EXCLUSIVE, _CHANGE = "leases/", "marks/exclusive-", "marks/change-"
_TURNS, _PAUSE = 400, 0.05  # seconds
_TRIES, _REST = 60, 1.0  # seconds, while gc sweeps
_MAX_BYTES = 4096

T = TypeVar("T")

_meant: set[str] = set()  # the files of this process that it has not withdrawn


def _self() -> bytes:
    pid = os.getpid()
    return json.dumps({
        "host": host_name(), "boot": boot_id(), "space": process_space(), "pid": pid,
        "started": started(pid),
    }).encode()  # fmt: skip


def _alive(name: str, data: bytes) -> bool:
    """Whether the process that wrote a lease may still be at work."""
    try:
        fields = json.loads(data)
        host, boot, pid, since = (fields[k] for k in ("host", "boot", "pid", "started"))
        if host != host_name():
            return True
        if boot != boot_id():
            return False
        if fields.get("space", "") != process_space():
            return True
        if int(pid) == os.getpid():
            return name in _meant
        return is_running(int(pid), since)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False


def _holder(backend: Backend, name: str) -> bool:
    try:
        return _alive(name, read_small(backend, name, _MAX_BYTES))
    except (FileNotFoundError, CorruptionError):  # what is no file is nobody's
        return False


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
    return [name for name in names if _holder(backend, name)]


def dead_leases(backend: Backend) -> list[str]:
    """What dead writers and sweepers left behind."""
    names = [*backend.names("leases"), *backend.names("marks")]
    return [name for name in names if not _holder(backend, name)]


@contextmanager
def _held(backend: Backend, prefix: str) -> Iterator[str]:
    """Say in a file of one's own that this process is at work, for so long."""
    name = f"{prefix}{secrets.token_hex(12)}"
    _meant.add(name)
    try:
        write_once(backend, name, _self())  # which may fail when the name is there already
        yield name
    finally:
        _meant.discard(name)
        # Where it cannot be deleted it counts no more for this process, and for none when it ends.
        with contextlib.suppress(StorageError):
            backend.delete(name)


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
            raise BusyError("another gc is at work", hint=_who(backend, others[0]))
        writers = live_leases(backend, _LEASE)
        if writers:
            what = f"{len(writers)} writer(s) are at work"
            raise BusyError(what, hint=_who(backend, writers[0]))
        yield


@contextmanager
def turn(backend: Backend) -> Iterator[None]:
    """Wait until nobody else is about to change what is changed in place, for a moment.

    Raises:
        BusyError: somebody is, and stays so.
    """
    for _ in range(_TURNS):
        with _held(backend, _CHANGE) as own:
            others = [name for name in live_leases(backend, _CHANGE) if name != own]
            if not others:
                yield
                return
        time.sleep(random.random() * _PAUSE)
    raise BusyError("the repository is being changed", hint=_who(backend, others[0]))
