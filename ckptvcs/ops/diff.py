"""Diff: the differences of two commits, tensor by tensor.

A diff compares the same forms as a checkout restores: the exact form if it is stored, otherwise the
near form.  It shows the error of a near form beside the difference.

Tensors with equal recorded hashes are not decoded.  They are unchanged if both forms are exact, or
if the hashes of both originals are known and equal.  Equal near forms alone prove nothing about the
originals.  All other tensors are summed up in float64, slice by slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.codec.words import Words
from ckptvcs.decode.commit_reader import Restorer, in_our_order
from ckptvcs.decode.pair_reader import Pair, read_pairs
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.commit import INEXACT, PARTS
from ckptvcs.history.log import LogEntry
from ckptvcs.history.schema import TensorInfo
from ckptvcs.ops.diff_sides import Indistinct, Match, Side, match_tensors
from ckptvcs.ops.diff_sums import Sums, sum_up
from ckptvcs.ops.layers import layers_of
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress
from ckptvcs.text import name_test

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
        layer: The layer of the tensor; a moment has the layer of its weight.
    """

    info: TensorInfo
    sums: Sums
    error_a: float | None
    error_b: float | None
    near_a: bool
    near_b: bool
    layer: str

    @property
    def name(self) -> str:
        """The name of the tensor in A."""
        return self.info.name

    @property
    def part(self) -> str:
        """The part: `model`, `optimizer` or `rest`."""
        return self.info.part

    @property
    def error_norms(self) -> tuple[float, float]:
        """The norms of the errors of the near forms in A and B; 0 if exact or not known."""
        return (self.error_a or 0.0) * self.sums.norm_a, (self.error_b or 0.0) * self.sums.norm_b

    @property
    def below_error(self) -> bool:
        """Whether the errors of the near forms alone explain the difference."""
        return 0 < sum(self.error_norms) >= self.sums.norm_difference

    @property
    def changed(self) -> int | None:
        """The number of entries whose bits differ; None if a side is near."""
        return None if self.near_a or self.near_b else self.sums.changed


@dataclass(frozen=True)
class LayerDifference:
    """The difference of the tensors of one layer and role that differ.

    Attributes:
        name: The name of the layer.
        part: `model`, `optimizer` or `rest`.
        role: The role of the tensors, such as `weight` or `exp_avg`.
        tensors: The tensors of the layer that differ.
        sums: Sums over the entries of these tensors.
    """

    name: str
    part: str
    role: str
    tensors: tuple[TensorDifference, ...]
    sums: Sums

    @property
    def below_error(self) -> bool:
        """Whether the errors of the near forms alone explain the difference."""
        pairs = [tensor.error_norms for tensor in self.tensors]
        errors = [math.hypot(*side) for side in zip(*pairs, strict=True)]
        return 0 < sum(errors) >= self.sums.norm_difference

    @property
    def changed(self) -> int | None:
        """The number of entries whose bits differ; None if a side of a tensor is near."""
        counts = [tensor.changed for tensor in self.tensors]
        return None if None in counts else self.sums.changed


Difference = TypeVar("Difference", TensorDifference, LayerDifference)


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
        return _ordered(self.tensors, key)

    def layers(self, key: str = "relative") -> list[LayerDifference]:
        """Return the tensors that differ, summed up by layer and role, sorted as by `ordered`.

        Args:
            key: As for `ordered`.

        Raises:
            InvalidInputError: The key is not known.
        """
        groups: dict[tuple[str, str, str], list[TensorDifference]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.layer, tensor.part, tensor.info.role), []).append(tensor)
        found = []
        for group, tensors in groups.items():
            sums = Sums()
            for tensor in tensors:
                sums.add(tensor.sums)
            found.append(LayerDifference(*group, tuple(tensors), sums))
        return _ordered(found, key)


def _ordered(differences: Iterable[Difference], key: str) -> list[Difference]:
    if key not in SORT_KEYS:
        raise InvalidInputError(
            f"unknown sort key '{key}'", hint=f"use one of {', '.join(SORT_KEYS)}"
        )

    def rank(one: Difference) -> tuple[int, bool, float, str]:
        value = 0.0 if key == "name" else float(getattr(one.sums, key))
        if key == "changed" and one.changed is None:
            value = -1.0  # after all known counts
        broken = one.sums.nonfinite_a != one.sums.nonfinite_b or math.isnan(value)
        size = value if key == "cosine" else -value
        size = -math.inf if math.isnan(size) else size
        return PARTS.index(one.part), not broken, size, one.name

    return sorted(differences, key=rank)


