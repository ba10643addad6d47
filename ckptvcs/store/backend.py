"""Where files live: named, write-once, listed by folder.

Names are relative and use `/`.  A file is complete when its name appears, and is never changed
after that.  `ckptvcs.store.local` implements it for a directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ckptvcs.errors import CorruptionError, StorageError


class Writer(Protocol):
    """One file on its way: invisible until `publish`, gone after `abort`."""

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`.  Raises StorageError when there is no room."""

    def publish(self, name: str) -> None:
        """Make the file durable, then visible as `name`.

        Raises:
            ConflictError: the name is taken; the file that has it is left as it is.
            StorageError: nothing became visible.
        """

    def abort(self) -> None:
        """Forget what was written.  Does nothing after `publish`."""


@dataclass(frozen=True)
class Trace:
    """What tells a file from a copy of it, and whether somebody is there who holds it.

    `device` and `inode` are the numbers of the file; they are `fixed` where the file system is one
    of this machine alone, so that no file has other numbers elsewhere.  `is_locked` is None where
    the file system knows no locks.  `renewed_ns` is when the holder last renewed the file, by the
    clock of the file system.
    """

    device: int = 0
    inode: int = 0
    fixed: bool = False
    is_locked: bool | None = None
    renewed_ns: int = 0


class Hold(Protocol):
    """A file that says that its holder is at work."""

    def renew(self) -> None:
        """Say again that the holder is there; nothing where that fails."""

    def release(self) -> None:
        """Take the file away.  Raises StorageError; nobody holds it any more all the same."""


class Backend(Protocol):
    """A folder of write-once files; `str` names it in messages."""

    def names(self, folder: str) -> Iterator[str]:
        """Every name below `folder`, in no order; nothing where the folder does not exist."""

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptionError: what has its name is no file.
            StorageError: it cannot be looked at.
        """

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes asked for, fewer only at the end of the file.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptionError: what has its name is no file.
            StorageError: it cannot be read.
        """

    def writer(self) -> Writer:
        """Begin a new file."""

    def hold(self, name: str, say: Callable[[Trace], bytes]) -> Hold:
        """Publish what `say` makes of a file's own trace, and hold the file.  It need not outlast
        the machine, and is not synced.

        Raises:
            ConflictError: the name is taken.
            StorageError: it cannot be written.
        """

    def look(self, name: str, limit: int) -> tuple[bytes, Trace]:
        """The bytes of a file that somebody holds, or held, and its trace.

        Raises:
            FileNotFoundError, StorageError, CorruptionError: as `read_small`.
        """

    def clock_ns(self) -> int:
        """What the clock says that `renewed_ns` is taken from."""

    def settle(self, names: Iterable[str]) -> None:
        """Make files durable, with their names, whoever has published them.  What this object has
        published or settled already costs nothing.

        Raises:
            FileNotFoundError: one is gone.
            StorageError: they cannot be synced.
        """

    def settle_seen(self) -> None:
        """The same for all files that this object has read or measured and that may not be durable
        yet: their writers have not come to the end of `publish`.  What is gone by now is left out.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file durably in place of an older version of it.

        Raises:
            StorageError: the file is unchanged.
        """

    def cache(self, name: str, data: bytes) -> None:
        """Put a file that may be lost in the place of what has its name; nothing where it cannot be
        written.
        """

    def make_folders(self, folders: Iterable[str]) -> list[str]:
        """Create the folders that are missing or are not folders; return their names.

        Raises:
            StorageError: a folder cannot be created.
        """

    def make_way(self, folder: str) -> None:
        """Remove what has the name of a folder, or of one above it, and is none."""

    def delete(self, name: str) -> None:
        """Remove a file, or what has its name; no error where there is none."""


_TRIES = 3


def write_once(backend: Backend, name: str, data: bytes) -> None:
    """Publish a small file.  Raises ConflictError where the name is taken."""
    for attempt in range(_TRIES):
        writer = backend.writer()
        try:
            writer.write(data)
            writer.publish(name)
            return
        except StorageError as error:
            # gc takes for debris what nobody who holds a lease is writing.
            if attempt + 1 == _TRIES or not isinstance(error.__cause__, FileNotFoundError):
                raise
        finally:
            writer.abort()


def read_small(backend: Backend, name: str, limit: int) -> bytes:
    """A whole file that must not be larger than `limit` bytes.

    Raises:
        FileNotFoundError, StorageError, CorruptionError: it cannot be read, is larger, or no file.
    """
    data = backend.read(name, 0, limit + 1)
    if len(data) > limit:
        raise CorruptionError(f"{name} is larger than its limit of {limit} bytes")
    return data
