"""Cache the decoded weights of recent commits as raw files beside the store.

The next commit is encoded against them without decoding a chain. Each tensor is checked against its
hash before use; a wrong one is decoded from the chain. The folder may be deleted at any time.

    cache/bases/<id of the hash table>      the tensors of the table, one after another
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from ckptvcs.codec.frame import SLICE_WORDS, slice_size, slices_of
from ckptvcs.codec.words import Floats, Words, octets, word_type
from ckptvcs.decode.chain import DecodedTable
from ckptvcs.hashing import hasher
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.recipe import VALUE_BYTES
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.disk import free_bytes
from ckptvcs.store.ids import ObjectId

_KEPT = 2  # cached bases, for work on two branches in turn
_BLOCK = 1 << 22  # bytes
_SPARE = 4  # free disk space, over the size of a table, required to cache the table


class TableWriter(Protocol):
    """Keeps the decoded tensors of a hash table, whose id may be unknown until `finish`."""

    def write(self, tensor: int, number: int, words: Words, *, fresh: bool = True) -> None:
        """Put slice `number` of a tensor in its place; words that are not `fresh` may change."""

    def finish(self, values: ObjectId) -> None:
        """Declare the slices to be the tensors of a table."""

    def abort(self) -> None:
        """Discard the slices unless they were finished."""


def _starts(infos: Sequence[TensorInfo]) -> list[int]:
    """Return the offset of each tensor in a file, and the size of the file."""
    return [0, *np.cumsum([info.size_bytes for info in infos], dtype=np.int64).tolist()]


def has_room(folder: Path, size_bytes: int) -> bool:
    """Return whether the disk has room for a table and for what needs the disk more."""
    return free_bytes(folder) >= _SPARE * size_bytes


class BaseWriter(TableWriter):
    """Writes a cached base, from any thread.

    After a failure, if the disk is almost full, or if a slice is missing, no base is cached.
    """

    def __init__(self, folder: Path, infos: Sequence[TensorInfo], *, partial: bool = False) -> None:
        """A `partial` base may lack slices."""
        self._folder, self._partial = folder, partial
        self._written: dict[tuple[int, int], int] = {}
        self._starts = _starts(infos)
        self._temporary = folder / f".{os.urandom(8).hex()}"
        self._descriptor: int | None = None
        self._failed = False
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if not has_room(folder, self._starts[-1]):
                return
            self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, tensor: int, number: int, words: Words, *, fresh: bool = True) -> None:
        if self._descriptor is None or self._failed:
            return
        at = self._starts[tensor] + number * SLICE_WORDS * words.itemsize
        try:
            self._written[tensor, number] = os.pwrite(self._descriptor, octets(words), at)
        except OSError:
            self._failed = True

    @property
    def _is_whole(self) -> bool:
        return self._partial or sum(self._written.values()) == self._starts[-1]

    def finish(self, values: ObjectId) -> None:
        """Publish a complete base under the id of its hash table, and delete the oldest ones."""
        if self._descriptor is None or self._failed or not self._is_whole:
            return
        with contextlib.suppress(OSError):
            self._temporary.rename(self._folder / values)
            os.close(self._descriptor)
            self._descriptor = None
            kept = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
            kept.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in kept[_KEPT:]:
                path.unlink(missing_ok=True)

    def abort(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
                self._temporary.unlink(missing_ok=True)
            self._descriptor = None


class CachedTable(DecodedTable):
    """A cached base. Each tensor is verified before its first use.

    Callers that pass `out` must verify the tensor themselves.
    """

    def __init__(self, path: Path, infos: Sequence[TensorInfo], hashes: list[bytes]) -> None:
        self._path, self.infos, self._hashes = path, infos, hashes
        self._starts = _starts(infos)
        self._sound: dict[int, bool] = {}
        self._locks = [Lock() for _ in infos]

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        start = number * SLICE_WORDS * word
        if out is None:
            with self._locks[tensor]:
                if tensor not in self._sound:
                    self._sound[tensor] = self._verify(tensor)
            if not self._sound[tensor]:
                return None
            count = slice_size(self.infos[tensor].size_bytes // word, number)
            out = np.empty(count, word_type(word))
        with contextlib.suppress(OSError):  # another process may have deleted the file
            at = self._starts[tensor] + start
            if self._read(at, octets(out)) == out.nbytes:
                return out
        return None

    def is_sound(self) -> bool:
        """Return whether all tensors match their hashes."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return True  # deleted by another process
        return size == self._starts[-1] and all(map(self._verify, range(len(self.infos))))

    def exists(self) -> bool:
        """Return whether the file still exists."""
        return self._path.is_file()

    def discard(self) -> None:
        """Delete the cached file."""
        with contextlib.suppress(OSError):
            if self._path.is_dir() and not self._path.is_symlink():
                shutil.rmtree(self._path)
            else:
                self._path.unlink(missing_ok=True)

    def _read(self, at: int, into: memoryview) -> int:
        with self._path.open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [into], at)

    def _verify(self, tensor: int) -> bool:
        digest, start = hasher(), self._starts[tensor]
        end = start + self.infos[tensor].size_bytes
        with contextlib.suppress(OSError):
            block = memoryview(bytearray(min(_BLOCK, end - start)))
            for at in range(start, end, _BLOCK):
                digest.update(block[: self._read(at, block[: end - at])])
            return digest.digest(VALUE_BYTES) == self._hashes[tensor]
        return False


