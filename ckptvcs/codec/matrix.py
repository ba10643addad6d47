"""The matrix that the words of a slice are part of, and the powers of two that its rows take."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptvcs.errors import CorruptionError, TruncatedError

Floats = NDArray[np.float32]

_ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)
NEUTRAL = 128


def _powers(numerators: NDArray[np.int64], parts: int) -> Floats:
    """2^(numerator / parts), for parts 1, 2 or 4: a root from the table, times a power of two."""
    powers = np.empty(numerators.shape, np.float32)
    powers[:] = np.ldexp(_ROOTS[numerators % parts * (4 // parts)], numerators // parts)
    return powers


QUARTERS = _powers(np.arange(256) - NEUTRAL, 4)
"""2^((i - 128) / 4): the row factor that is stored as byte i."""

HALVES = range(-252, 255)
HALF_POWERS = _powers(np.asarray(HALVES), 2)
"""2^(e / 2) for e from -252 to 254, all of them normal floats."""


def half_powers(exponents: NDArray[np.signedinteger]) -> Floats:
    """2^(e / 2) for each e within `HALVES`."""
    powers: Floats = HALF_POWERS[exponents - HALVES.start]
    return powers


@dataclass(frozen=True)
class Rows:
    """How the words of a slice lie in a matrix: `columns` a row; the first `start` words of the
    first row belong to the slice before.
    """

    columns: int
    start: int = 0

    def count(self, words: int) -> int:
        """How many rows a slice of `words` words touches."""
        return -(-(self.start + words) // self.columns)

    def of(self, positions: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
        """The row of each word."""
        return (positions + self.start) // self.columns


def get_rows(columns: int, start: int) -> Rows:
    """Rows as a slice declares them.  Raises CorruptionError."""
    if start >= columns:
        raise CorruptionError("corrupt frame: invalid row shape")
    return Rows(columns, start)


def take(layout: struct.Struct, data: memoryview, at: int) -> tuple[tuple[float, ...], int]:
    """The fields at `at`, and where the next ones are.  Raises TruncatedError."""
    if at + layout.size > len(data):
        raise TruncatedError("corrupt frame: truncated header")
    return layout.unpack_from(data, at), at + layout.size
