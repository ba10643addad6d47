"""Files that no process deletes or changes while another one has them open.

A user of a file holds a shared lock.  A process that deletes it needs the exclusive lock, and does
not wait for it.  The kernel releases the locks of a process that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptvcs.store.forking import in_child

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_files: weakref.WeakSet[LockedFile] = weakref.WeakSet()


class LockedFile:
    """An open file with a shared lock, or an exclusive one if `alone`."""

    def __init__(self, path: Path, *, alone: bool = False, create: bool = False) -> None:
        """Open and lock a file.

        Raises:
            BlockingIOError: other processes have it open.
            FileNotFoundError: it does not exist, or has just been deleted.
            OSError: it is not a regular file, or cannot be locked.
        """
        self.path, self._descriptor = path, -1
        flags = _FLAGS | (os.O_RDWR if alone else os.O_RDONLY) | (os.O_CREAT if create else 0)
        self._descriptor = os.open(path, flags, 0o666)
        _files.add(self)
        try:
            self._lock(fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        except BaseException:
            self.close()
            raise

    def _lock(self, lock: int) -> None:
        fcntl.flock(self._descriptor, lock | fcntl.LOCK_NB)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{self.path} is not a regular file")
        if not os.path.samestat(status, self.path.lstat()):
            raise FileNotFoundError(self.path)

    @property
    def descriptor(self) -> int:
        """The open descriptor.  Raises FileNotFoundError if the file was closed."""
        if self._descriptor < 0:
            raise FileNotFoundError(self.path)
        return self._descriptor

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    def share(self) -> None:
        """Make an exclusive lock shared.  Raises OSError."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Close the file, which releases its lock."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def let_others_write(descriptor: int, folder: Path) -> None:
    """Let the users who may write to the folder write to this file."""
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, folder.stat().st_mode & 0o666)


def delete_unused(path: Path) -> None:
    """Delete a file, unless a process has it open."""
    with contextlib.suppress(OSError), contextlib.closing(LockedFile(path, alone=True)):
        path.unlink()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file, which is created if needed.

    Raises:
        BlockingIOError: another process holds the lock; this function does not wait.
        OSError: the file system refuses.
    """
    fresh = not path.exists()
    with contextlib.closing(LockedFile(path, alone=True, create=True)) as file:
        if fresh:
            let_others_write(file.descriptor, path.parent)
        yield


def _forget(_: bool) -> None:
    """Close the parent's files in a forked child: the child would keep their locks alive."""
    for file in [*_files]:
        file.close()


in_child(_forget)
