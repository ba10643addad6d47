"""The inner loops of the codec in numpy, which define their results.

`compiled` gives the same bits for all results that are stored or decoded. Arrays are flat float32
if nothing else is stated; bitmaps are uint8 [(n + 7) / 8], the first entry in the top bit of the
first byte. A matrix (columns, start) is that of "Near slices" in docs/format.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.words import Bytes, Floats, Integers, Words, double_squares

Positions = NDArray[np.int32] | NDArray[np.int64]

_FEW_PRODUCTS = 1 << 18  # OpenBLAS starts its threads for more; the callers are threads already


def _expand(rows: Floats, columns: int, start: int, count: int) -> Floats:
    """Repeat the value of each row for its `count` entries (unless there is one row)."""
    if rows.size == 1:
        return rows
    ends = np.minimum(np.arange(1, rows.size + 1) * columns - start, count)
    return np.repeat(rows, np.diff(ends, prepend=0))


def code_residuals(
    values: Floats,
    base: Floats,
    weights: Floats,
    scale: np.float32,
    step: np.float32,
    zone: np.float32,
    amounts: Floats,
    factors: Floats,
    columns: int,
    start: int,
) -> tuple[Floats, Bytes, Integers, tuple[float, ...], float]:
    """Quantize values * scale - round(base * scale) in steps of step * the factor of the row.

    Returns (a) the base after `change`; (b) the bitmap of the codes that are not 0; (c) these
    codes; (d) the result of `weight_squares`; (e) an upper bound of |values| and |base|, not finite
    if one of them is not. The other results are valid only if (e) is below 2^24 / scale.
    """
    factor = _expand(factors, columns, start, values.size)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        units = values * scale - np.rint(base * scale)
        units /= step * factor
        units += np.copysign(np.float32(1) - zone, units)
        codes = np.where(np.abs(units) < 1 << 24, units, 0).astype(np.int32)
        near, found = base.copy(), np.flatnonzero(codes)
        _move(near, found, codes[found], scale, step, amounts, factors, columns, start)
        sums = weight_squares(near, values, base, weights)
    largest = float(np.maximum(extent(values)[1], extent(base)[1]))  # NaN if one is NaN
    return near, np.packbits(codes != 0), codes[found], sums, largest


def quantize_units(
    values: Floats, second: Floats, step: np.float32, zone: np.float32
) -> tuple[Bytes, Integers, bool]:
    """Quantize values / sqrt(second) in steps; 0 / 0 is 0.

    Returns the bitmap of the codes that are not 0, these codes, and whether all quotients are
    finite and below 2^23 steps.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        units = values / np.sqrt(second) / step
        units[(second == 0) & (values == 0)] = 0
        good = bool((np.abs(units) < 1 << 23).all())
        units += np.copysign(np.float32(1) - zone, units)
        found = np.abs(units) >= 1
        return np.packbits(found), units[found].astype(np.int32), good


def extent(values: Floats) -> tuple[float, float]:
    """Return the smallest and the largest magnitude; the latter is not finite if a value is not."""
    sizes = np.abs(values)
    return float(sizes.min(initial=np.inf)), float(sizes.max(initial=0))


def bit_positions(bitmap: Bytes, count: int) -> Positions:
    """Return the positions of the set bits among the first `count`."""
    # numpy finds True six times faster than bytes that are not 0.
    return np.flatnonzero(np.unpackbits(bitmap, count=count).view(np.bool_))


def split(codes: Integers) -> tuple[Bytes, Bytes, Integers]:
    """Return bitmaps of negative codes and of magnitudes above 1, and these magnitudes."""
    sizes = np.abs(codes)
    large = sizes > 1
    return np.packbits(codes < 0), np.packbits(large), sizes[large]


def with_signs(sizes: Integers, signs: Bytes) -> Integers:
    """Return the sizes, negated if their bit in `signs` is set."""
    minus = np.negative(np.unpackbits(signs, count=sizes.size).view(np.int8)).astype(np.int32)
    return (sizes ^ minus) - minus  # two's complement: -1 inverts the bits and adds 1