def _sums(a: Side, b: Side, match: Match, progress: Progress) -> Iterator[tuple[Pair, Sums]]:
    """Yield the sums of every pair; of a large tensor one for each slice."""
    read = sum(a.infos[one].size_bytes for one, _ in match.stored)
    progress(a.size_bytes + b.size_bytes - 2 * read)
    for one, other in match.small:
        words = a.all_words(one), b.all_words(other)
        yield (one, other), sum_up(*words, a.infos[one].dtype)

    def sums(pair: Pair, before: Words, after: Words) -> Sums:
        one, other = a.infos[pair[0]], b.infos[pair[1]]
        return sum_up(in_our_order(before, one), in_our_order(after, other), one.dtype)

    for pair, found in read_pairs(a.restorer, b.restorer, match.stored, sums, progress):
        yield from ((pair, one) for one in found)


def diff(
    repository: Repository,
    a: str | int,
    b: str | int,
    only: str | None,
    name: str | None,
    progress: Progress,
) -> Comparison:
    """Compare two commits; see `Repo.diff`.

    `progress` counts the bytes of the tensors on both sides, decoded or not.
    """
    names = repository.resolve(a), repository.resolve(b)
    entries = [repository.entry(one) for one in names]
    readers = [repository.restorer(one) for one in names]
    return _compare(repository, entries, readers, only, name, progress, forms=False)


def diff_near(
    repository: Repository,
    revision: str | int,
    only: str | None,
    name: str | None,
    progress: Progress,
) -> Comparison:
    """Compare a commit with its near form; see `Repo.diff_near`."""
    commit = repository.resolve(revision)
    exact, near = repository.restorer(commit), repository.restorer(commit, near=True)
    entry = repository.entry(commit)
    if exact.fidelity == near.fidelity:
        lossy = INEXACT.intersection(exact.fidelity.values())
        form = f"is only {min(lossy)} now" if lossy else "has no near form"
        raise InvalidInputError(
            f"commit {commit[:8]} {form}",
            hint="choose a commit that 'ckpt log' shows as exact, of the codec near",
        )
    entries = [entry, replace(entry, fidelity=dict(near.fidelity))]
    return _compare(repository, entries, [exact, near], only, name, progress, forms=True)


def _compare(
    repository: Repository,
    entries: Sequence[LogEntry],
    readers: Sequence[Restorer],
    only: str | None,
    name: str | None,
    progress: Progress,
    *,
    forms: bool,
) -> Comparison:
    entry_a, entry_b = entries
    parts, dropped = _parts(readers, only)
    left, right = (Side(repository.catalog, reader, parts) for reader in readers)
    if only is not None and not left.numbers and not right.numbers:
        raise NotFoundError(f"neither {entry_a.id[:8]} nor {entry_b.id[:8]} has a part '{only}'")
    right.name_as(left)
    if name is not None:
        for side in (left, right):
            side.keep(name_test(name))
        if not left.numbers and not right.numbers:
            raise NotFoundError(f"no tensor matches '{name}'", hint="run 'ckpt ls' to list them")
    match = match_tensors(left, right, forms=forms)
    tensors: dict[Pair, Sums] = {}
    total = Sums()
    for pair, sums in _sums(left, right, match, progress):
        tensors.setdefault(pair, Sums()).add(sums)
        if left.infos[pair[0]].role == WEIGHT:
            total.add(sums)
    layers = layers_of(left.restorer.schema)
    comparison = Comparison(
        entry_a,
        entry_b,
        _steps_between(entry_a, entry_b),
        tuple(_metadata(entry_a, entry_b)),
        tuple(
            _difference(left, right, pair, sums, layers[pair[0]]) for pair, sums in tensors.items()
        ),
        total,
        tuple(match.unchanged),
        tuple(match.indistinguishable),
        tuple(match.added),
        tuple(match.removed),
        tuple(match.reshaped),
        tuple(dropped),
    )
    return replace(comparison, tensors=tuple(comparison.ordered()))


def _parts(readers: Sequence[Restorer], only: str | None) -> tuple[list[str], list[str]]:
    """Return the parts to compare, and those that were dropped from one of the commits."""
    parts = [part for part in PARTS if only in (None, part)]
    fidelities = [reader.fidelity for reader in readers]
    dropped = [part for part in parts if "dropped" in (form.get(part) for form in fidelities)]
    if only in dropped:
        names = " or ".join(reader.name[:8] for reader in readers)
        raise NotFoundError(f"the {only} part of {names} was dropped")
    return [part for part in parts if part not in dropped], dropped


def _steps_between(a: LogEntry, b: LogEntry) -> int | None:
    return None if a.step is None or b.step is None else abs(b.step - a.step)


def _difference(left: Side, right: Side, pair: Pair, sums: Sums, layer: str) -> TensorDifference:
    a, b = pair
    return TensorDifference(
        left.infos[a], sums, left.error(a), right.error(b), left.is_near(a), right.is_near(b), layer
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
