"""First moments as a product of two thin matrices, in units of the root of the second.

An average of some gradients has few directions: at ten bits for a row and a column, as much of it
comes back as from seven times the bits spent on its entries (docs/codec.md has the figures).  Both
factors are small integers, so that their product is exact in any order of adding up, on any
machine.  Layout: docs/format.md, "Near slices".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import loops
from ckptvcs.codec.planes import Bytes, get_section, put_section
from ckptvcs.codec.rows import Rows, get_rows, take
from ckptvcs.codec.words import Words, from_float32, to_float32
from ckptvcs.errors import CorruptionError

Floats = NDArray[np.float32]

_HEAD = struct.Struct("<IIBf")  # columns, start, rank, scale
_ZERO = 128  # stored for a factor of 0
_MORE = 2  # directions that are looked at beyond those that are kept
MAX_RANK = 64  # 64 * 127^2 is below 2^24: float32 adds up such products exactly


def encode_low_rank(
    words: Words, second: Words, dtype: str, rows: Rows, rank: int, step: float
) -> tuple[bytes, Words] | None:
    """Code one slice of a first moment as `rank` directions of moment / sqrt(second).

    `step` is that of the factors, in root mean squares of the weakest direction that is kept.

    Returns the slice, and what `decode_low_rank` will return; None where values are not finite, or
    not zero where `second` is, or where there is nothing.
    """
    values, squares = to_float32(words, dtype), to_float32(second, dtype)
    units, good = loops.active().divide_roots(values, squares)
    if not good:
        return None
    height = rows.count(words.size)
    if words.size == height * rows.columns:
        matrix = units.reshape(height, rows.columns)
    else:
        matrix = np.zeros((height, rows.columns), np.float32)
        matrix.reshape(-1)[rows.start : rows.start + words.size] = units
    found = _factors(matrix, min(rank, height, rows.columns), step)
    if found is None:
        return None
    left, right, scale = found
    stored = np.concatenate((left.reshape(-1), right.reshape(-1))) + _ZERO
    payload = _HEAD.pack(rows.columns, rows.start, left.shape[1], scale)
    payload += put_section(stored.astype(np.uint8), short=True)
    near = loops.active().outer_sum(left, right, rows.start, words.size)
    return payload, _scaled(near, scale, second, dtype)


def _factors(matrix: Floats, rank: int, step: float) -> tuple[Floats, Floats, np.float32] | None:
    """The strongest directions of a matrix (by one power iteration from random ones), each shared
    evenly between both factors, in whole steps; and the scale that fits their product best.
    """
    active = loops.active()
    lines = np.random.default_rng(0).standard_normal((rank + _MORE, matrix.shape[1]), np.float32)
    for _ in range(2):
        basis = _orthonormal(active.times_rows(matrix, lines))
        lines = active.times_columns(basis, matrix)
    inner, sizes = _principal(active.times_rows(lines, lines))
    kept = int(np.count_nonzero(sizes[:rank] > 1e-6 * sizes[0]))
    if not kept or not np.isfinite(sizes).all():
        return None
    # What a direction takes to the left and to the right of its size's root.
    inner, roots = inner[:, :kept], np.sqrt(sizes[:kept])
    factors = (
        active.times_rows(basis, _contiguous((inner * roots).T)),
        active.times_columns(_contiguous(inner / roots), lines),
    )
    weakest = [roots[-1] / np.sqrt(length) for length in matrix.shape]
    left, right = (
        _contiguous(np.clip(np.rint(factor / (step * unit)), -127, 127))
        for factor, unit in zip(factors, weakest, strict=True)
    )
    energy = active.times_columns(left, left) * active.times_rows(right, right)
    likeness = active.times_columns(left, basis) * active.times_rows(right, lines)
    total = float(energy.sum(dtype=np.float64))
    return left, right, np.float32(likeness.sum(dtype=np.float64) / total if total else 0)


def _contiguous(values: NDArray[np.floating]) -> Floats:
    return np.ascontiguousarray(values, np.float32)


def _principal(squares: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvectors (columns) of a small symmetric matrix, and the roots of their values, which
    fall.
    """
    values, vectors = np.linalg.eigh(squares.astype(np.float64))
    return vectors[:, ::-1], np.sqrt(np.maximum(values[::-1], 0))


def _orthonormal(columns: Floats) -> Floats:
    """An orthonormal basis of what some columns span.

    By their small products only: what works on long columns in LAPACK would start threads of its
    own in each of ours.
    """
    active = loops.active()
    vectors, sizes = _principal(active.times_columns(columns, columns))
    there = sizes > 1e-5 * max(sizes[0], 1e-30)
    return np.asarray(
        active.times_rows(columns, _contiguous((vectors[:, there] / sizes[there]).T)), np.float32
    )


def _scaled(product: Floats, scale: np.float32, second: Words, dtype: str) -> Words:
    """The words of product * scale * sqrt(second); the product's memory is used for it."""
    loops.active().multiply_roots(product, scale, to_float32(second, dtype))
    return from_float32(product, dtype)


def decode_low_rank(data: memoryview, second: Words, count: int, dtype: str) -> Words:
    """The product of both factors, times a scale, times sqrt(second).

    Raises:
        TruncatedError, CorruptionError: `data` is no such slice of `count` words.
    """
    (columns, start, rank, scale), at = take(_HEAD, data, 0)
    rows, rank = get_rows(int(columns), int(start)), int(rank)
    height = rows.count(count)
    if columns > count or not 1 <= rank <= min(MAX_RANK, height, columns):
        raise CorruptionError("a frame holds factors of an impossible shape")
    stored, at = get_section(data, at, rank * (height + rows.columns), short=True)
    if at != len(data) or not int(stored.min()):
        raise CorruptionError("a frame has bytes after its factors, or a factor out of range")
    near = loops.active().outer_sum(*_split(stored, rank, height), rows.start, count)
    return _scaled(near, np.float32(scale), second, dtype)


def _split(stored: Bytes, rank: int, height: int) -> tuple[Floats, Floats]:
    values = stored.astype(np.float32) - _ZERO
    return (
        values[: rank * height].reshape(height, rank),
        values[rank * height :].reshape(rank, -1),
    )