def join_bits(planes: Bytes, high: Bytes, count: int, bits: int) -> Integers:
    """Return (high - 128) * 2^bits + the low bits, which are stored as bit planes.

    Without `high`, only the low bits.
    """
    out = np.zeros(count, np.int32)
    each = (count + 7) // 8
    for bit in range(bits):
        row = np.unpackbits(planes[bit * each : (bit + 1) * each], count=count)
        out |= row.astype(np.int32) << bit
    out[: high.size] += (high.astype(np.int32) - 128) << bits
    return out


def change(
    out: Floats,
    bitmap: Bytes,
    codes: Integers,
    scale: np.float32,
    step: np.float32,
    amounts: Floats,
    factors: Floats,
    columns: int,
    start: int,
) -> None:
    """Replace entries whose bit is set by (round(out * scale) + round(amount * factor)) / scale.

    `codes` are those of the set bits. The amount of code c is amounts[c & 255] if |c| < 128, else
    c * step. `amounts` has 256 entries, `scale` is a power of two, `factors` has one per row.
    """
    found = bit_positions(bitmap, out.size)
    with np.errstate(over="ignore", invalid="ignore"):
        _move(out, found, codes, scale, step, amounts, factors, columns, start)


def _move(
    out: Floats,
    found: Positions,
    codes: Integers,
    scale: np.float32,
    step: np.float32,
    amounts: Floats,
    factors: Floats,
    columns: int,
    start: int,
) -> None:
    # `take` is faster than an index in brackets.
    amount = amounts.take(codes & 255)
    if codes.size and max(int(codes.max()), -int(codes.min())) >= 128:
        amount = np.where(np.abs(codes) < 128, amount, codes.astype(np.float32) * step)
    amount *= factors if factors.size == 1 else factors.take((found + start) // columns)
    np.rint(amount, out=amount)
    amount += np.rint(out.take(found) * scale)
    amount *= np.float32(1) / scale
    out[found] = amount


def gap_positions(gaps: Bytes) -> Positions:
    """Return the positions of kept entries from their gaps (mask form 1)."""
    final = gaps != 255
    found: Positions = np.cumsum(gaps.astype(np.int64) + final)[final] - 1
    return found


def log_sums(
    values: Floats, columns: int, start: int, rows: int
) -> tuple[Floats, Integers, Floats, Integers, float, float]:
    """Return sums of log2 and counts of the values above 0, by row and by column.

    Also the smallest value above 0 and the largest value. No value is negative.
    """
    matrix = np.zeros((rows, columns), np.float32)
    matrix.reshape(-1)[start : start + values.size] = values
    above = matrix > 0
    logs = np.log2(matrix, out=np.zeros_like(matrix), where=above)
    return (
        logs.sum(1),
        above.sum(1, dtype=np.int32),
        logs.sum(0),
        above.sum(0, dtype=np.int32),
        float(matrix.min(where=above, initial=np.inf)),
        float(values.max(initial=0)),
    )


def product(row: Floats, column: Floats, start: int, out: Floats) -> None:
    """Write row * column to `out`, from entry `start` of the first row on."""
    out[:] = np.multiply.outer(row, column).reshape(-1)[start : start + out.size]


def divide_roots(values: Floats, second: Floats) -> tuple[Floats, bool]:
    """Return values / sqrt(second), with 0 / 0 = 0, and whether all are finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        units = np.asarray(values / np.sqrt(second), np.float32)
        units[(second == 0) & (values == 0)] = 0
        return units, bool(np.isfinite(units).all())


def times_rows(matrix: Floats, lines: Floats) -> Floats:
    """Return matrix @ lines.T."""
    product: Floats = matrix @ lines.T
    return product


def times_columns(left: Floats, matrix: Floats) -> Floats:
    """Return left.T @ matrix."""
    product: Floats = left.T @ matrix
    return product


def directions(
    left: Floats, right: Floats, start: int, scale: np.float32, second: Floats, out: Floats
) -> None:
    """Write ((left @ right) * scale) * sqrt(second) to `out`, from entry `start` on.

    `left` [rows, rank] and `right` [rank, columns] hold integers.
    """
    columns = right.shape[1]
    matrix = np.empty((left.shape[0], columns), np.float32)
    rows = max(1, _FEW_PRODUCTS // max(1, right.size))
    for low in range(0, left.shape[0], rows):
        np.matmul(left[low : low + rows], right, out=matrix[low : low + rows])
    out[:] = matrix.reshape(-1)[start : start + second.size]
    with np.errstate(over="ignore", invalid="ignore"):
        out *= scale
        out *= np.sqrt(second)


def squares(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Return the sums of (x - y)^2 and of y^2, and the largest |x - y|."""
    error = x - y
    total = float(double_squares(error).sum())
    energy = float(double_squares(y).sum())
    return total, energy, float(np.abs(error).max(initial=0))


def weight_squares(
    near: Floats, true: Floats, base: Floats, weights: Floats
) -> tuple[float, float, float, float, float, float]:
    """Return sums over squares, and the largest |near - true|.

    The sums are of (near - true)^2, true^2 and (true - base)^2, and of the first and the third
    times weights (0 without weights).
    """
    error, energy, largest = squares(near, true)
    change = double_squares(true - base)
    weighted = [0.0, 0.0]
    if weights.size:
        weighted = [float(np.dot(s, weights)) for s in (np.square(near - true), change)]
    return error, energy, float(change.sum()), weighted[0], weighted[1], largest


def root_squares(x: Floats, y: Floats) -> tuple[float, float]:
    """Return the sums of (sqrt x - sqrt y)^2 and of x."""
    error = np.sqrt(x) - np.sqrt(y)
    return float(double_squares(error).sum()), float(x.sum(dtype=np.float64))


def _order(words: Words, floating: bool) -> Words:
    """Return order(words) of "Lossless slice": integers in the order of the floats."""
    if not floating:
        return words
    signed = words.view(f"<i{words.dtype.itemsize}")
    bits = words.dtype.itemsize * 8
    low = words.dtype.type((1 << (bits - 1)) - 1)
    return words ^ ((signed >> (bits - 1)).view(words.dtype) & low)


def split_words(words: Words, base: Words, transform: int, floating: bool) -> NDArray[np.uint8]:
    """Transform words (transforms of `lossless`) and split them: uint8 [word size, n].

    The least significant bytes come first. Only transform 2 uses `base`.
    """
    one, top = words.dtype.type(1), words.dtype.type(words.itemsize * 8 - 1)
    if transform == 2:
        delta = _order(words, floating) - _order(base, floating)
        signed = delta.view(f"<i{words.itemsize}")
        words = (delta << one) ^ (signed >> signed.dtype.type(top)).view(words.dtype)
    elif transform == 1:
        words = (words << one) | (words >> top)
    return np.ascontiguousarray(words.view(np.uint8).reshape(words.size, words.itemsize).T)


def split_near(
    words: Words, near: Words, floating: bool, raw: int
) -> tuple[NDArray[np.uint8], Bytes, Integers, bool]:
    """Apply transform 2 and split off the `raw` lowest bytes: uint8 [raw, n].

    Also returns the bitmap of the entries with higher bits, these higher bits, and whether
    `join_words` restores the words.
    """
    planes = split_words(words, near, 2, floating)
    back = np.empty_like(words)
    join_words(planes, near, 2, floating, back)
    high = np.zeros(words.size, np.uint32)
    for plane in range(raw, words.itemsize):
        high |= planes[plane].astype(np.uint32) << np.uint32(8 * (plane - raw))
    found = high != 0
    return planes[:raw], np.packbits(found), high[found].view(np.int32), bool((back == words).all())


def join_words(
    planes: NDArray[np.uint8], base: Words, transform: int, floating: bool, out: Words
) -> None:
    """Undo `split_words`; write the words to `out`."""
    one, top = out.dtype.type(1), out.dtype.type(out.itemsize * 8 - 1)
    words = np.ascontiguousarray(planes.T).reshape(-1).view(out.dtype)
    if transform == 2:
        delta = (words >> one) ^ (~(words & one) + one)
        words = _order(delta + _order(base, floating), floating)
    elif transform == 1:
        words = (words >> one) | (words << top)
    out[:] = words
