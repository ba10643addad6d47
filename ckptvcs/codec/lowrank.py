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
    height = rows.count(words.size)
    matrix = np.zeros((height, rows.columns), np.float32)
    units = matrix.reshape(-1)[rows.start : rows.start + words.size]
    np.sqrt(squares, out=units)
    some = bool(units.min(initial=1) > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(values, units, out=units)
    if not some:
        units[(squares == 0) & (values == 0)] = 0
    if not np.isfinite(loops.active().extent(units)[1]):
        return None
    found = _factors(matrix, min(rank, height, rows.columns), step)
    if found is None:
        return None
    left, right = found
    product = left.astype(np.float32) @ right.astype(np.float32)
    energy = float(np.vdot(product, product))
    scale = np.float32(float(np.vdot(product, matrix)) / energy) if energy else np.float32(0)
    stored = np.concatenate((left.reshape(-1), right.reshape(-1))) + _ZERO
    payload = _HEAD.pack(rows.columns, rows.start, left.shape[1], scale)
    payload += put_section(stored.astype(np.uint8))
    near = product.reshape(-1)[rows.start : rows.start + words.size]
    if near.size != product.size:
        near = near.copy()  # what is decoded must not hold on to more
    return payload, _scaled(near, scale, second, dtype)


def _factors(
    matrix: Floats, rank: int, step: float
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """The strongest directions of a matrix (by one power iteration from random ones), each shared
    evenly between both factors, in whole steps.
    """
    draw = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + _MORE), np.float32)
    basis = np.linalg.qr(matrix @ draw)[0]
    basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    inner, sizes, outer = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = int(np.count_nonzero(sizes[:rank] > 1e-6 * sizes[0]))
    if not kept or not np.isfinite(sizes).all():
        return None
    roots = np.sqrt(sizes[:kept])
    factors = (basis @ inner)[:, :kept] * roots, roots[:, None] * outer[:kept]
    weakest = [roots[-1] / np.sqrt(length) for length in matrix.shape]
    left, right = (
        np.clip(np.rint(factor / (step * unit)), -127, 127).astype(np.int32)
        for factor, unit in zip(factors, weakest, strict=True)
    )
    return left, right


def _scaled(product: Floats, scale: np.float32, second: Words, dtype: str) -> Words:
    """The words of product * scale * sqrt(second); the product's memory is used for it."""
    with np.errstate(over="ignore", invalid="ignore"):
        product *= scale
        product *= np.sqrt(to_float32(second, dtype))
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
    stored, at = get_section(data, at, rank * (height + rows.columns))
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
