"""Removal: a file is deleted only while it is, byte for byte, what has been kept of it.

    folder --each directory held open, none a symbolic link--> file, held open --hashed--> unlinked

Names are looked up in directories that are held open, so that nobody who moves or links directories
meanwhile can turn a removal elsewhere.  What is hashed is what is open; just before it is unlinked
its name must still lead to it, and it must not have been written.  Between that look and the
unlinking there is no time for a program that follows the usual way, to write a file anew beside
the old one and rename it, unless it does so in that very moment.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self

from blake3 import blake3

from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.store.disk import storage_error

_BLOCK = 1 << 22
_LINK_ERRORS = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Removed:
    """A file that is gone: its bytes, and how many other names it still has."""

    path: PurePosixPath
    size_bytes: int
    other_names: int

    @property
    def freed_bytes(self) -> int:
        """Bytes of disk that came free: none while the file has another name."""
        return 0 if self.other_names else self.size_bytes


class Originals:
    """The files below a folder, for removal.  Paths are relative to it.

    Raises:
        InvalidInputError: this system cannot hold directories open.
        StorageError: the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        if os.unlink not in os.supports_dir_fd or not hasattr(os, "O_NOFOLLOW"):
            raise InvalidInputError("files cannot be removed safely on this system")
        self._folder = folder
        try:
            self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise storage_error(error, f"open {folder}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    @contextmanager
    def _inside(self, directory: PurePosixPath) -> Iterator[int]:
        """A directory, open."""
        if directory.is_absolute() or ".." in directory.parts:
            raise InvalidInputError(f"{directory} is not below {self._folder}")
        at = os.dup(self._root)
        try:
            for part in directory.parts:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)

    @contextmanager
    def _open(self, path: PurePosixPath) -> Iterator[tuple[BinaryIO, int]]:
        """A regular file, open, and the directory that it is in.

        Raises:
            ConflictError: there is none, or a symbolic link leads to it.
            StorageError: it cannot be opened, or what is done with it fails.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would wait for its writer
        try:
            with (
                self._inside(path.parent) as parent,
                os.fdopen(os.open(path.name, flags, dir_fd=parent), "rb", buffering=0) as file,
            ):
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ConflictError(f"{path} is no regular file")
                yield file, parent
        except OSError as error:
            if error.errno in _LINK_ERRORS:
                raise ConflictError(f"{path} is or lies behind a symbolic link") from error
            if error.errno == errno.ENOENT:
                raise ConflictError(f"{path} is gone") from error
            raise storage_error(error, f"remove {self._folder / path}") from error

    def check(self, path: PurePosixPath, size_bytes: int) -> None:
        """Raises ConflictError where `remove` is sure to refuse; reads nothing."""
        with self._open(path) as (file, _):
            if os.fstat(file.fileno()).st_size != size_bytes:
                raise _changed(path)

    def remove(self, path: PurePosixPath, digest: str, progress: Progress) -> Removed:
        """Delete a file whose BLAKE3 is still `digest`.

        Raises:
            ConflictError: it is something else now; it stays.
            StorageError: it cannot be read or removed; it stays.
        """
        with self._open(path) as (file, parent):
            before = os.fstat(file.fileno())
            hasher = blake3(max_threads=1)
            while block := file.read(_BLOCK):
                hasher.update(block)
                progress(len(block))
            if hasher.hexdigest() != digest:
                raise _changed(path)
            now = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
            if _state(now) != _state(before):
                raise _changed(path)
            os.unlink(path.name, dir_fd=parent)
        return Removed(path, before.st_size, before.st_nlink - 1)

    def remove_directory(self, path: PurePosixPath) -> bool:
        """Delete a directory if nothing is in it; whether that was so.  A link is none."""
        try:
            with self._inside(path.parent) as parent:
                os.rmdir(path.name, dir_fd=parent)
        except OSError:
            return False  # it stays, which is never wrong
        return True


def _changed(path: PurePosixPath) -> ConflictError:
    return ConflictError(f"{path} is not any more what was committed")


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
