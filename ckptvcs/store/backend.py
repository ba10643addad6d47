"""The interface to the files of a repository: named, write-once, listed by folder.

Names are relative and use `/`.  A file is complete when its name appears, and it never changes
after that.  `ckptvcs.store.local` implements the interface for a directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ckptvcs.errors import CorruptionError, StorageError


class Writer(Protocol):
    """An unfinished file: invisible until `publish`, deleted by `abort`."""

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`.  Raises StorageError if the disk is full."""

    def publish(self, name: str) -> None:
        """Make the file durable, then visible as `name`.

        Raises:
            ConflictError: the name is taken; the existing file stays unchanged.
            StorageError: nothing became visible.
        """

    def abort(self) -> None:
        """Delete the unfinished file.  Does nothing after `publish`."""


@dataclass(frozen=True)
class Trace:
    """The properties of a held file that distinguish it from a copy and show its holder.

    `device` and `inode` are the numbers of the file.  They are `fixed` if only this machine can
    reach the file system, so that the file has the same numbers for every reader.  `is_locked` is
    None if the file system has no locks.  `renewed_ns` is the time of the last renewal, by the
    clock of the file system.
    """

    device: int = 0
    inode: int = 0
    fixed: bool = False
    is_locked: bool | None = None
    renewed_ns: int = 0


class Hold(Protocol):
    """A file that shows that its holder is at work."""

    def renew(self) -> None:
        """Update the modification time of the file.  Ignores failures."""

    def release(self) -> None:
        """Delete the file.  After a StorageError, the file stays but is no longer held."""


class Files(Protocol):
    """The files of a folder, to read."""

    def names(self, folder: str) -> Iterator[str]:
        """Yield every name below `folder` in any order; nothing if the folder does not exist."""

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: the file does not exist.
            CorruptionError: the name belongs to something other than a file.
            StorageError: the system refuses.
        """

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset` on, or fewer at the end of the file.

        Raises:
            FileNotFoundError, CorruptionError, StorageError: as `size`.
        """


class Backend(Files, Protocol):
    """A folder of write-once files; `str` names it in messages."""

    def writer(self) -> Writer:
        """Begin a new file."""

    def hold(self, name: str, describe: Callable[[Trace], bytes]) -> Hold:
        """Create a file, publish it with the content `describe(its trace)`, and hold it.

        The file is not synced, because it is meaningless after a crash of the machine.

        Raises:
            ConflictError: the name is taken.
            StorageError: the file cannot be written.
        """

    def look(self, name: str, limit: int) -> tuple[bytes, Trace]:
        """Return the bytes and the trace of a held file.

        Raises:
            FileNotFoundError, StorageError, CorruptionError: as `read_small`.
        """

    def clock_ns(self) -> int:
        """Return the time by the clock that sets `renewed_ns`."""

    def settle(self, names: Iterable[str]) -> None:
        """Make files and their names durable, whoever published them.

        Files that this object published or settled before cost nothing.

        Raises:
            FileNotFoundError: a file does not exist.
            StorageError: the files cannot be synced.
        """

    def settle_seen(self) -> None:
        """Settle the files that this object has read or measured and that may not be durable.

        Their writers had not reached the end of `publish`.  Deleted files are skipped.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Replace a small file durably.

        Raises:
            StorageError: the file is unchanged.
        """

    def cache(self, name: str, data: bytes) -> None:
        """Write a file that may be lost, replacing anything of that name.  Ignores failures."""

    def make_folders(self, folders: Iterable[str]) -> list[str]:
        """Create the folders that are missing or are not folders; return their names.

        Raises:
            StorageError: a folder cannot be created.
        """

    def make_way(self, folder: str) -> None:
        """Remove each file or link that has the name of `folder` or of a folder above it."""

    def delete(self, name: str) -> None:
        """Remove a file, or anything else of that name.  Does nothing if it does not exist."""


_TRIES = 3


def write_once(backend: Backend, name: str, data: bytes) -> None:
    """Publish a small file.  Raises ConflictError if the name is taken."""
    for attempt in range(_TRIES):
        writer = backend.writer()
        try:
            writer.write(data)
            writer.publish(name)
            return
        except StorageError as error:
            # A caller without a lease may lose its temporary file to gc: try again.
            if attempt + 1 == _TRIES or not isinstance(error.__cause__, FileNotFoundError):
                raise
        finally:
            writer.abort()


def read_small(backend: Backend, name: str, limit: int) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        FileNotFoundError, CorruptionError, StorageError: as `Backend.size`.
        CorruptionError: the file is larger.
    """
    data = backend.read(name, 0, limit + 1)
    if len(data) > limit:
        raise CorruptionError(f"{name} is larger than its limit of {limit} bytes")
    return data
