"""Diff: the differences of two commits, tensor by tensor.

A diff compares the same forms as a checkout restores: the exact form if it is stored, otherwise the
near form.  It shows the error of a near form beside the difference.

Tensors with equal recorded hashes are not decoded.  They are unchanged if both forms are exact, or
if the hashes of both originals are known and equal.  Equal near forms alone prove nothing about the
originals.  All other tensors are summed up in float64: large ones slice by slice, small ones in
batches, so that memory is bounded by a few slices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ckptvcs.checkpoint.matching import pair_names
from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.codec.frame import SLICE_WORDS, slice_counts
from ckptvcs.codec.words import Words, to_float64, word_type
from ckptvcs.decode.commit_reader import Restorer, in_our_order
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS
from ckptvcs.history.log import LogEntry
from ckptvcs.history.schema import BIG, TensorInfo
from ckptvcs.ops.diff_sums import Sums, sum_up
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress
from ckptvcs.store.ids import ObjectId

Key = tuple[str, str, int]
"""Part, name, and the number of earlier tensors with that name."""

SORT_KEYS = (
    "relative",
    "name",
    "norm_a",
    "norm_b",
    "norm_difference",
    "cosine",
    "max_abs",
    "changed",
    "nonfinite_b",
)
_BATCH_WORDS = 2 * SLICE_WORDS


@dataclass(frozen=True)
class TensorDifference:
    """The difference of one tensor between commits A and B.

    Attributes:
        info: The tensor in A.
        sums: Sums over the entries of both sides.
        error_a: The relative error of the near form in A; None if it is exact or not known.
        error_b: The same in B.
        near_a: Whether the form in A is near.
        near_b: Whether the form in B is near.
    """

    info: TensorInfo
    sums: Sums
    error_a: float | None
    error_b: float | None
    near_a: bool
    near_b: bool

    @property
    def below_error(self) -> bool:
        """Whether the errors of the near forms alone explain the difference."""
        error = (self.error_a or 0.0) * self.sums.norm_a + (self.error_b or 0.0) * self.sums.norm_b
        return 0 < error >= self.sums.norm_difference

    @property
    def changed(self) -> int | None:
        """The number of entries whose bits differ; None if a side is near."""
        return None if self.near_a or self.near_b else self.sums.changed


@dataclass(frozen=True)
class Indistinct:
    """A tensor whose forms are equal although a side is near.

    Attributes:
        info: The tensor in A.
        near_a: Whether the form in A is near.
        near_b: Whether the form in B is near.
        differs: Whether the recorded hashes prove that the original values differ.
    """

    info: TensorInfo
    near_a: bool
    near_b: bool
    differs: bool


@dataclass(frozen=True)
class Comparison:
    """The differences between two commits A and B.

    Attributes:
        a: Commit A.
        b: Commit B.
        steps: The number of training steps between them; None if a step is not known.
        metadata: The name and both values of each field that differs.
        tensors: The tensors that differ, sorted as by `ordered`.
        total: Sums over the weights in `tensors`.
        unchanged: Tensors that are proven to be equal.
        indistinguishable: Tensors with equal forms, of which at least one is near.
        added: Tensors that only B has.
        removed: Tensors that only A has.
        reshaped: Tensors of another shape or type in B, as pairs (of A, of B).
        dropped: Parts that are not compared, because they were dropped from A or B.
    """

    a: LogEntry
    b: LogEntry
    steps: int | None
    metadata: tuple[tuple[str, object, object], ...]
    tensors: tuple[TensorDifference, ...]
    total: Sums
    unchanged: tuple[TensorInfo, ...]
    indistinguishable: tuple[Indistinct, ...]
    added: tuple[TensorInfo, ...]
    removed: tuple[TensorInfo, ...]
    reshaped: tuple[tuple[TensorInfo, TensorInfo], ...]
    dropped: tuple[str, ...]

    @property
    def total_changed(self) -> int | None:
        """The number of weights whose bits differ; None if a side of a tensor is near."""
        counts = [tensor.changed for tensor in self.tensors if tensor.info.role == WEIGHT]
        return None if None in counts else self.total.changed

    def update_ratio(self, sums: Sums) -> float | None:
        """Return the relative change per training step; None if the steps are not known."""
        return sums.relative / self.steps if self.steps else None

    def ordered(self, key: str = "relative") -> list[TensorDifference]:
        """Return the tensors that differ, sorted within each part.

        The largest value comes first (the smallest for `cosine`, alphabetically for `name`).
        Tensors whose number of non-finite entries changed come before all others.

        Args:
            key: One of `relative`, `name`, `norm_a`, `norm_b`, `norm_difference`, `cosine`,
                `max_abs`, `changed` and `nonfinite_b`.

        Raises:
            InvalidInputError: The key is not known.
        """
        if key not in SORT_KEYS:
            raise InvalidInputError(
                f"unknown sort key '{key}'", hint=f"use one of {', '.join(SORT_KEYS)}"
            )

        def rank(tensor: TensorDifference) -> tuple[int, bool, float, str]:
            sums, info = tensor.sums, tensor.info
            value = 0.0 if key == "name" else float(getattr(sums, key))
            if key == "changed" and tensor.changed is None:
                value = -1.0  # after all known counts
            broken = sums.nonfinite_a != sums.nonfinite_b or math.isnan(value)
            size = value if key == "cosine" else -value
            size = -math.inf if math.isnan(size) else size
            return PARTS.index(info.part), not broken, size, info.name

        return sorted(self.tensors, key=rank)


class _Side:
    """The tensors of one commit, by name."""

    def __init__(self, catalog: Catalog, restorer: Restorer, parts: Sequence[str]) -> None:
        self.catalog, self.restorer = catalog, restorer
        self.infos = restorer.schema.tensors
        self.numbers: dict[Key, int] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for number, info in enumerate(self.infos):
            if info.part in parts:
                self.numbers[info.part, info.name, seen[info.part, info.name]] = number
                seen[info.part, info.name] += 1
        self._hashes: dict[int, bytes] = {}
        self._originals: dict[int, bytes] = {}
        self._tables: dict[int, tuple[ObjectId, int]] = {}
        for part in parts:
            state = restorer.commit.parts.get(part)
            if state is not None:
                exact = state.exact if restorer.fidelity[part] == "exact" else None
                stored = restorer.schema.stored(part)
                values = catalog.all_values(exact or state.values, len(stored))
                self._hashes |= zip(stored, values, strict=True)
                original = state.exact or state.values
                self._tables |= {number: (original, place) for place, number in enumerate(stored)}
                if catalog.store.contains(original):
                    values = catalog.all_values(original, len(stored))
                    self._originals |= zip(stored, values, strict=True)

    def name_as(self, other: _Side) -> None:
        """Rename the tensors to their names on the other side."""
        old, new = ([name for _, name, _ in side.numbers] for side in (other, self))
        names = pair_names(old, new)
        self.numbers = {
            (part, names.get(name, name), count): number
            for (part, name, count), number in self.numbers.items()
        }

    @property
    def size_bytes(self) -> int:
        """The total size of the compared tensors in bytes."""
        return sum(self.infos[number].size_bytes for number in self.numbers.values())

    @cached_property
    def _inline(self) -> dict[int, bytes]:
        return self.restorer.inline()

    @cached_property
    def _errors(self) -> dict[int, float]:
        found = {
            # The report of a moment has only a squared error.
            number: error.weight_rel or math.sqrt(error.residual_nmse)
            for number, error in self.catalog.errors(self.restorer.name).items()
            if self.restorer.fidelity.get(self.infos[number].part) == "near"
        }
        # What is equal to another tensor of its part is coded once, and has no error of its own.
        shared = {(self.infos[n].part, self._hashes.get(n)): error for n, error in found.items()}
        alike = ((n, shared.get((self.infos[n].part, value))) for n, value in self._hashes.items())
        return {n: error for n, error in alike if error is not None} | found

    @cached_property
    def _measured(self) -> set[str]:
        """The near parts with error reports."""
        return {self.infos[number].part for number in self._errors}

    def error(self, number: int) -> float | None:
        """Return the relative error of a near tensor; None if it is exact or not known."""
        return self._errors.get(number)

    def is_near(self, number: int) -> bool:
        """Return whether the form of a tensor may differ from its original."""
        info = self.infos[number]
        if info.inline or self.restorer.fidelity.get(info.part) != "near":
            return False
        if number in self._originals:
            return self._originals[number] != self._hashes[number]
        return number in self._errors or info.part not in self._measured

    def is_same(self, number: int, other: _Side, other_number: int) -> bool | None:
        """Return whether the originals of two tensors are equal; None if that is not known."""
        if self._tables.get(number, 0) == other._tables.get(other_number, 1):
            return True
        a, b = self._original(number), other._original(other_number)
        return None if a is None or b is None else a == b

    def _original(self, number: int) -> bytes | None:
        """Return a fingerprint of the original, like `content`; None if it is not known."""
        original = self._originals.get(number)
        return original if original or self.is_near(number) else self.content(number)

    def content(self, number: int) -> bytes | None:
        """Return a fingerprint of a tensor: its hash if it is stored, its bytes if it is inline."""
        if self.infos[number].inline:
            return self._inline.get(number, b"")
        return self._hashes.get(number)

    def words(self, numbers: Sequence[int]) -> Generator[Words, None, None]:
        """Yield the words of several stored tensors, or of a single one slice by slice."""
        if len(numbers) == 1:
            info = self.infos[numbers[0]]
            for block in self.restorer.blocks(numbers[0]):
                yield in_our_order(np.frombuffer(block, word_type(info.type.word)), info)
            return
        for number, octets in self.restorer.tensors(list(numbers)):
            info = self.infos[number]
            yield in_our_order(octets.view(word_type(info.type.word)), info)

    def all_words(self, number: int) -> Words:
        """Return all words of a tensor; for tensors that are inline on at least one side."""
        info = self.infos[number]
        word = word_type(info.type.word)
        if info.inline:
            return in_our_order(np.frombuffer(self._inline.get(number, b""), word), info)
        return in_our_order(self.restorer.tensor(number).view(word), info)


Pair = tuple[int, int]
"""The positions of one tensor in the schemas of A and B."""


def _batches(pairs: Sequence[Pair], infos: Sequence[TensorInfo]) -> Iterator[list[Pair]]:
    """Yield batches of stored tensors, each of at most `_BATCH_WORDS` words or a single tensor.

    Threads decode the tensors of a batch in parallel, and memory holds one batch.
    """
    batch: list[Pair] = []
    words = 0
    for pair in pairs:
        words += infos[pair[0]].words
        if batch and words > _BATCH_WORDS:
            yield batch
            batch, words = [], infos[pair[0]].words
        batch.append(pair)
    if batch:
        yield batch


def _read(a: _Side, b: _Side, batch: Sequence[Pair]) -> Iterator[tuple[Pair, Words, Words]]:
    """Yield the words of a batch on both sides; a batch of one tensor in slices."""
    pairs = list(batch)
    if len(pairs) == 1:
        pairs *= len(slice_counts(a.infos[pairs[0][0]].words))
    # Each generator changes a setting of the interpreter, and restores the previous value when it
    # is closed.  ExitStack closes them in reverse order, so that the first value is restored.
    with ExitStack() as stack:
        left = stack.enter_context(closing(a.words([number for number, _ in batch])))
        right = stack.enter_context(closing(b.words([number for _, number in batch])))
        for pair in pairs:
            yield pair, next(left), next(right)


@dataclass
class _Match:
    """The tensors of two commits by their comparison; `stored` and `small` are still to be read."""

    added: list[TensorInfo] = field(default_factory=list)
    removed: list[TensorInfo] = field(default_factory=list)
    reshaped: list[tuple[TensorInfo, TensorInfo]] = field(default_factory=list)
    unchanged: list[TensorInfo] = field(default_factory=list)
    indistinguishable: list[Indistinct] = field(default_factory=list)
    stored: list[Pair] = field(default_factory=list)
    small: list[Pair] = field(default_factory=list)


def _match(a: _Side, b: _Side) -> _Match:
    match = _Match(
        added=[b.infos[number] for key, number in b.numbers.items() if key not in a.numbers],
        removed=[a.infos[number] for key, number in a.numbers.items() if key not in b.numbers],
    )
    for key, number in a.numbers.items():
        if key not in b.numbers:
            continue
        pair = number, b.numbers[key]
        one, other = a.infos[pair[0]], b.infos[pair[1]]
        same_order = one.order == other.order
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            match.reshaped.append((one, other))
        elif not one.words or (same := same_order and a.is_same(pair[0], b, pair[1])):
            match.unchanged.append(one)
        elif same_order and a.content(pair[0]) == b.content(pair[1]) is not None:
            match.indistinguishable.append(
                Indistinct(one, a.is_near(pair[0]), b.is_near(pair[1]), same is False)
            )
        elif one.inline or other.inline:
            match.small.append(pair)
        else:
            match.stored.append(pair)
    return match


def _sums(a: _Side, b: _Side, match: _Match, progress: Progress) -> Iterator[tuple[Pair, Sums]]:
    """Yield the sums of every pair; of a large tensor one for each slice."""
    read = sum(a.infos[one].size_bytes for one, _ in match.stored)
    progress(a.size_bytes + b.size_bytes - 2 * read)
    for one, other in match.small:
        words = a.all_words(one), b.all_words(other)
        yield (one, other), sum_up(*words, a.infos[one].dtype)
    for batch in _batches(match.stored, a.infos):
        for pair, before, after in _read(a, b, batch):
            yield pair, sum_up(before, after, a.infos[pair[0]].dtype)
            progress(before.nbytes + after.nbytes)


def diff(
    repository: Repository, a: str | int, b: str | int, only: str | None, progress: Progress
) -> Comparison:
    """Compare two commits; see `Repo.diff`.

    `progress` counts the bytes of the tensors on both sides, decoded or not.
    """
    catalog = repository.catalog
    name_a, name_b = repository.resolve(a), repository.resolve(b)
    entry_a, entry_b = repository.entry(name_a), repository.entry(name_b)
    reader_a, reader_b = repository.restorer(name_a), repository.restorer(name_b)
    parts = [part for part in PARTS if only in (None, part)]
    forms = reader_a.fidelity, reader_b.fidelity
    dropped = [part for part in parts if "dropped" in (form.get(part) for form in forms)]
    if only in dropped:
        raise NotFoundError(f"the {only} part of {entry_a.id[:8]} or {entry_b.id[:8]} was dropped")
    parts = [part for part in parts if part not in dropped]
    left, right = _Side(catalog, reader_a, parts), _Side(catalog, reader_b, parts)
    if only is not None and not left.numbers and not right.numbers:
        raise NotFoundError(f"neither {entry_a.id[:8]} nor {entry_b.id[:8]} has a part '{only}'")
    right.name_as(left)
    match = _match(left, right)
    tensors: dict[Pair, Sums] = {}
    total = Sums()
    for pair, sums in _sums(left, right, match, progress):
        tensors.setdefault(pair, Sums()).add(sums)
        if left.infos[pair[0]].role == WEIGHT:
            total.add(sums)
    comparison = Comparison(
        entry_a,
        entry_b,
        _steps_between(entry_a, entry_b),
        tuple(_metadata(entry_a, entry_b)),
        tuple(_difference(left, right, pair, sums) for pair, sums in tensors.items()),
        total,
        tuple(match.unchanged),
        tuple(match.indistinguishable),
        tuple(match.added),
        tuple(match.removed),
        tuple(match.reshaped),
        tuple(dropped),
    )
    return replace(comparison, tensors=tuple(comparison.ordered()))


def _steps_between(a: LogEntry, b: LogEntry) -> int | None:
    return None if a.step is None or b.step is None else abs(b.step - a.step)


def _difference(left: _Side, right: _Side, pair: Pair, sums: Sums) -> TensorDifference:
    a, b = pair
    return TensorDifference(
        left.infos[a], sums, left.error(a), right.error(b), left.is_near(a), right.is_near(b)
    )


def _metadata(a: LogEntry, b: LogEntry) -> Iterator[tuple[str, object, object]]:
    for name in ("step", "codec", "code", "raw_bytes"):
        one, other = getattr(a.commit, name), getattr(b.commit, name)
        if one != other:
            yield name, one, other
    if a.stored_bytes != b.stored_bytes:
        yield "stored_bytes", a.stored_bytes, b.stored_bytes
    for name in dict.fromkeys((*a.metrics, *b.metrics)):
        one, other = a.metrics.get(name), b.metrics.get(name)
        both_nan = one != one and other != other
        if one != other and not both_nan:
            yield f"metrics.{name}", one, other


def all_finite(catalog: Catalog, restorer: Restorer, finite: set[bytes]) -> bool:
    """Return whether every weight of a commit is finite.

    Tensors with a hash in `finite` are not read; the hashes of finite tensors are added to it.
    """
    side = _Side(catalog, restorer, ("model",))
    stored = []
    for number in side.numbers.values():
        info, content = side.infos[number], side.content(number)
        # Big-endian weights have no role.
        if (info.role != WEIGHT and info.order != BIG) or not info.words or content in finite:
            continue
        if not info.inline:
            stored.append((number, number))
        elif not np.isfinite(to_float64(side.all_words(number), info.dtype)).all():
            return False
    for batch in _batches(stored, side.infos):
        numbers = [number for number, _ in batch]
        for index, words in enumerate(side.words(numbers)):
            # A batch of one tensor yields several slices.
            info = side.infos[numbers[min(index, len(numbers) - 1)]]
            if not np.isfinite(to_float64(words, info.dtype)).all():
                return False
        finite.update(filter(None, map(side.content, numbers)))
    return True
