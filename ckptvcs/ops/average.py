"""Average: the mean of the weights of several commits, in the files of the newest of them.

Sums are in float64, commit after commit in the order of the line, so the result depends on nothing
but the commits; each mean is rounded once more to the type of the weight (twice for bfloat16, by
way of float32).  Everything that is no float weight is the newest commit's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ckptvcs.checkpoint import torch_zip
from ckptvcs.checkpoint.matching import alike
from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.checkpoint.skeleton import SkeletonSource
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.words import Words, from_float32, to_float32, word_type
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.decode.part_reader import Bytes, PartReader, Window, windows
from ckptvcs.decode.trajectory import Trajectory
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.files.targets import Target, Targets, looked
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import FileEntry
from ckptvcs.history.log import Bound
from ckptvcs.history.schema import Op, Schema, Skeleton
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

_AVERAGED = frozenset({"F64", "F32", "F16", "BF16"})

_Literal = tuple[int, int, int]
"""A run of literal bytes: its start and end in the file, and its start in the template."""


def _weights(schema: Schema) -> dict[str, int]:
    """The float weights of a schema, by name."""
    return {
        info.name: number
        for number, info in enumerate(schema.tensors)
        if info.role == WEIGHT and info.dtype in _AVERAGED
    }


def _values(words: Words, dtype: str) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    return words.view(np.float64) if dtype == "F64" else to_float32(words, dtype)


def _rounded(values: np.ndarray[Any, np.dtype[np.float64]], dtype: str) -> Bytes:
    if dtype == "F64":
        return values.view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "F16":  # by way of float32 some would be rounded twice
            return values.astype(np.float16).view(np.uint8)
        single = values.astype(np.float32)
    words = from_float32(single, dtype)
    if dtype == "BF16":  # the carry of rounding would turn some NaN into zero
        wild = ~np.isfinite(single)
        bits = single.view(np.uint32)[wild] >> np.uint32(16)
        words[wild] = (bits | (np.isnan(single[wild]) << np.uint32(6))).astype(np.uint16)
    return words.view(np.uint8)


def mean_weights(
    catalog: Catalog, names: Sequence[ObjectId], progress: Progress
) -> dict[int, Bytes]:
    """The mean of each float weight over some commits: its bytes, by its number in the schema of
    the last of them.

    Raises:
        InvalidInputError: a weight is not in all of them, in the same shape and type.
    """
    last = catalog.schema(catalog.commit(names[-1]).schema)
    wanted = _weights(last)
    sums = {name: np.zeros(last.tensors[n].words, np.float64) for name, n in wanted.items()}

    @cache
    def numbers_in(schema: ObjectId) -> dict[str, int]:
        """The weights of another schema, by the names that they have in the last one."""
        numbers = _weights(catalog.schema(schema))
        return {new: numbers[old] for new, old in alike(list(numbers), list(wanted)).items()}

    def choose(schema: ObjectId) -> Mapping[str, Window]:
        found = windows(catalog.schema(schema))
        infos = catalog.schema(schema).tensors
        return {
            name: (number, found[infos[number].name][1])
            for name, number in numbers_in(schema).items()
        }

    for name, reader in Trajectory(catalog, choose).readers(names):
        infos, numbers = reader.schema.tensors, numbers_in(catalog.commit(name).schema)
        for weight, total in sums.items():
            info, number = last.tensors[wanted[weight]], numbers.get(weight)
            here = None if number is None else infos[number]
            kind = None if here is None else (here.dtype, here.shape)
            if number is None or kind != (info.dtype, info.shape):
                raise InvalidInputError(
                    f"{weight} is not the same kind of tensor in commit {name[:8]}",
                    hint="average commits of one architecture",
                )
            words = reader.raw(number).view(word_type(info.type.word))
            for at in range(0, total.size, SLICE_WORDS):
                total[at : at + SLICE_WORDS] += _values(words[at : at + SLICE_WORDS], info.dtype)
        progress(catalog.commit(name).raw_bytes)
    means = {}
    for weight, number in wanted.items():
        total = sums.pop(weight)
        total /= len(names)
        means[number] = _rounded(total, last.tensors[number].dtype)
    return means


class Averaged(Restorer):
    """Reads a commit with other tensors in the place of some: bytes by numbers in its schema."""

    def __init__(self, catalog: Catalog, name: ObjectId, tensors: Mapping[int, Bytes]) -> None:
        super().__init__(catalog, name)
        self._others = tensors

    @property
    def exact(self) -> bool:
        return False

    def read_slices(
        self, numbers: list[int], room: Callable[[Any], Words | None] = lambda _: None
    ) -> Generator[tuple[Any, Words], None, None]:
        for other, run in groupby(numbers, self._others.__contains__):
            if not other:
                yield from super().read_slices(list(run), room)
                continue
            for job in self._jobs(list(run)):
                word = self.schema.tensors[job.number].type.word
                words = self._others[job.number].view(word_type(word))
                words, out = words[job.slice * SLICE_WORDS :][: job.count], room(job)
                if out is not None:
                    out[:] = words
                yield job, words

    def _skeleton(self, file: FileEntry) -> Skeleton:
        """Return the file template with the new values of small tensors, and their checksums."""
        skeleton = super()._skeleton(file)
        literals = bytearray(skeleton.literals)
        ranges: list[_Literal] = []
        changed: dict[int, int] = {}  # the old CRC-32 of each small tensor with new values
        at = offset = 0
        for op, argument, data in skeleton.walk(self.schema):
            if op == Op.INLINE and argument in self._others:
                literals[at : at + len(data)] = self._others[argument].tobytes()
                changed[argument] = zlib.crc32(data)
            ranges.append((offset, offset + len(data), at))
            at += len(data)
            tensor = self.schema.tensors[argument].size_bytes if op == Op.TENSOR else 0
            offset += 4 if op == Op.CRC32 else max(tensor, len(data))
        if changed and file.format == "torch-zip":
            for offset, crc in self._new_checksums(skeleton, changed):
                for start, end, literal in ranges:
                    if start <= offset and offset + 4 <= end:
                        at = literal + offset - start
                        literals[at : at + 4] = crc
        return replace(skeleton, literals=memoryview(bytes(literals)))

    def _new_checksums(
        self, skeleton: Skeleton, changed: Mapping[int, int]
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the file offset and the new bytes of the CRC-32 of each changed small tensor."""
        source = SkeletonSource(self.schema, skeleton, self.tensor)
        layout = torch_zip.parse(source, checksums=torch_zip.Checksums.SMALL)
        if layout is None:
            return
        for mark in layout.checksums:
            view = layout.tensors[mark.tensor]
            number = source.owner(view.offset, view.size)
            if number not in changed:
                continue
            if source.read(mark.offset, 4) == changed[number].to_bytes(4, "little"):
                crc = zlib.crc32(self._others[number].tobytes())
                yield mark.offset, crc.to_bytes(4, "little")


def average(
    repository: Repository,
    start: Bound,
    stop: Bound,
    path: Path,
    *,
    every: int | None = None,
    force: bool = False,
    progress: Progress = quiet,
) -> list[ObjectId]:
    """Write the mean of the weights of a line of commits; see `Repo.average`."""
    names = repository.history.line(start, stop, every)
    if not names:
        raise NotFoundError("no commit lies between these", hint="'ckpt log' lists them")
    with Targets() as looks:
        write_average(
            repository.catalog, names, looks.free(path, force=force), progress, force=force
        )
    return names


def write_average(
    catalog: Catalog,
    names: Sequence[ObjectId],
    target: Path | Target,
    progress: Progress,
    *,
    force: bool = False,
) -> None:
    """Write the mean of some commits as `PartReader.export` writes the last of them.

    Raises:
        NotFoundError: there are no commits.
        InvalidInputError: a weight is not in all of them, in the same shape and type.
        ConflictError: as `PartReader.export`; the look at the target comes first.
    """
    with looked(target) as at:
        newest = Averaged(catalog, names[-1], mean_weights(catalog, names, progress))
        PartReader(newest).export(at, None, lambda _: None, force=force)
