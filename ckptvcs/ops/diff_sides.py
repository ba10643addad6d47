"""The tensors of two commits, side by side: which can be compared, and which need not be read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ckptvcs.checkpoint.forms import near_errors
from ckptvcs.checkpoint.matching import pair_names
from ckptvcs.codec.words import Words, word_type
from ckptvcs.decode.commit_reader import Restorer, in_our_order
from ckptvcs.decode.pair_reader import Pair
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import INEXACT
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.ids import ObjectId

Key = tuple[str, str, int]
"""Part, name, and the number of earlier tensors with that name."""


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


class Side:
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

    def name_as(self, other: Side) -> None:
        """Rename the tensors to their names on the other side."""
        old, new = ([name for _, name, _ in side.numbers] for side in (other, self))
        names = pair_names(old, new)
        self.numbers = {
            (part, names.get(name, name), count): number
            for (part, name, count), number in self.numbers.items()
        }

    def keep(self, wants: Callable[[str], bool]) -> None:
        """Compare only tensors whose name passes a test."""
        self.numbers = {key: number for key, number in self.numbers.items() if wants(key[1])}

    @property
    def size_bytes(self) -> int:
        """The total size of the compared tensors in bytes."""
        return sum(self.infos[number].size_bytes for number in self.numbers.values())

    @cached_property
    def _inline(self) -> dict[int, bytes]:
        return self.restorer.inline()

    @cached_property
    def _errors(self) -> dict[int, float]:
        return {
            # The report of a moment has only a squared error.
            number: error.weight_rel or math.sqrt(error.residual_nmse)
            for number, error in near_errors(self.catalog, self.restorer.name).items()
            if self.restorer.fidelity.get(self.infos[number].part) in INEXACT
        }

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
        if info.inline or self.restorer.fidelity.get(info.part) not in INEXACT:
            return False
        if number in self._originals:
            return self._originals[number] != self._hashes[number]
        return number in self._errors or info.part not in self._measured

    def is_same(self, number: int, other: Side, other_number: int) -> bool | None:
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

    def all_words(self, number: int) -> Words:
        """Return all words of a tensor; for tensors that are inline on at least one side."""
        info = self.infos[number]
        word = word_type(info.type.word)
        if info.inline:
            return in_our_order(np.frombuffer(self._inline.get(number, b""), word), info)
        return in_our_order(self.restorer.tensor(number).view(word), info)


@dataclass
class Match:
    """The tensors of two commits by their comparison; `stored` and `small` are still to be read."""

    added: list[TensorInfo] = field(default_factory=list)
    removed: list[TensorInfo] = field(default_factory=list)
    reshaped: list[tuple[TensorInfo, TensorInfo]] = field(default_factory=list)
    unchanged: list[TensorInfo] = field(default_factory=list)
    indistinguishable: list[Indistinct] = field(default_factory=list)
    stored: list[Pair] = field(default_factory=list)
    small: list[Pair] = field(default_factory=list)


def match_tensors(a: Side, b: Side, *, forms: bool = False) -> Match:
    """Return which tensors of two commits differ, as far as that is known without decoding.

    With `forms`, tensors are equal if the restored values are, whatever the originals were.
    """
    match = Match(
        added=[b.infos[number] for key, number in b.numbers.items() if key not in a.numbers],
        removed=[a.infos[number] for key, number in a.numbers.items() if key not in b.numbers],
    )
    for key, number in a.numbers.items():
        if key in b.numbers:
            _match_pair(a, b, (number, b.numbers[key]), match, forms=forms)
    return match


def _match_pair(a: Side, b: Side, pair: Pair, match: Match, *, forms: bool) -> None:
    one, other = a.infos[pair[0]], b.infos[pair[1]]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        match.reshaped.append((one, other))
        return
    same_order = one.order == other.order
    alike = same_order and a.content(pair[0]) == b.content(pair[1]) is not None
    same = alike if forms else same_order and a.is_same(pair[0], b, pair[1])
    if not one.words or same:
        match.unchanged.append(one)
    elif alike:
        near_a, near_b = a.is_near(pair[0]), b.is_near(pair[1])
        match.indistinguishable.append(Indistinct(one, near_a, near_b, same is False))
    elif one.inline or other.inline:
        match.small.append(pair)
    else:
        match.stored.append(pair)
