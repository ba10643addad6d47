"""Held files on a file system: a lock shows that the holder is alive; a copy has no lock.

The kernel releases the lock when its process ends, even if this process cannot see that one.  Other
machines may not see the lock: a shared file system may keep locks local to each machine.
`ckptvcs.store.holders` draws the conclusions.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from ckptvcs.errors import ConflictError
from ckptvcs.store import disk
from ckptvcs.store.backend import Trace
from ckptvcs.store.disk import storage_error

_TRIES = 3
_IN_MEMORY = frozenset({b"tmpfs", b"ramfs"})


class LocalHold:
    """A file that is held open, and locked if the file system has locks."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._process = path, file, os.getpid()

    def renew(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            os.utime(self._file.fileno())

    def release(self) -> None:
        try:
            if self._process == os.getpid():  # a forked child must not delete it
                disk.unlink(self._path)
        except OSError as error:
            raise storage_error(error, f"delete {self._path}") from error
        finally:
            self._file.close()


def hold(root: Path, name: str, describe: Callable[[Trace], bytes]) -> LocalHold:
    """Publish a file, unsynced, and hold it; see `Backend.hold`."""
    for attempt in range(_TRIES):
        try:
            return _hold(root, root / name, describe)
        except FileExistsError as error:
            raise ConflictError(f"{name} exists already") from error
        except OSError as error:
            # gc may have deleted the temporary file, which no lease protects: try again.
            if attempt + 1 == _TRIES or not isinstance(error, FileNotFoundError):
                raise storage_error(error, f"publish {name}") from error
    raise AssertionError


def _hold(root: Path, target: Path, describe: Callable[[Trace], bytes]) -> LocalHold:
    path = root / "tmp" / os.urandom(16).hex()
    for folder in (path.parent, target.parent):
        folder.mkdir(exist_ok=True)
    file = disk.create(path)
    try:
        is_locked = _lock(file)
        disk.write(file, describe(make_trace(file, is_locked)))
        file.flush()
        disk.link(path, target)
        return LocalHold(target, file)
    except BaseException:
        file.close()
        raise
    finally:
        with contextlib.suppress(OSError):
            disk.unlink(path)


def _lock(file: BinaryIO) -> bool | None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None  # the file system has no locks
    return True


def trace(file: FileIO) -> Trace:
    """Return the trace of an open file.  This takes a shared lock for a moment."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        is_locked: bool | None = False
    except BlockingIOError:
        is_locked = True
    except OSError:
        is_locked = None
    return make_trace(file, is_locked)


def make_trace(file: BinaryIO | FileIO, is_locked: bool | None) -> Trace:
    """Return the trace of an open lease file."""
    status = os.fstat(file.fileno())
    fixed = is_own_device(status.st_dev)
    return Trace(status.st_dev, status.st_ino, fixed, is_locked, status.st_mtime_ns)


@lru_cache(64)
def is_own_device(device: int) -> bool:
    """Return whether a device is a local disk or memory, so that its files have fixed numbers."""
    if os.major(device):
        return True
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            fields, _, kind = line.partition(b" - ")
            if fields.split()[2] == wanted:
                return kind.split()[0] in _IN_MEMORY
    return False
