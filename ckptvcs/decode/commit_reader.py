"""Restore the files, one part or the Python state of a commit.

Files are assembled from their templates (skeletons) and decoded tensors. Each tensor is checked
against its hash, each exact file against its own. `file_writer.py` then writes them by name.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ckptvcs.checkpoint import safetensors, torch_legacy, torch_zip
from ckptvcs.checkpoint.forms import near_tensors
from ckptvcs.checkpoint.layout import Layout
from ckptvcs.checkpoint.skeleton import SkeletonSource
from ckptvcs.codec import kernels
from ckptvcs.codec.frame import SLICE_WORDS, slices_of
from ckptvcs.codec.words import Bytes, Words, octets, word_type
from ckptvcs.decode.base_cache import BaseWriter, CachedTable, MemoryBase, find_decoded
from ckptvcs.decode.chain import ChainReader, DecodedTable, DecodedTables, Link
from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.files.names import safe_path as safe_path
from ckptvcs.hashing import Hasher, hasher
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit, FileEntry
from ckptvcs.history.schema import BIG, UNKNOWN, Op, Skeleton, TensorInfo
from ckptvcs.parallel import Progress, ordered_map
from ckptvcs.store.disk import free_bytes
from ckptvcs.store.ids import ObjectId

_DROPPED = "'ckpt log --all' lists it, 'ckpt reflog' says by which rule"
_DEEP = 2  # chain depth from which decoded weights are cached


class _RetypedError(CorruptionError):
    """Returned slices were wrong; another attempt will use the inferred element types."""


def in_our_order(words: Words, info: TensorInfo) -> Words:
    """Return the words of a tensor, little-endian.

    Raises:
        InvalidInputError: the byte order is unknown.
    """
    if info.order == UNKNOWN:
        raise InvalidInputError(
            f"{info.name} is of a big-endian machine, and its file does not say how it is stored",
            hint="use 'ckpt checkout' to restore the file",
        )
    return words.byteswap() if info.order == BIG else words


@dataclass(frozen=True)
class _Job:
    """One slice to decode."""

    number: int
    slice: int
    is_last: bool


class Restorer:
    """Reads one commit.

    `near` ignores exact patches. `cache` and `memory` may have the decoded weights of the commit;
    `decoded` replaces both with other decoded tensors.
    """

    def __init__(
        self,
        catalog: Catalog,
        name: ObjectId,
        *,
        near: bool = False,
        cache: Path | None = None,
        memory: MemoryBase | None = None,
        decoded: DecodedTables | None = None,
    ) -> None:
        self.name = name
        self.commit: Commit = catalog.commit(name)
        self.schema = catalog.schema(self.commit.schema)
        kernels.prepare(self.commit.raw_bytes)
        self._decoded: dict[ObjectId, DecodedTable | None] = {}
        self._catalog, self._cache = catalog, cache
        self._chain = ChainReader(catalog, decoded or self._decoded.get)
        self.fidelity: dict[str, str] = {}
        self._tables: dict[int, tuple[ObjectId, int]] = {}
        dropped = catalog.dropped()
        if name in dropped.commits:
            raise NotFoundError(f"commit {name[:8]} was dropped", hint=_DROPPED)
        for part, state in self.commit.parts.items():
            if part in dropped.parts.get(name, ()):
                self.fidelity[part] = "dropped"
                continue
            table = state.values
            self.fidelity[part] = state.fidelity
            if state.exact is not None and not near and catalog.has_recipe(state.exact):
                table, self.fidelity[part] = state.exact, "exact"
            for position, number in enumerate(self.schema.stored(part)):
                self._tables[number] = (table, position)
            if part == "model" and cache is not None:
                infos = [self.schema.tensors[number] for number in self.schema.stored(part)]
                self._decoded[state.values] = find_decoded(
                    catalog, cache, memory, state.values, infos
                )

    @property
    def exact(self) -> bool:
        """Return whether the files are restored bit for bit."""
        return all(form == "exact" for form in self.fidelity.values())

    def near(self) -> set[int]:
        """Return the stored tensors that are restored near; see `near_tensors`."""
        return near_tensors(self._catalog, self.name, self.fidelity)

    # -- tensors -------------------------------------------------------------------------------

    @property
    def chain(self) -> ChainReader:
        """The reader of delta chains."""
        return self._chain

    def links(self, number: int) -> list[Link]:
        """Return the frames of a stored tensor.  Raises NotFoundError, CorruptionError."""
        info = self.schema.tensors[number]
        self._chain.require_slices(*self.place(number), info)
        return self._chain.links(*self.place(number), info)

    def has_hash(self, number: int, digest: Hasher) -> bool:
        """Return whether a stored tensor has this hash."""
        return digest.digest() == self._catalog.value(*self.place(number))

    def place(self, number: int) -> tuple[ObjectId, int]:
        """Return the hash table of a stored tensor, and its position there.

        Raises:
            NotFoundError: the part was dropped.
        """
        if number not in self._tables:
            part = self.schema.tensors[number].part
            raise NotFoundError(
                f"the {part} part of commit {self.name[:8]} was dropped",
                hint="select another part with --only",
            )
        return self._tables[number]

    def _jobs(self, numbers: list[int]) -> Iterator[_Job]:
        for number in numbers:
            self._chain.require_slices(*self.place(number), self.schema.tensors[number])
            slices = slices_of(self.schema.tensors[number].words)
            for index in slices:
                yield _Job(number, index, index + 1 == len(slices))

    def read_slices(
        self, numbers: list[int], room: Callable[[_Job], Words | None] = lambda _: None
    ) -> Generator[tuple[_Job, Words], None, None]:
        """Yield the slices of stored tensors in order, decoded ahead in threads.

        `room` returns the array to decode a slice into, or None for a new one. The last slice of a
        tensor comes after the whole tensor was checked against its hash.
        """
        base = self._new_base(numbers)

        def decode(job: _Job) -> tuple[_Job, Words]:
            info = self.schema.tensors[job.number]
            try:
                return decode_as_known(job, info)
            except CorruptionError:
                if not self._chain.heal(*self.place(job.number), info):
                    raise
                return decode_as_known(job, info)

        def decode_as_known(job: _Job, info: TensorInfo) -> tuple[_Job, Words]:
            chain, out = self._chain, room(job)
            table, position = self.place(job.number)
            links = chain.links(table, position, info)
            if base is None or info.part != "model":
                return job, chain.decode_slice(links, info, job.slice, out)
            if table == self.commit.parts["model"].values:
                words = chain.decode_slice(links, info, job.slice, out)
                base.write(position, job.slice, words)
                return job, words
            below, patched = self._below_patch(links, position, info)
            near = chain.decode_slice(below, info, job.slice)
            base.write(position, job.slice, near)
            if patched:
                return job, chain.apply(links[-1], job.slice, near, out)
            return job, chain.decode_slice(links, info, job.slice, out)

        def words_of(job: _Job) -> int:
            return self.schema.tensors[job.number].words

        digest = hasher()
        try:
            for job, words in ordered_map(decode, self._jobs(numbers), words_of):
                digest.update(octets(words))
                if job.is_last:
                    if not self.has_hash(job.number, digest):
                        self._decode_again(job.number, room)
                    digest = hasher()
                yield job, words
            if base is not None:
                base.finish(self.commit.parts["model"].values)
        finally:
            if base is not None:
                base.abort()

    def _below_patch(
        self, links: list[Link], position: int, info: TensorInfo
    ) -> tuple[list[Link], bool]:
        """Return the chain of the near form of a weight, and whether `links` ends in a patch on it.

        Otherwise the exact form is a frame that another tensor with the same values shares.
        """
        near = self.commit.parts["model"].values
        if links[-1].frame.base == (near, position) and links[-1].type.word == info.type.word:
            return links[:-1], True
        return self._chain.links(near, position, info), False

    def _new_base(self, numbers: list[int]) -> BaseWriter | None:
        """Return a writer that caches the weights, if all are decoded and their chain is deep.

        A restored commit is often restored again, or used as a parent.
        """
        model = self.schema.stored("model")
        state = self.commit.parts.get("model")
        if (
            self._cache is None
            or state is None
            or self._decoded.get(state.values) is not None
            or self.commit.depth < _DEEP
            or not set(model) <= set(numbers)
        ):
            return None
        infos = [self.schema.tensors[number] for number in model]
        try:
            free = free_bytes(self._cache.parent.parent)
        except OSError:
            return None
        # The restored files may need the same disk.
        return BaseWriter(self._cache, infos) if free > 4 * self.commit.raw_bytes else None

    def inline(self) -> dict[int, bytes]:
        """Return the bytes of the small tensors, which are stored in file templates."""
        return {
            argument: bytes(data)
            for file in self.commit.files
            if file.skeleton is not None
            for op, argument, data in self._skeleton(file).walk(self.schema)
            if op == Op.INLINE
        }

    def tensors(self, numbers: list[int]) -> Iterator[tuple[int, Bytes]]:
        """Yield the number and all bytes of each stored tensor, verified."""
        infos = self.schema.tensors
        for number in numbers:
            self._chain.require_slices(*self.place(number), infos[number])
        try:
            outs = {n: np.empty(infos[n].words, word_type(infos[n].type.word)) for n in numbers}
        except MemoryError as error:
            raise InvalidInputError(
                "not enough memory for these tensors",
                hint="use 'ckpt checkout', which decodes slice by slice",
            ) from error

        def room(job: _Job) -> Words:
            return outs[job.number][job.slice * SLICE_WORDS :][:SLICE_WORDS]

        for job, _ in self.read_slices([n for n in numbers if infos[n].words], room):
            if job.is_last:
                yield job.number, outs.pop(job.number).view(np.uint8)
        for number in numbers:
            if not self.schema.tensors[number].words:
                yield number, np.empty(0, np.uint8)

    def _decode_again(self, number: int, room: Callable[[_Job], Words | None]) -> None:
        """Decode a tensor from its keyframe: a cached base may be wrong.

        Raises:
            CorruptionError: the chain is damaged, or wrong slices were returned already.
        """
        digest, chain = hasher(), ChainReader(self._catalog)
        info, place = self.schema.tensors[number], self.place(number)
        cached = self._decoded.pop(place[0], None)
        if isinstance(cached, CachedTable):
            cached.discard()
        for job in self._jobs([number]):
            out = room(job)
            if out is None:
                break
            if job.slice == 0:
                chain.heal(*place, info)
            links = chain.links(*place, info)
            digest.update(octets(chain.decode_slice(links, info, job.slice, out)))
        if not self.has_hash(number, digest):
            wrong = f"{info.name} does not decode to its recorded hash"
            if self._chain.heal(*place, info):
                raise _RetypedError(wrong)
            raise CorruptionError(wrong)

    def tensor(self, number: int) -> Bytes:
        """Return all bytes of a stored tensor, verified."""
        return next(self.tensors([number]))[1]

    def blocks(self, number: int) -> Iterator[memoryview]:
        """Yield the bytes of a stored tensor, slice after slice."""
        return (octets(words) for _, words in self.read_slices([number]))

    # -- files ---------------------------------------------------------------------------------

    def _skeleton(self, file: FileEntry) -> Skeleton:
        if file.skeleton is None:
            raise CorruptionError(f"{file.path} has no content")
        return self._catalog.skeleton(file.skeleton)

    def write_file(
        self, file: FileEntry, write: Callable[[bytes | memoryview], object], progress: Progress
    ) -> str:
        """Write the bytes of a file in order; return their BLAKE3 hash (hex).

        Raises:
            CorruptionError: a tensor or an exact file does not have its hash.
        """
        digest = hasher()

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            write(data)
            progress(len(data))

        segments = list(self._skeleton(file).walk(self.schema))
        tensors = [argument for op, argument, _ in segments if op == Op.TENSOR]
        sums: dict[int, int] = {}
        with contextlib.closing(self.read_slices(tensors)) as stream:
            for op, argument, data in segments:
                if op == Op.TENSOR:
                    crc = 0
                    for _ in slices_of(self.schema.tensors[argument].words):
                        block = octets(next(stream)[1])
                        crc = zlib.crc32(block, crc)
                        put(block)
                    sums[argument] = crc
                elif op == Op.CRC32:
                    if argument not in sums:  # the checksum is before its tensor in the file
                        sums[argument] = zlib.crc32(self.tensor(argument).data)
                    put(sums[argument].to_bytes(4, "little"))
                else:
                    put(data)
            for _ in stream:
                raise CorruptionError(f"{file.path} is damaged: unexpected tensors")
        if self.exact and file.hash is not None and digest.hexdigest() != file.hash:
            raise CorruptionError(f"{file.path} does not match its committed hash")
        return digest.hexdigest()

    def digest(self, file: FileEntry) -> str:
        """Return the BLAKE3 hash (hex) of a restored file, verified without writing it."""
        while True:
            with contextlib.suppress(_RetypedError):
                return self.write_file(file, lambda _: None, lambda _: None)

    def write_whole(self, file: FileEntry, out: BinaryIO, progress: Progress) -> str:
        """Write the bytes of a file into an empty one; return their BLAKE3 hash (hex).

        Start again if element types were inferred after wrong slices were written.
        """
        while True:
            with contextlib.suppress(_RetypedError):
                return self.write_file(file, out.write, progress)
            out.seek(0)
            out.truncate()

    # -- structure -----------------------------------------------------------------------------

    def mentions(self, file: FileEntry, text: str) -> bool:
        """Return whether the bytes of a file outside of its tensors contain a text."""
        return text.encode() in bytes(self._skeleton(file).literals)

    def layout(self, file: FileEntry) -> tuple[Layout, list[int]]:
        """Parse a file without decoding its tensors; return its layout and tensor numbers."""
        source = SkeletonSource(self.schema, self._skeleton(file), self.tensor)
        parse = {
            "torch-zip": lambda s: torch_zip.parse(s, checksums=torch_zip.Checksums.LITERAL),
            "torch-legacy": torch_legacy.parse,
            "safetensors": safetensors.parse,
        }.get(file.format)
        layout = (parse(source) if parse else None) or Layout("raw", [])
        numbers = [source.owner(found.offset, found.size) for found in layout.tensors]
        return layout, numbers
