"""Average: write the files of the newest of several commits with the mean of their weights.

Sums are float64 and follow the order of the commits, so the result depends only on the commits.
Each mean is rounded once to the type of the weight (twice for bfloat16, through float32).  Only
float weights are averaged; everything else comes from the newest commit.

A weighted mean of the checkpoints of a run with a constant learning rate does what a decay of the
learning rate would have done.  Each update since the first checkpoint counts with the sum of the
weights of the checkpoints that contain it; this sum follows the decay (WSM, arXiv 2507.17634).
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
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
from ckptvcs.codec.words import Bytes, Words, from_float32, to_float32, word_type
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.decode.part_reader import PartReader, Window, windows
from ckptvcs.decode.trajectory import Trajectory
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.files.targets import Targets
from ckptvcs.gc.retention import Best
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import FileEntry
from ckptvcs.history.log import LogEntry
from ckptvcs.history.schema import Op, Schema, Skeleton
from ckptvcs.ops.export import suffix_fits
from ckptvcs.parallel import Progress
from ckptvcs.store.ids import ObjectId
from ckptvcs.text import counted

_AVERAGED = frozenset({"F64", "F32", "F16", "BF16"})

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "inverse-sqrt": lambda x: 1 - math.sqrt(x),
}
"""The learning rate, over that before the decay, at a share x of the decay."""


def decay_weights(like: str, count: int) -> list[float]:
    """Return the weights of checkpoints; see `Repo.decay_weights`."""
    rate = _DECAYS.get(like)
    if rate is None:
        raise InvalidInputError(f"unknown decay '{like}'", hint=f"use one of {', '.join(_DECAYS)}")
    rates = [*(rate(number / count) for number in range(count)), 0.0]
    return [before - after for before, after in itertools.pairwise(rates)]


def factors(count: int, weights: Sequence[float] | None, like: str | None) -> list[float] | None:
    """Return the weights of `count` commits, whose sum is 1; None weighs all alike.

    Raises:
        InvalidInputError: The weights have no mean, are not `count`, or are given in both ways.
    """
    if like is not None:
        if weights is not None:
            raise InvalidInputError("weights and a decay exclude each other", hint="give only one")
        return None if like == "linear" else decay_weights(like, count)
    if weights is None:
        return None
    if len(weights) != count:
        raise InvalidInputError(
            f"{counted(len(weights), 'weight')} for {counted(count, 'commit')}",
            hint="give a weight for each commit, oldest first",
        )
    total = math.fsum(weights)
    if not all(map(math.isfinite, (*weights, total))) or not total > 0:
        raise InvalidInputError(
            "the weights have no positive sum", hint="write for example --weights 1,2,3"
        )
    return [weight / total for weight in weights]


def _weights(schema: Schema) -> dict[str, int]:
    """Return the numbers of the float weights of a schema, by name."""
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
        if dtype == "F16":  # through float32, some values would be rounded twice
            return values.astype(np.float16).view(np.uint8)
        single = values.astype(np.float32)
    words = from_float32(single, dtype)
    if dtype == "BF16":  # rounding would carry some NaN over to zero
        nonfinite = ~np.isfinite(single)
        bits = single.view(np.uint32)[nonfinite] >> np.uint32(16)
        words[nonfinite] = (bits | (np.isnan(single[nonfinite]) << np.uint32(6))).astype(np.uint16)
    return words.view(np.uint8)


def mean_weights(
    catalog: Catalog, names: Sequence[ObjectId], factors: Sequence[float] | None, progress: Progress
) -> dict[int, Bytes]:
    """Return the bytes of the mean of each float weight, by number in the last commit's schema.

    `factors` are the weights of the commits, whose sum is 1; None weighs all alike.
    """
    last = catalog.schema(catalog.commit(names[-1]).schema)
    wanted = _weights(last)
    sums = {name: np.zeros(last.tensors[n].words, np.float64) for name, n in wanted.items()}

    @cache
    def numbers_in(schema: ObjectId) -> dict[str, int]:
        """Return the numbers of the weights of a schema, by their names in the last schema."""
        numbers = _weights(catalog.schema(schema))
        return {new: numbers[old] for new, old in alike(list(numbers), list(wanted)).items()}

    def choose(schema: ObjectId) -> Mapping[str, Window]:
        infos, by_name = catalog.schema(schema).tensors, windows(catalog.schema(schema))
        return {
            name: (number, by_name[infos[number].name][1])
            for name, number in numbers_in(schema).items()
        }

    shares = itertools.repeat(1.0) if factors is None else factors
    readers = Trajectory(catalog, choose).readers(names)
    for (name, reader), share in zip(readers, shares, strict=factors is not None):
        infos, numbers = reader.schema.tensors, numbers_in(catalog.commit(name).schema)
        for weight, total in sums.items():
            info, number = last.tensors[wanted[weight]], numbers.get(weight)
            if number is None or (infos[number].dtype, infos[number].shape) != (
                info.dtype,
                info.shape,
            ):
                raise InvalidInputError(
                    f"{weight} is not the same kind of tensor in commit {name[:8]}",
                    hint="average commits of one architecture",
                )
            words = reader.raw(number).view(word_type(info.type.word))
            for at in range(0, total.size, SLICE_WORDS):
                values = _values(words[at : at + SLICE_WORDS], info.dtype)
                if factors is not None:
                    values = share * values.astype(np.float64)
                total[at : at + SLICE_WORDS] += values
        progress(catalog.commit(name).raw_bytes)
    means = {}
    for weight, number in wanted.items():
        total = sums.pop(weight)
        if factors is None:
            total /= len(names)
        means[number] = _rounded(total, last.tensors[number].dtype)
    return means


class Averaged(Restorer):
    """Reads a commit, but takes some tensors from `tensors` (bytes by number in its schema).

    Overrides the sources of tensors: `read_slices` for stored ones, `_skeleton` for small ones.
    """

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
                words, out = words[job.slice * SLICE_WORDS :][:SLICE_WORDS], room(job)
                if out is not None:
                    out[:] = words
                yield job, words

    def _skeleton(self, file: FileEntry) -> Skeleton:
        """Return the file template with the new values of small tensors, and their checksums."""
        skeleton = super()._skeleton(file)
        skeleton = replace(skeleton, literals=memoryview(bytearray(skeleton.literals)))
        small = {
            argument: data
            for op, argument, data in skeleton.walk(self.schema)
            if op == Op.INLINE and argument in self._others
        }
        if small and file.format == "torch-zip":
            self._update_checksums(SkeletonSource(self.schema, skeleton, self.tensor), small)
        for number, data in small.items():
            data[:] = self._others[number].tobytes()
        return skeleton

    def _update_checksums(self, source: SkeletonSource, small: Mapping[int, memoryview]) -> None:
        """Replace the CRC-32 of each small tensor with new values, if it fits the old ones."""
        layout = torch_zip.parse(source, checksums=torch_zip.Checksums.SMALL)
        if layout is None:
            return
        for mark in layout.checksums:
            view = layout.tensors[mark.tensor]
            number = source.owner(view.offset, view.size)
            if number in small and source.read(mark.offset, 4) == _crc32(small[number]):
                source.overwrite(mark.offset, _crc32(self._others[number].tobytes()))


def _crc32(data: bytes | memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def choose(entries: Sequence[LogEntry], best: str | None, last: int | None) -> tuple[LogEntry, ...]:
    """Return the commits that `Repo.average` averages, in their order.

    Raises:
        InvalidInputError: `best` is not METRIC, METRIC:N or METRIC:WAY:N, or `last` is below 1.
        NotFoundError: No commit is left.
    """
    chosen = list(entries)
    if best is not None:
        rule = _best(best)
        picked = rule.pick((e.id, replace(e.commit, metrics=e.metrics)) for e in chosen)
        if not picked:
            raise NotFoundError(
                f"no commit in this range has the metric '{rule.metric}'",
                hint="run 'ckpt log' to see the metrics",
            )
        chosen = [entry for entry in chosen if entry.id in picked]
    if last is not None:
        if last < 1:
            raise InvalidInputError(f"invalid count {last}", hint="use a number of at least 1")
        chosen = chosen[-last:]
    if not chosen:
        raise NotFoundError("no commits in this range", hint="run 'ckpt log' to list them")
    return tuple(chosen)


def _best(text: str) -> Best:
    """Parse METRIC, METRIC:N, METRIC:WAY or METRIC:WAY:N; the way is `min` by default."""
    metric, colon, count = text.rpartition(":")
    if not colon or not count.isdecimal():
        metric, count = text, "1"
    if metric.rpartition(":")[2] not in ("min", "max"):
        metric += ":min"
    return Best.parse(f"{metric}:{count}")


def average(
    catalog: Catalog,
    names: list[ObjectId],
    factors: Sequence[float] | None,
    path: Path,
    progress: Progress,
    *,
    force: bool = False,
) -> list[ObjectId]:
    """Write the mean of the weights of some commits; see `Repo.average`.

    The target is checked first, and written as `PartReader.export` writes the last commit.
    """
    suffix_fits(catalog.commit(names[-1]), path)
    with Targets() as targets:
        at = targets.free(path, force=force)
        newest = Averaged(catalog, names[-1], mean_weights(catalog, names, factors, progress))
        PartReader(newest).export(at, None, lambda _: None, force=force)
    return names