Put = Callable[[int, int, Words], None]
Room = contextlib.AbstractContextManager[Put | None]
"""Takes the slices of a table, by tensor position and slice number; or none."""


class RecentTables(dict[ObjectId, CachedTable]):
    """Recently decoded tables, in a temporary folder of the caller.

    With it, decoding a first-parent history from the oldest commit decodes each delta once.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    @contextlib.contextmanager
    def room(
        self, values: ObjectId, infos: list[TensorInfo], hashes: list[bytes]
    ) -> Iterator[Put | None]:
        """Yield what takes the slices of a table, which replaces the older table of its part.

        Yield None if the disk is almost full.
        """
        if not has_room(self._folder, _starts(infos)[-1]):
            yield None
            return
        folder = self._folder / infos[0].part
        writer = BaseWriter(folder, infos, partial=True)
        try:
            yield writer.write
            writer.finish(values)
        finally:
            writer.abort()
        self[values] = CachedTable(folder / values, infos, hashes)
        for name in [name for name, table in self.items() if not table.exists()]:
            del self[name]


class MemoryBase(TableWriter):
    """The decoded weights of the newest commit of this process, in memory: name -> slices.

    The next commit replaces each slice after encoding against it. `values` is None meanwhile.
    """

    def __init__(self) -> None:
        self.values: ObjectId | None = None
        self.errors: dict[str, Floats] = {}  # samples of the errors of these weights
        self.tensors: dict[str, list[Words | None]] = {}
        self.hashes: dict[str, bytes] = {}
        self._infos: Sequence[TensorInfo] = ()

    def begin(self, infos: Sequence[TensorInfo]) -> None:
        """Begin to replace the weights by those of the next commit."""
        self._infos, self.values = infos, None
        names = {info.name for info in infos}
        for name in self.tensors.keys() - names:
            del self.tensors[name]

    def write(self, tensor: int, number: int, words: Words, *, fresh: bool = True) -> None:
        info = self._infos[tensor]
        count = len(slices_of(info.words))
        slices = self.tensors.get(info.name)
        if slices is None or len(slices) != count:
            slices = self.tensors[info.name] = [None] * count
        slices[number] = words if fresh else words.copy()

    def finish(self, values: ObjectId) -> None:
        self.values = values

    def abort(self) -> None:
        if self.values is None:
            self.tensors.clear()

    def keep(self, hashes: dict[str, bytes]) -> None:
        """Keep the weights of a shard, whose hash table will have an id once all shards join."""
        self.hashes, self.values = hashes, ObjectId("")

    def adopt(self, values: ObjectId, hashes: Mapping[str, bytes]) -> None:
        """Keep only the tensors whose hashes match this table."""
        for name in [*self.tensors]:
            if self.hashes.get(name, b"") != hashes.get(name):
                del self.tensors[name]
        self.values = values


class MemoryTable(DecodedTable):
    """The tensors of a `MemoryBase`, for the commit that replaces them.

    Other readers pass the `expected` table, because a commit in another thread may replace it.
    """

    def __init__(
        self, memory: MemoryBase, infos: Sequence[TensorInfo], expected: ObjectId | None = None
    ) -> None:
        self._memory, self._infos, self._expected = memory, infos, expected

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        info = self._infos[tensor]
        slices = self._memory.tensors.get(info.name)
        words = slices[number] if slices is not None and number < len(slices) else None
        if words is None or word != info.type.word or words.itemsize != word:
            return None
        # A writer clears `values` before it replaces a slice: compare after reading the slice.
        if self._expected is not None and self._memory.values != self._expected:
            return None
        return words if words.size == slice_size(info.words, number) else None


def find_decoded(
    catalog: Catalog,
    folder: Path,
    memory: MemoryBase | None,
    values: ObjectId,
    infos: Sequence[TensorInfo],
    *,
    change: bool = False,
) -> DecodedTable | None:
    """Return the decoded tensors of a hash table from memory or the cache, if either has them.

    Set `change` in the commit that replaces the weights in memory, to read them meanwhile.

    Raises:
        CorruptionError: the table has another number of tensors.
    """
    hashes = catalog.all_values(values, len(infos))
    if memory is not None and memory.values == values:
        return MemoryTable(memory, infos, None if change else values)
    path = folder / values
    return CachedTable(path, infos, hashes) if path.is_file() else None


def open_writer(
    folder: Path, memory: MemoryBase | None, infos: Sequence[TensorInfo]
) -> TableWriter:
    """Return the writer of the next base: in `memory` if that is given, else in the cache."""
    if memory is None:
        return BaseWriter(folder, infos)
    memory.begin(infos)
    return memory
