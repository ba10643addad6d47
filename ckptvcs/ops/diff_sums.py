"""Sums over the entries of two tensors, from which norms and differences follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.words import Words, numbers_of, to_float64

_BLOCK_WORDS = 8192  # fit into the cache, and are too few for OpenBLAS to start its threads


@dataclass
class Sums:
    """Sums over the entries of one or several tensors, before (A) and after (B).

    Non-finite entries only count in `entries`, `changed` and `nonfinite_*`.

    Attributes:
        entries: The number of entries.
        compared: The number of entries that are finite on both sides.
        changed: The number of entries whose bits differ.
        nonfinite_a: The number of non-finite entries in A.
        nonfinite_b: The number of non-finite entries in B.
        aa: The sum of A squared.
        bb: The sum of B squared.
        ab: The sum of A times B.
        dd: The sum of (B - A) squared.
        max_abs: The largest absolute difference.
    """

    entries: int = 0
    compared: int = 0
    changed: int = 0
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    max_abs: float = 0.0

    def add(self, other: Sums) -> None:
        """Add the sums of other entries."""
        largest = max(self.max_abs, other.max_abs)
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        self.max_abs = largest

    @property
    def norm_a(self) -> float:
        """The Euclidean norm of A."""
        return math.sqrt(self.aa)

    @property
    def norm_b(self) -> float:
        """The Euclidean norm of B."""
        return math.sqrt(self.bb)

    @property
    def norm_difference(self) -> float:
        """The Euclidean norm of B - A."""
        return math.sqrt(self.dd)

    @property
    def relative(self) -> float:
        """|B - A| / |A|; infinite if only A is 0, NaN if no entry can be compared."""
        if self.entries and not self.compared:
            return math.nan
        if not self.dd:
            return 0.0
        return self.norm_difference / self.norm_a if self.aa else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between A and B; NaN if one of them is 0."""
        if not self.aa or not self.bb:
            return math.nan
        return max(-1.0, min(1.0, self.ab / self.norm_a / self.norm_b))


def sum_up(a: Words, b: Words, dtype: str) -> Sums:
    """Return the sums over two flat arrays of words, of equal length and element type `dtype`."""
    sums = Sums()
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, a.size, _BLOCK_WORDS):
            _add_block(sums, a[at : at + _BLOCK_WORDS], b[at : at + _BLOCK_WORDS], dtype)
    return sums


def _add_block(sums: Sums, a: Words, b: Words, dtype: str) -> None:
    parts = numbers_of(dtype)
    word_parts = parts if dtype != "F4" else 1
    left, right = to_float64(a, dtype), to_float64(b, dtype)
    sums.entries += left.size // parts
    sums.changed += _count(a != b, word_parts) * (parts // word_parts)
    aa, bb = float(left @ left), float(right @ right)
    if not math.isfinite(aa + bb):  # an entry is not finite, or its square
        finite_a, finite_b = np.isfinite(left), np.isfinite(right)
        sums.nonfinite_a += _count(~finite_a, parts)
        sums.nonfinite_b += _count(~finite_b, parts)
        both = finite_a & finite_b
        left, right = left[both], right[both]
        aa, bb = float(left @ left), float(right @ right)
    sums.compared += left.size // parts
    if left.size:
        difference = right - left
        sums.aa += aa
        sums.bb += bb
        sums.ab += float(left @ right)
        sums.dd += float(difference @ difference)
        sums.max_abs = max(sums.max_abs, float(difference.max()), -float(difference.min()))


def _count(marked: NDArray[np.bool_], parts: int) -> int:
    """Return the number of elements of `parts` numbers each, of which any is marked."""
    return int(np.count_nonzero(marked.reshape(-1, parts).any(axis=1) if parts > 1 else marked))
