"""A backend that counts the calls to another one, and fails where a test wants it to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from ckptvcs.errors import StorageError
from ckptvcs.store.backend import Backend, Hold, Trace, Writer


class InstrumentedBackend:
    """Pass each call on to `inner` after counting it.

    `calls` counts calls by method, `read_bytes` and `written_bytes` what they transfer.  Set
    `fails` to a method's name to make each further call of it raise StorageError.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()
        self.read_bytes = self.written_bytes = 0
        self.fails: str | None = None

    def __str__(self) -> str:
        return str(self.inner)

    def count(self, method: str) -> None:
        self.calls[method] += 1
        if self.fails == method:
            raise StorageError(f"injected failure of {method}")

    def names(self, folder: str) -> Iterator[str]:
        self.count("names")
        return self.inner.names(folder)

    def size(self, name: str) -> int:
        self.count("size")
        return self.inner.size(name)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.count("read")
        data = self.inner.read(name, offset, length)
        self.read_bytes += len(data)
        return data

    def writer(self) -> Writer:
        self.count("writer")
        return _InstrumentedWriter(self, self.inner.writer())

    def hold(self, name: str, describe: Callable[[Trace], bytes]) -> Hold:
        self.count("hold")
        return self.inner.hold(name, describe)

    def look(self, name: str, limit: int) -> tuple[bytes, Trace]:
        self.count("look")
        return self.inner.look(name, limit)

    def clock_ns(self) -> int:
        return self.inner.clock_ns()

    def settle(self, names: Iterable[str]) -> None:
        self.count("settle")
        self.inner.settle(names)

    def settle_seen(self) -> None:
        self.count("settle_seen")
        self.inner.settle_seen()

    def replace(self, name: str, data: bytes) -> None:
        self.count("replace")
        self.inner.replace(name, data)

    def cache(self, name: str, data: bytes) -> None:
        self.count("cache")
        self.inner.cache(name, data)

    def make_folders(self, folders: Iterable[str]) -> list[str]:
        self.count("make_folders")
        return self.inner.make_folders(folders)

    def make_way(self, folder: str) -> None:
        self.count("make_way")
        self.inner.make_way(folder)

    def delete(self, name: str) -> None:
        self.count("delete")
        self.inner.delete(name)


class _InstrumentedWriter:
    """A writer whose calls its backend counts."""

    def __init__(self, backend: InstrumentedBackend, inner: Writer) -> None:
        self._backend, self._inner = backend, inner

    def write(self, data: bytes | memoryview) -> None:
        self._backend.count("write")
        self._inner.write(data)
        self._backend.written_bytes += len(data)

    def publish(self, name: str) -> None:
        self._backend.count("publish")
        self._inner.publish(name)

    def abort(self) -> None:
        self._inner.abort()
