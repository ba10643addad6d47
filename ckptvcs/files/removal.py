"""Delete originals, but only while they are byte for byte the committed files.

    open each directory, through no link --> open the file --> hash it --> unlink it

Names are looked up in open directories.  So a program that moves or links directories meanwhile
cannot redirect a deletion.  The hashed file is the open file.  It is renamed before it is unlinked;
if it is a different file by then, or was written since, it gets its name back.  All files of a
checkpoint are verified before the first one is deleted, so the deletions follow closely.
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
from ckptvcs.files.placing import LINK_ERRORS, Folder, NotRegularError, lasting
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
    """A verified file and its status at that time."""

    path: PurePosixPath
    status: os.stat_result

    @property
    def removed(self) -> Removed:
        """The file when it is deleted."""
        return Removed(self.path, self.status.st_size, self.status.st_nlink - 1)


class Originals:
    """The files below a folder, for removal.  Paths are relative to the folder.

    Raises:
        InvalidInputError: this system cannot look names up in open directories.
        StorageError: the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        if os.unlink not in os.supports_dir_fd or not hasattr(os, "O_NOFOLLOW"):
            raise InvalidInputError("this system cannot delete files safely")
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
        """Open a regular file and its directory.

        Raises:
            ConflictError: the file does not exist, or its path contains a symbolic link.
            StorageError: the file cannot be opened, or an operation in the block fails.
        """
        try:
            with self._folder.inside(path.parent) as parent, parent.open_file(path.name) as file:
                yield file, parent
        except NotRegularError:
            raise ConflictError(f"{path} is not a regular file") from None
        except OSError as error:
            if error.errno in LINK_ERRORS:
                raise ConflictError(f"{path} is or lies behind a symbolic link") from error
            if error.errno == errno.ENOENT:
                raise ConflictError(f"{path} does not exist") from error
            raise storage_error(error, f"remove {self._folder.path / path}") from error

    def check(self, path: PurePosixPath, size_bytes: int) -> None:
        """Raise ConflictError if `remove` is sure to refuse.  This reads no content."""
        with self._open(path) as (file, _):
            if os.fstat(file.fileno()).st_size != size_bytes:
                raise _changed(path)

    def has(self, path: PurePosixPath) -> bool:
        """Return whether there is a file of this name."""
        try:
            with self._folder.inside(path.parent) as parent:
                return parent.look(path.name) is not None
        except OSError:
            return False

    def remove(self, path: PurePosixPath, digest: str, progress: Progress) -> Removed:
        """Delete a file whose BLAKE3 is still `digest`.

        Raises:
            ConflictError: the file has changed; it stays.
            StorageError: the file cannot be read or deleted; it stays.
        """
        return self.delete(self.prove(path, digest, progress))

    def prove(self, path: PurePosixPath, digest: str, progress: Progress) -> Proven:
        """Check that the BLAKE3 of a file is still `digest`.

        Raises:
            ConflictError: the file has changed.
            StorageError: the file cannot be read.
        """
        with self._open(path) as (file, _):
            before = os.fstat(file.fileno())
            content_hash = hasher()
            while block := file.read(_BLOCK):
                content_hash.update(block)
                progress(len(block))
            now = os.fstat(file.fileno())
            if content_hash.hexdigest() != digest or lasting(now) != lasting(before):
                raise _changed(path)
        return Proven(path, before)

    def delete(self, proven: Proven) -> Removed:
        """Delete a file that has not changed since `prove`.

        Raises:
            ConflictError: the file has changed; it stays.
            StorageError: the file cannot be deleted; it stays.
        """
        path = proven.path
        with self._open(path) as (file, parent):
            now = os.fstat(file.fileno())
            if _is_other(now, proven.status) or not parent.remove(path.name, proven.status):
                raise _changed(path)
        return Removed(path, now.st_size, now.st_nlink - 1)

    def remove_directory(self, path: PurePosixPath) -> bool:
        """Delete a directory if it is empty and not a link; return whether it was deleted."""
        try:
            with self._folder.inside(path.parent) as parent:
                parent.rmdir(path.name)
        except OSError:
            return False
        return True


def _changed(path: PurePosixPath) -> ConflictError:
    return ConflictError(f"{path} changed since it was committed")


def _is_other(now: os.stat_result, before: os.stat_result) -> bool:
    """Return whether a file with a single name was changed, or another file got its inode."""
    return now.st_nlink == before.st_nlink == 1 and now.st_ctime_ns != before.st_ctime_ns
