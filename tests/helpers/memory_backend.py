"""A backend in memory, written against `ckptvcs.store.backend.Backend` alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ckptvcs.errors import ConflictError, CorruptionError
from ckptvcs.store.backend import Backend, Hold, Trace, Writer, read_small, write_once


class MemoryBackend:
    """Keep the files of a repository in a dict.  Threads may share it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return "memory"

    def names(self, folder: str) -> Iterator[str]:
        with self._lock:
            return iter([name for name in self.files if name.startswith(folder + "/")])

    def size(self, name: str) -> int:
        return len(self._content(name))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self._content(name)
        return data[offset : len(data) if length is None else offset + length]

    def _content(self, name: str) -> bytes:
        with self._lock:
            if name in self.files:
                return self.files[name]
            if any(other.startswith(name + "/") for other in self.files):
                raise CorruptionError(f"{name} is a folder")
        raise FileNotFoundError(name)

    def writer(self) -> Writer:
        return _MemoryWriter(self)

    def publish(self, name: str, data: bytes) -> None:
        with self._lock:
            if name in self.files:
                raise ConflictError(f"{name} exists already")
            self.files[name] = data

    def hold(self, name: str, describe: Callable[[Trace], bytes]) -> Hold:
        write_once(self, name, describe(Trace()))
        return _MemoryHold(self, name)

    def look(self, name: str, limit: int) -> tuple[bytes, Trace]:
        return read_small(self, name, limit), Trace()

    def clock_ns(self) -> int:
        return 0

    def settle(self, names: Iterable[str]) -> None:
        for name in names:
            self.size(name)

    def settle_seen(self) -> None:
        """Do nothing: files in memory do not outlast the process."""

    def replace(self, name: str, data: bytes) -> None:
        with self._lock:
            self.files[name] = data

    def cache(self, name: str, data: bytes) -> None:
        self.replace(name, data)

    def make_folders(self, folders: Iterable[str]) -> list[str]:
        for folder in folders:
            self.make_way(folder)
        return []

    def make_way(self, folder: str) -> None:
        parts = folder.split("/")
        for end in range(1, len(parts) + 1):
            self.delete("/".join(parts[:end]))

    def delete(self, name: str) -> None:
        with self._lock:
            self.files.pop(name, None)


class _MemoryHold:
    """A lease file of a MemoryBackend."""

    def __init__(self, backend: MemoryBackend, name: str) -> None:
        self._backend, self._name = backend, name

    def renew(self) -> None:
        """Do nothing: no other process reads the file."""

    def release(self) -> None:
        self._backend.delete(self._name)


class _MemoryWriter:
    """An unpublished file of a MemoryBackend."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self._data += data

    def publish(self, name: str) -> None:
        self._backend.publish(name, bytes(self._data))

    def abort(self) -> None:
        self._data.clear()


def memory_backends() -> Callable[[Path], Backend]:
    """Return a function that gives each folder one MemoryBackend, as `Repository.backend_at`."""
    backends: dict[Path, Backend] = {}
    return lambda folder: backends.setdefault(folder.absolute(), MemoryBackend())
