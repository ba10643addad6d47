"""The matrix of a near slice, and tables of powers of two (docs/format.md, "Near slices")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.words import Floats
from ckptvcs.errors import CorruptionError

_ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)
NEUTRAL = 128


def _powers(numerators: NDArray[np.int64], parts: int) -> Floats:
    """Return 2^(numerator / parts), for 1, 2 or 4 parts, with the roots R(0) to R(3)."""
    powers = np.empty(numerators.shape, np.float32)
    powers[:] = np.ldexp(_ROOTS[numerators % parts * (4 // parts)], numerators // parts)
    return powers


QUARTERS = _powers(np.arange(256) - NEUTRAL, 4)
"""2^((i - 128) / 4) for byte i: the row factors of method 4."""

HALVES = range(-252, 255)
HALF_POWERS = _powers(np.asarray(HALVES), 2)
"""2^(e / 2) for e from -252 to 254: normal floats."""


@dataclass(frozen=True)
class Rows:
    """The matrix of a slice: word w is at row (start + w) / columns.

    The first `start` words of the first row belong to the slice before it.
    """

    columns: int
    start: int = 0

    def count(self, words: int) -> int:
        """Return the number of rows of a slice of `words` words."""
        return -(-(self.start + words) // self.columns)

    def of(self, positions: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
        """Return the row of each word."""
        return (positions + self.start) // self.columns


def get_rows(columns: int, start: int) -> Rows:
    """Return the matrix that a slice declares. Raises CorruptionError."""
    if start >= columns:
        raise CorruptionError("corrupt frame: invalid row shape")
    return Rows(columns, start)
