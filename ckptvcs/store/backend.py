"""Where files live: named, write-once, listed by folder.

Names are relative and use `/`.  A file is complete when its name appears, and is never changed
after that.  `MemoryBackend` keeps everything in a dict; `ckptvcs.store.local` is the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ckptvcs.errors import ConflictError, CorruptionError, StorageError


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


class Backend(Protocol):
    """A folder of write-once files."""

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

    def cache(self, name: str, data: bytes) -> None:
        """Put a file that may be lost in the place of what has its name; nothing where it cannot be
        written.
        """

    def make_way(self, folder: str) -> None:
        """Remove what has the name of a folder, or of one above it, and is none."""

    def delete(self, name: str) -> None:
        """Remove a file, or what has its name; no error where there is none."""


class MemoryBackend:
    """A backend that is a dict, for tests and for states that need no disk."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def names(self, folder: str) -> Iterator[str]:
        return iter([name for name in self.files if name.startswith(folder + "/")])

    def size(self, name: str) -> int:
        if name not in self.files:
            raise FileNotFoundError(name)
        return len(self.files[name])

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        data = self.files[name]
        return data[offset : len(data) if length is None else offset + length]

    def writer(self) -> MemoryWriter:
        return MemoryWriter(self)

    def cache(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def make_way(self, folder: str) -> None:
        self.files.pop(folder, None)

    def delete(self, name: str) -> None:
        self.files.pop(name, None)


class MemoryWriter:
    """A file of a MemoryBackend on its way."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self._data += data

    def publish(self, name: str) -> None:
        if name in self._backend.files:
            raise ConflictError(f"{name} exists already")
        self._backend.files[name] = bytes(self._data)

    def abort(self) -> None:
        self._data.clear()


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
        raise CorruptionError(f"{name} is larger than the {limit} bytes it may have")
    return data
