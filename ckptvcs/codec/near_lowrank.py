"""First moments as a product of two thin matrices, in units of the root of the second.

An average of some gradients has few directions: at ten bits for a row and a column, as much of it
comes back as from seven times the bits spent on its entries (docs/codec.md has the figures).  Both
factors are small integers, so that their product is exact in any order of adding up, on any
machine.  Layout: docs/format.md, "Near slices".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.matrix import Rows, get_rows, take
from ckptvcs.codec.sections import Bytes, get_section, put_section
from ckptvcs.codec.words import NearSlice, Words, from_float32, room_for_floats, to_float32
from ckptvcs.errors import CorruptionError

Floats = NDArray[np.float32]

_HEAD = struct.Struct("<IIBf")  # columns, start, rank, scale
ONE = np.float32(1)
_ZERO = 128  # stored for a factor of 0
_MORE = 2  # directions that are looked at beyond those that are kept
_THIN = 12  # rows a direction, from which the first look is taken
MAX_RANK = 64  # 64 * 127^2 is below 2^24: float32 adds up such products exactly


def encode_low_rank(
    words: Words,
    second: Words | None,
    dtype: str,
    rows: Rows,
    rank: int,
    step: float,
    roots: tuple[Floats, Floats] | None = None,
) -> NearSlice | None:
    """Code one slice of a first moment as `rank` directions of moment / sqrt(second), or of itself.

    `step` is that of the factors, in root mean squares of the weakest direction that is kept.
    Where `second` is a row times a column, and never 0, `roots` are those of both.

    Returns the slice, and what `decode_low_rank` will return; None where values are not finite, or
    not zero where `second` is, or where there is nothing.
    """
    values, height = to_float32(words, dtype), rows.count(words.size)
    if roots is None:
        if second is not None:
            values, good = kernels.active().divide_roots(values, to_float32(second, dtype))
            if not good:
                return None
        roots = np.ones(height, np.float32), np.ones(rows.columns, np.float32)
    if words.size == height * rows.columns:
        matrix = values.reshape(height, rows.columns)
    else:
        matrix = np.zeros((height, rows.columns), np.float32)
        matrix.reshape(-1)[rows.start : rows.start + words.size] = values
    payload = put_directions(_Scaled(matrix, ONE / roots[0], ONE / roots[1]), rows, rank, step)
    if payload is None:
        return None
    near = decode_low_rank(memoryview(payload), second, words.size, dtype)
    return NearSlice(payload, near)


def put_directions(matrix: Matrix, rows: Rows, rank: int, step: float) -> bytes | None:
    """The payload of a slice whose moment / sqrt(second) is `matrix`; None as for
    `encode_low_rank`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = _factors(matrix, rank, step)
    if found is None:
        return None
    left, right, scale = found
    stored = np.concatenate((left.reshape(-1), right.reshape(-1))) + _ZERO
    head = _HEAD.pack(rows.columns, rows.start, left.shape[1], scale)
    return head + put_section(stored.astype(np.uint8), short=True)


