"""Files that nobody deletes or changes while somebody has them open, by locks that end with the
process that holds them.

Whoever uses a file shares its lock; whoever wants to delete it needs the lock for himself, and does
not wait for it.
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
    """A file with a lock, shared or, where it is `alone`, of this one only."""

    def __init__(self, path: Path, *, alone: bool = False, create: bool = False) -> None:
        """Raises BlockingIOError: others have it open; FileNotFoundError: it is not there, or has
        gone meanwhile; OSError: it is not a regular file, or cannot be locked.
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
        """The open file.  Raises FileNotFoundError: it was closed."""
        if self._descriptor < 0:
            raise FileNotFoundError(self.path)
        return self._descriptor

    @property
    def identity(self) -> tuple[int, int]:
        """What tells it from other files, whatever its name."""
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    def share(self) -> None:
        """Let others open it, too.  Raises OSError."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Let it go."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def let_others_write(descriptor: int, folder: Path) -> None:
    """Whoever may write into a folder may write to its files."""
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, folder.stat().st_mode & 0o666)


def delete_unused(path: Path) -> None:
    """Delete a file, unless somebody has it open."""
    with contextlib.suppress(OSError):
        file = LockedFile(path, alone=True)
        try:
            path.unlink()
        finally:
            file.close()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the only one that is inside for the file of this name, which is made.

    Raises:
        BlockingIOError: somebody is inside; it is not waited for him.
        OSError: the file system refuses.
    """
    fresh = not path.exists()
    file = LockedFile(path, alone=True, create=True)
    try:
        if fresh:
            let_others_write(file.descriptor, path.parent)
        yield
    finally:
        file.close()


def _forget(_: bool) -> None:
    """The files are the parent's: the lock of one lasts as long as anybody has it open."""
    for file in [*_files]:
        file.close()


in_child(_forget)
