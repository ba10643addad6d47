"""Held files on a file system: a lock says that the holder is there, which no copy of a file says.

The lock goes with the process that took it, whichever set of process ids that belongs to, and the
kernel that gave it knows it.  Others may not see it: a file system of several machines may keep
locks to each of them.  Leases say who may conclude what; see `ckptvcs.store.leases`.
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
    """A file that is held open, and locked where that can be."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._process = path, file, os.getpid()

    def renew(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is closed by now
            os.utime(self._file.fileno())

    def release(self) -> None:
        try:
            if self._process == os.getpid():  # a forked child holds nothing
                disk.unlink(self._path)
        except OSError as error:
            raise storage_error(error, f"delete {self._path}") from error
        finally:
            self._file.close()


def hold(root: Path, name: str, say: Callable[[Trace], bytes]) -> LocalHold:
    """Publish a file, unsynced, and hold it; see `Backend.hold`."""
    for attempt in range(_TRIES):
        try:
            return _hold(root, root / name, say)
        except FileExistsError as error:
            raise ConflictError(f"{name} exists already") from error
        except OSError as error:
            # gc takes for debris what nobody who holds a lease is writing.
            if attempt + 1 == _TRIES or not isinstance(error, FileNotFoundError):
                raise storage_error(error, f"publish {name}") from error
    raise AssertionError


def _hold(root: Path, target: Path, say: Callable[[Trace], bytes]) -> LocalHold:
    path = root / "tmp" / os.urandom(16).hex()
    for folder in (path.parent, target.parent):
        folder.mkdir(exist_ok=True)
    file = disk.create(path)
    try:
        is_locked = _lock(file)
        disk.write(file, say(_trace(file, is_locked)))
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
    """The trace of an open file; for a moment it is locked, as others who look may lock it too."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        is_locked: bool | None = False
    except BlockingIOError:
        is_locked = True
    except OSError:
        is_locked = None
    return _trace(file, is_locked)


def _trace(file: BinaryIO | FileIO, is_locked: bool | None) -> Trace:
    found = os.fstat(file.fileno())
    fixed = is_own_device(found.st_dev)
    return Trace(found.st_dev, found.st_ino, fixed, is_locked, found.st_mtime_ns)


@lru_cache(64)
def is_own_device(device: int) -> bool:
    """Whether a device is a disk, or memory, of this machine: what lies there has one number of a
    device and of an inode, however it is reached.
    """
    if os.major(device):
        return True
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            fields, _, kind = line.partition(b" - ")
            if fields.split()[2] == wanted:
                return kind.split()[0] in _IN_MEMORY
    return False
