"""Materialised bases: the decoded weights of recent commits, raw, beside the store.

The next commit is coded against them without walking a chain.  They are a cache: each tensor is
checked against its hash before it is used, a wrong one is decoded from the chain instead, and the
folder may be deleted at any time.

    cache/bases/<id of the table of values>      the tensors of the table, one after another
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from blake3 import blake3

from ckptvcs.chain import ChainReader
from ckptvcs.codec.frame import SLICE_WORDS, slice_counts
from ckptvcs.codec.words import Words, octets, word_type
from ckptvcs.history.recipe import VALUE_BYTES
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.object import ObjectId

_KEPT = 2  # heads of two branches in turn
_BLOCK = 1 << 22


class BaseWriter:
    """Writes the tensors of a table whose id is not known yet.

    A failure (a full disk, say) only means that there is no materialised base.
    """

    def __init__(self, folder: Path, sizes: list[int]) -> None:
        self._folder = folder
        self._starts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
        self._temporary = folder / f".{secrets.token_hex(8)}"
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, tensor: int, number: int, words: Words) -> None:
        """Put slice `number` of a tensor in its place."""
        if self._descriptor is None:
            return
        at = self._starts[tensor] + number * SLICE_WORDS * words.itemsize
        try:
            os.pwrite(self._descriptor, octets(words), at)
        except OSError:
            self.abort()

    def finish(self, values: ObjectId) -> None:
        """Publish under its table's id, and forget bases that are no longer near any head."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self._temporary.rename(self._folder / values)
            os.close(self._descriptor)
            self._descriptor = None
            kept = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
            kept.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in kept[_KEPT:]:
                path.unlink(missing_ok=True)
        self.abort()

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
                self._temporary.unlink(missing_ok=True)
            self._descriptor = None


class BaseTensor:
    """The decoded tensor that another is coded against, read slice by slice.

    `prove` must come before the first slice is built upon.
    """

    def __init__(
        self, chain: ChainReader, values: ObjectId, tensor: int, info: TensorInfo,
        held: Words | None, cached: tuple[Path, int, bytes] | None,
    ) -> None:  # fmt: skip
        self.values, self.tensor, self.info = values, tensor, info
        self._chain, self._held, self._cached = chain, held, cached
        self._links = chain.links(values, tensor)

    def prove(self) -> None:
        """Check the hash: of what the cache has, or else of what the chain decodes to.

        Raises:
            CorruptionError: the chain does not decode to what is recorded.
        """
        if self._held is not None:
            return
        if self._cached is None or not _proven(self._cached, self.info.size_bytes):
            self._cached = None
            for _ in self._chain.slices(self.values, self.tensor, self.info):
                pass

    @property
    def depth(self) -> int:
        """How many frames lie below this tensor's own."""
        return self._links[-1].frame.depth

    def slice(self, number: int) -> Words:
        """The words of one slice."""
        count = slice_counts(self.info.words)[number]
        if self._held is not None:
            return self._held[number * SLICE_WORDS : number * SLICE_WORDS + count]
        if self._cached is None:
            return self._chain.decode_slice(self._links, self.info, number, count)
        path, start, _ = self._cached
        word = self.info.type.word
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), count * word, start + number * SLICE_WORDS * word)
        return np.frombuffer(data, word_type(word))


def _proven(cached: tuple[Path, int, bytes], size: int) -> bool:
    path, start, expected = cached
    digest = blake3(max_threads=1)
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        for at in range(start, start + size, _BLOCK):
            digest.update(os.pread(file.fileno(), min(_BLOCK, start + size - at), at))
        return digest.digest(VALUE_BYTES) == expected
    return False


class HeldBase:
    """The decoded weights of the newest commit of a process, in memory, by name.

    A commit changes them slice by slice, each after it was built upon; until it is done they are
    those of no commit.
    """

    def __init__(self) -> None:
        self.values: ObjectId | None = None
        self.tensors: dict[str, Words] = {}

    def writer(self, infos: list[TensorInfo]) -> HeldWriter:
        """Where the next commit's decoded weights go."""
        return HeldWriter(self, infos)


class HeldWriter:
    """Changes a `HeldBase`; what a `BaseWriter` is to the cache."""

    def __init__(self, held: HeldBase, infos: list[TensorInfo]) -> None:
        self._held, self._infos = held, infos
        held.values = None
        wanted = {info.name: (info.words, info.type.word) for info in infos}
        for name, words in [*held.tensors.items()]:
            if wanted.get(name) != (words.size, words.itemsize):
                del held.tensors[name]

    def write(self, tensor: int, number: int, words: Words) -> None:
        """Put slice `number` of a tensor in its place."""
        info = self._infos[tensor]
        if info.name not in self._held.tensors:
            self._held.tensors[info.name] = np.empty(info.words, words.dtype)
        at = number * SLICE_WORDS
        self._held.tensors[info.name][at : at + words.size] = words

    def finish(self, values: ObjectId) -> None:
        """They are the decoded values of a table from here on."""
        self._held.values = values

    def abort(self) -> None:
        """What was begun and not finished is of no use."""
        if self._held.values is None:
            self._held.tensors.clear()


class Bases:
    """The tensors of one table of values as bases: held in memory, cached, or decoded."""

    def __init__(
        self, chain: ChainReader, folder: Path, held: HeldBase | None, values: ObjectId,
        infos: list[TensorInfo], hashes: list[bytes],
    ) -> None:  # fmt: skip
        self._chain, self.values, self._infos, self._hashes = chain, values, infos, hashes
        self._held = held.tensors if held is not None and held.values == values else {}
        self._path = folder / values
        self._starts = [0, *np.cumsum([i.size_bytes for i in infos], dtype=np.int64).tolist()]
        self._there = self._path.is_file()

    def tensor(self, position: int) -> BaseTensor:
        """One tensor, not yet proven."""
        info, cached = self._infos[position], None
        if self._there:
            cached = (self._path, self._starts[position], self._hashes[position])
        held = self._held.get(info.name)
        return BaseTensor(self._chain, self.values, position, info, held, cached)


def cached_files(folder: Path) -> Iterator[Path]:
    """Every file of the cache."""
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_file())
