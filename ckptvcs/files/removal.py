"""Removal: a file is deleted only while it is, byte for byte, what has been kept of it.

    folder --each directory held open, none a symbolic link--> file, held open --hashed--> unlinked

Names are looked up in directories that are held open, so that nobody who moves or links directories
meanwhile can turn a removal elsewhere.  What is hashed is what is open.  It is renamed before it is
unlinked: where it is something else by then, or was written since, it gets its name back.
All files of a checkpoint are proven before the first one is deleted: that is one short moment.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self

from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.files.placing import LINK_ERRORS, Folder, NotRegularError
from ckptvcs.hashing import hasher
from ckptvcs.parallel import Progress
from ckptvcs.store.disk import storage_error

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Removed:
    """A deleted file.

    Attributes:
        path: The relative path.
        size_bytes: The size in bytes.
        other_names: The number of other hard links to the file.
    """

    path: PurePosixPath
    size_bytes: int
    other_names: int

    @property
    def freed_bytes(self) -> int:
        """The freed bytes on disk; 0 if the file has another name."""
        return 0 if self.other_names else self.size_bytes


@dataclass(frozen=True)
class Proven:
    """A file that holds what it should, and what the system says of it."""

    path: PurePosixPath
    status: os.stat_result


class Originals:
    """The files below a folder, for removal.  Paths are relative to it.

    Raises:
        InvalidInputError: this system cannot hold directories open.
        StorageError: the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        if os.unlink not in os.supports_dir_fd or not hasattr(os, "O_NOFOLLOW"):
            raise InvalidInputError("files cannot be removed safely on this system")
        try:
            self._folder = Folder.open(folder)
        except OSError as error:
            raise storage_error(error, f"open {folder}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    @contextmanager
    def _open(self, path: PurePosixPath) -> Iterator[tuple[BinaryIO, Folder]]:
        """A regular file, open, and the directory that it is in.

        Raises:
            ConflictError: there is none, or a symbolic link leads to it.
            StorageError: it cannot be opened, or what is done with it fails.
        """
        try:
            with self._folder.inside(path.parent) as parent, _regular(parent, path) as file:
                yield file, parent
        except OSError as error:
            if error.errno in LINK_ERRORS:
                raise ConflictError(f"{path} is or lies behind a symbolic link") from error
            if error.errno == errno.ENOENT:
                raise ConflictError(f"{path} is gone") from error
            raise storage_error(error, f"remove {self._folder.path / path}") from error

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
        return self.delete(self.prove(path, digest, progress))

    def prove(self, path: PurePosixPath, digest: str, progress: Progress) -> Proven:
        """A file whose BLAKE3 is still `digest`, as it is now.

        Raises:
            ConflictError: it is something else now.
            StorageError: it cannot be read.
        """
        with self._open(path) as (file, _):
            before = os.fstat(file.fileno())
            found = hasher()
            while block := file.read(_BLOCK):
                found.update(block)
                progress(len(block))
            if found.hexdigest() != digest or _state(os.fstat(file.fileno())) != _state(before):
                raise _changed(path)
        return Proven(path, before)

    def delete(self, proven: Proven) -> Removed:
        """Delete a file that has not been touched since it was proven.

        Raises:
            ConflictError: it has been; it stays.
            StorageError: it cannot be removed; it stays.
        """
        path = proven.path
        with self._open(path) as (file, parent):
            now = os.fstat(file.fileno())
            if _is_other(now, proven.status) or not parent.remove(path.name, proven.status):
                raise _changed(path)
        return Removed(path, now.st_size, now.st_nlink - 1)

    def remove_directory(self, path: PurePosixPath) -> bool:
        """Delete a directory if nothing is in it; whether that was so.  A link is none."""
        try:
            with self._folder.inside(path.parent) as parent:
                parent.rmdir(path.name)
        except OSError:
            return False  # it stays, which is never wrong
        return True


def _regular(parent: Folder, path: PurePosixPath) -> BinaryIO:
    try:
        return parent.open_file(path.name)
    except NotRegularError:
        raise ConflictError(f"{path} is not a regular file") from None


def _changed(path: PurePosixPath) -> ConflictError:
    return ConflictError(f"{path} is not any more what was committed")


def _is_other(now: os.stat_result, before: os.stat_result) -> bool:
    """Whether a file that has no other name was touched at all, or its number given to another."""
    return now.st_nlink == before.st_nlink == 1 and now.st_ctime_ns != before.st_ctime_ns


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
