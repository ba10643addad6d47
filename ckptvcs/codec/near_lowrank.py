"""First moments as low-rank matrices: a sum of rank-1 components.

exp_avg / sqrt(exp_avg_sq) is an average of few gradients, so that few components describe it.
Encoding single entries takes seven times as many bits for the same error (docs/codec.md). The
factors are small integers: their products are exact in any order of summation, on every machine.
Layout: docs/format.md, "Near slices", methods 9 and 10.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.matrix import Rows, get_rows
from ckptvcs.codec.sections import get_section, put_section, take
from ckptvcs.codec.words import Floats, NearSlice, Words, from_float32, room_for_floats, to_float32
from ckptvcs.errors import CorruptionError

_HEAD = struct.Struct("<IIBf")  # columns, start, rank, scale
ONE = np.float32(1)
_ZERO = 128  # the byte of factor 0
_EXTRA = 2  # components that the power iteration has beyond those that are kept
_THIN = 12  # rows per component in the first iteration
MAX_RANK = 64  # 64 * 127^2 is below 2^24: float32 sums of such products are exact


def encode_low_rank(
    words: Words,
    second: Words | None,
    dtype: str,
    rows: Rows,
    rank: int,
    step: float,
    roots: tuple[Floats, Floats] | None = None,
) -> NearSlice | None:
    """Encode a slice of a first moment as components of moment / sqrt(second), or of the moment.

    `second` holds the decoded words of the second moment. If it is the product of a row factor and
    a column factor without zeros, `roots` are the square roots of these. `step` is the
    quantization step of the factors, in root mean squares of the weakest component.

    Returns None if the ratio is not finite, or has no component.
    """
    values, height = to_float32(words, dtype), rows.count(words.size)
    if roots is None:
        if second is not None:
            values, is_finite = kernels.active().divide_roots(values, to_float32(second, dtype))
            if not is_finite:
                return None
        roots = np.ones(height, np.float32), np.ones(rows.columns, np.float32)
    if words.size == height * rows.columns:
        matrix = values.reshape(height, rows.columns)
    else:
        matrix = np.zeros((height, rows.columns), np.float32)
        matrix.reshape(-1)[rows.start : rows.start + words.size] = values
    payload = put_components(_Scaled(matrix, ONE / roots[0], ONE / roots[1]), rows, rank, step)
    if payload is None:
        return None
    return NearSlice(payload, decode_low_rank(memoryview(payload), second, words.size, dtype))


def put_components(matrix: Matrix, rows: Rows, rank: int, step: float) -> bytes | None:
    """Encode moment / sqrt(second), given as `matrix`; None as in `encode_low_rank`."""
    with np.errstate(over="ignore", invalid="ignore"):
        factors = _factors(matrix, rank, step)
    if factors is None:
        return None
    left, right, scale = factors
    stored = np.concatenate((left.reshape(-1), right.reshape(-1))) + _ZERO
    head = _HEAD.pack(rows.columns, rows.start, left.shape[1], scale)
    return head + put_section(stored.astype(np.uint8), short=True)


class Matrix(Protocol):
    """A matrix [rows, columns] in memory or on a device."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of rows and columns."""

    def times_rows(self, lines: Floats) -> Floats:
        """Return matrix @ lines.T, for lines [k, columns]."""

    def times_columns(self, left: Floats) -> Floats:
        """Return left.T @ matrix, for left [rows, k]."""

    def thinned(self, height: int) -> Matrix:
        """Return at least `height` of the rows (or all), at even distances."""


