"""Leases: writers and a sweeping gc keep out of each other's way, without locks.

A writer puts a lease, then looks for the exclusive mark.  gc puts the exclusive mark, then looks
for leases.  Both publish before they look, so at least one of them sees the other and backs off.
A process that dies leaves its file behind: it counts no more once the process is known to be
gone, which only its own host can tell.  One that lives on may fail to delete its file: within it
that counts no more at once, and for others when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from ckptvcs.errors import BusyError, ConflictError, StorageError
from ckptvcs.store.backend import Backend, read_small, write_once
from ckptvcs.store.host import boot_id, host_name, is_running, started

_EXCLUSIVE = "marks/exclusive"
_MAX_BYTES = 4096


_held: set[str] = set()  # nonces of the files that this process means


def _self(nonce: str) -> bytes:
    pid = os.getpid()
    return json.dumps({
        "host": host_name(), "boot": boot_id(), "pid": pid, "started": started(pid), "nonce": nonce,
    }).encode()  # fmt: skip


def _alive(data: bytes) -> bool:
    """Whether the process that wrote a lease may still be at work."""
    try:
        fields = json.loads(data)
        host, boot, pid, since = (fields[k] for k in ("host", "boot", "pid", "started"))
        if host != host_name():
            return True
        if int(pid) == os.getpid() and fields.get("nonce", "") not in _held:
            return False
        return boot == boot_id() and is_running(int(pid), since)
    except (ValueError, KeyError, TypeError, OverflowError):
        return False


@contextmanager
def _held_file(backend: Backend, name: str) -> Iterator[None]:
    """Say in a file that this process is at work, for so long.  Raises ConflictError, StorageError:
    it is not said.
    """
    nonce = secrets.token_hex(8)
    data = _self(nonce)
    _held.add(nonce)
    try:
        write_once(backend, name, data)  # which may fail when the name is there already
        yield
    finally:
        _held.discard(nonce)
        with contextlib.suppress(StorageError, FileNotFoundError):
            if read_small(backend, name, _MAX_BYTES) == data:
                backend.delete(name)


def _holder(backend: Backend, name: str) -> bool:
    try:
        return _alive(read_small(backend, name, _MAX_BYTES))
    except FileNotFoundError:
        return False


def live_leases(backend: Backend) -> list[str]:
    """The leases of writers that may still be at work."""
    return [name for name in backend.names("leases") if _holder(backend, name)]


def dead_leases(backend: Backend) -> list[str]:
    """What dead writers left behind."""
    return [name for name in backend.names("leases") if not _holder(backend, name)]


@contextmanager
def lease(backend: Backend) -> Iterator[str]:
    """Hold a lease while writing; it names the lease, to be checked before publishing.

    Raises:
        BusyError: gc is sweeping.
    """
    name = f"leases/{secrets.token_hex(12)}"
    with _held_file(backend, name):
        if _holder(backend, _EXCLUSIVE):
            raise BusyError("gc is sweeping this repository", hint="try again in a moment")
        yield name


def check_lease(backend: Backend, name: str) -> None:
    """Raises ConflictError where somebody has taken the lease away meanwhile."""
    try:
        read_small(backend, name, _MAX_BYTES)
    except FileNotFoundError:
        raise ConflictError("the lease of this writer is gone", hint="commit again") from None


@contextmanager
def exclusive(backend: Backend) -> Iterator[None]:
    """Keep new writers out while sweeping.

    Raises:
        BusyError: a writer or another gc is at work.
    """
    if not _holder(backend, _EXCLUSIVE):
        backend.delete(_EXCLUSIVE)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_held_file(backend, _EXCLUSIVE))
        except ConflictError as error:
            raise BusyError("another gc is at work", hint="try again later") from error
        writers = live_leases(backend)
        if writers:
            raise BusyError(
                f"{len(writers)} writer(s) are at work", hint="run gc again when they are done"
            )
        yield