class Matrix(Protocol):
    """A matrix, here or on a device, that can be multiplied by thin ones."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def times_rows(self, lines: Floats) -> Floats:
        """It, times the transposed lines."""

    def times_columns(self, left: Floats) -> Floats:
        """The transposed left, times it."""

    def thinned(self, height: int) -> Matrix:
        """At least `height` of its rows, if it has as many, at even distances."""


@dataclass(frozen=True)
class _Scaled:
    """A matrix whose rows and columns count so many times."""

    matrix: Floats
    row: Floats
    column: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def times_rows(self, lines: Floats) -> Floats:
        product: Floats = kernels.active().times_rows(self.matrix, lines * self.column)
        return product * self.row[:, None]

    def times_columns(self, left: Floats) -> Floats:
        product: Floats = kernels.active().times_columns(left * self.row[:, None], self.matrix)
        return product * self.column

    def thinned(self, height: int) -> Matrix:
        apart = max(1, self.matrix.shape[0] // height)
        return _Scaled(_contiguous(self.matrix[::apart]), self.row[::apart], self.column)


def _factors(matrix: Matrix, rank: int, step: float) -> tuple[Floats, Floats, np.float32] | None:
    """The strongest directions of a matrix (by power iteration from random ones), each shared
    evenly between both factors, in whole steps; and the scale that fits their product best.
    """
    active = kernels.active()
    shape = matrix.shape
    rank = min(rank, *shape)
    lines = _random(rank + _MORE, shape[1])
    for part in (matrix.thinned(_THIN * (rank + _MORE)), matrix):  # the first only sets out
        basis = _orthonormal(part.times_rows(lines))
        if basis is None:
            return None
        lines = part.times_columns(basis)
    inner, sizes = _principal(active.times_rows(lines, lines))
    kept = int(np.count_nonzero(sizes[:rank] > 1e-6 * sizes[0]))
    if not kept:
        return None
    # What a direction takes to the left and to the right of its size's root.
    inner, roots = inner[:, :kept], np.sqrt(sizes[:kept])
    factors = (
        active.times_rows(basis, _contiguous((inner * roots).T)),
        active.times_columns(_contiguous(inner / roots), lines),
    )
    weakest = [roots[-1] / np.sqrt(length) for length in shape]
    left, right = (
        _contiguous(np.clip(np.rint(factor / (step * unit)), -127, 127))
        for factor, unit in zip(factors, weakest, strict=True)
    )
    energy = active.times_columns(left, left) * active.times_rows(right, right)
    likeness = active.times_columns(left, basis) * active.times_rows(right, lines)
    total = float(energy.sum(dtype=np.float64))
    return left, right, np.float32(likeness.sum(dtype=np.float64) / total if total else 0)


@lru_cache(4)
def _random(count: int, length: int) -> Floats:
    """Lines to set out from; not to be changed."""
    return np.random.default_rng(0).standard_normal((count, length), np.float32)


def _contiguous(values: NDArray[np.floating]) -> Floats:
    return np.ascontiguousarray(values, np.float32)


def _principal(squares: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvectors (columns) of a small symmetric matrix, and the roots of their values, which
    fall; all zeros where it is not finite.
    """
    if not np.isfinite(squares).all():
        return np.zeros(squares.shape), np.zeros(squares.shape[0])
    values, vectors = np.linalg.eigh(squares.astype(np.float64))
    return vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0))


def _orthonormal(columns: Floats) -> Floats | None:
    """An orthonormal basis of what some columns span; None where they are 0, or not finite.

    By their small products only: what works on long columns in LAPACK would start threads of its
    own in each of ours.
    """
    active = kernels.active()
    vectors, sizes = _principal(active.times_columns(columns, columns))
    there = sizes > 1e-5 * max(sizes[0], 1e-30)
    if not there.any():
        return None
    return np.asarray(
        active.times_rows(columns, _contiguous((vectors[:, there] / sizes[there]).T)), np.float32
    )


def factors_of(payload: bytes, count: int) -> tuple[Floats, Floats, np.float32]:
    """Left, right and scale of a slice of `count` words that `put_directions` made."""
    (columns, start, rank, scale), at = take(_HEAD, memoryview(payload), 0)
    height = Rows(int(columns), int(start)).count(count)
    size = int(rank) * (height + int(columns))
    stored, _ = get_section(memoryview(payload), at, size, short=True)
    return *_split(stored, int(rank), height), np.float32(scale)


def decode_low_rank(
    data: memoryview, second: Words | None, count: int, dtype: str, out: Words | None = None
) -> Words:
    """The product of both factors, times a scale, times sqrt(second) if there is one; in `out`, if
    there is one for float32.

    Raises:
        TruncatedError, CorruptionError: `data` is not such a slice of `count` words.
    """
    (columns, start, rank, scale), at = take(_HEAD, data, 0)
    rows, rank = get_rows(int(columns), int(start)), int(rank)
    height = rows.count(count)
    if columns > count or not 1 <= rank <= min(MAX_RANK, height, columns):
        raise CorruptionError("corrupt frame: invalid shape of factors")
    stored, at = get_section(data, at, rank * (height + rows.columns), short=True)
    if at != len(data) or not int(stored.min()):
        raise CorruptionError("corrupt frame: trailing bytes, or a factor out of range")
    factors = _split(stored, rank, height)
    squares = np.ones(count, np.float32) if second is None else to_float32(second, dtype)
    near = room_for_floats(count, dtype, out)
    kernels.active().directions(*factors, rows.start, np.float32(scale), squares, near)
    return from_float32(near, dtype)


def _split(stored: Bytes, rank: int, height: int) -> tuple[Floats, Floats]:
    values = stored.astype(np.float32) - _ZERO
    return (
        values[: rank * height].reshape(height, rank),
        values[rank * height :].reshape(rank, -1),
    )