@dataclass(frozen=True)
class _Scaled:
    """A matrix with a factor for each row and each column."""

    matrix: Floats
    row: Floats
    column: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def times_rows(self, lines: Floats) -> Floats:
        return kernels.active().times_rows(self.matrix, lines * self.column) * self.row[:, None]

    def times_columns(self, left: Floats) -> Floats:
        return kernels.active().times_columns(left * self.row[:, None], self.matrix) * self.column

    def thinned(self, height: int) -> Matrix:
        stride = max(1, self.matrix.shape[0] // height)
        return _Scaled(_contiguous(self.matrix[::stride]), self.row[::stride], self.column)


def _factors(matrix: Matrix, rank: int, step: float) -> tuple[Floats, Floats, np.float32] | None:
    """Return the strongest components of a matrix: left [rows, k], right [k, columns], and a scale.

    The power iteration begins with random vectors. Both factors of a component get the same share
    of its size and are rounded to whole steps. The scale minimizes the squared error.
    """
    active = kernels.active()
    shape = matrix.shape
    rank = min(rank, *shape)
    lines = _random(rank + _EXTRA, shape[1])
    for part in (matrix.thinned(_THIN * (rank + _EXTRA)), matrix):  # some rows, then all
        basis = _orthonormal(part.times_rows(lines))
        if basis is None:
            return None
        lines = part.times_columns(basis)
    assert basis is not None
    inner, sizes = _principal(active.times_rows(lines, lines))
    kept = int(np.count_nonzero(sizes[:rank] > 1e-6 * sizes[0]))
    if not kept:
        return None
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
    squares = active.times_columns(left, left) * active.times_rows(right, right)
    products = active.times_columns(left, basis) * active.times_rows(right, lines)
    total = float(squares.sum(dtype=np.float64))
    return left, right, np.float32(products.sum(dtype=np.float64) / total if total else 0)


@lru_cache(4)
def _random(count: int, length: int) -> Floats:
    """Return random vectors [count, length]; a caller must not change them."""
    return np.random.default_rng(0).standard_normal((count, length), np.float32)


def _contiguous(values: NDArray[np.floating]) -> Floats:
    return np.ascontiguousarray(values, np.float32)


def _principal(squares: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the eigenvectors (columns) of a symmetric matrix, and the roots of its eigenvalues.

    The largest come first. All are 0 if the matrix is not finite.
    """
    if not np.isfinite(squares).all():
        return np.zeros(squares.shape), np.zeros(squares.shape[0])
    values, vectors = np.linalg.eigh(squares.astype(np.float64))
    return vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0))


def _orthonormal(columns: Floats) -> Floats | None:
    """Return an orthonormal basis of the span of columns; None if they are 0 or not finite.

    LAPACK sees only the small matrix of their products, because on long columns it would start
    threads in each of our threads.
    """
    active = kernels.active()
    vectors, sizes = _principal(active.times_columns(columns, columns))
    kept = sizes > 1e-5 * max(sizes[0], 1e-30)
    if not kept.any():
        return None
    return active.times_rows(columns, _contiguous((vectors[:, kept] / sizes[kept]).T))


def factors_of(payload: bytes | memoryview, count: int) -> tuple[Floats, Floats, int, np.float32]:
    """Return left [rows, rank], right [rank, columns], start and scale of a slice.

    Raises as `decode_low_rank`.
    """
    data = memoryview(payload)
    (columns, start, rank, scale), at = take(_HEAD, data, 0)
    height = get_rows(columns, start).count(count)
    if columns > count or not 1 <= rank <= min(MAX_RANK, height, columns):
        raise CorruptionError("corrupt frame: invalid shape of factors")
    stored, at = get_section(data, at, rank * (height + columns), short=True)
    if at != len(data) or not int(stored.min()):
        raise CorruptionError("corrupt frame: trailing bytes, or a factor out of range")
    left, right = np.split(stored.astype(np.float32) - _ZERO, [rank * height])
    return left.reshape(height, rank), right.reshape(rank, columns), start, np.float32(scale)


def decode_low_rank(
    data: memoryview, second: Words | None, count: int, dtype: str, out: Words | None = None
) -> Words:
    """Decode a slice of `count` words: method 9, or 10 without `second`.

    `second` holds the words of the second moment. The result may use the memory of `out`.

    Raises:
        TruncatedError, CorruptionError: `data` is not a low-rank slice of `count` words.
    """
    factors = factors_of(data, count)
    squares = np.ones(count, np.float32) if second is None else to_float32(second, dtype)
    near = room_for_floats(count, dtype, out)
    kernels.active().directions(*factors, squares, near)
    return from_float32(near, dtype)
