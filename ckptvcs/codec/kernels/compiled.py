"""The functions of `reference`, compiled with numba, each in one pass over memory.

Functions whose results are stored or decoded use exact IEEE arithmetic in a fixed order, so both
implementations give the same bits. Functions that only measure (`_LOOSE`) may sum in any order.

numba caches compiled functions and checks only whether the file of a function changed. After a
change to `compiled_bits`, this file must be changed, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from ckptvcs.codec.kernels.compiled_bits import BLOCK, EXACT, I32, INT, U8, compact, positions
from ckptvcs.codec.kernels.compiled_bits import bit_positions as bit_positions
from ckptvcs.codec.kernels.compiled_bits import gap_positions as gap_positions
from ckptvcs.codec.kernels.compiled_bits import join_bits as join_bits
from ckptvcs.codec.kernels.compiled_bits import join_words as join_words
from ckptvcs.codec.kernels.compiled_bits import split as split
from ckptvcs.codec.kernels.compiled_bits import split_near as split_near
from ckptvcs.codec.kernels.compiled_bits import split_words as split_words
from ckptvcs.codec.kernels.compiled_bits import with_signs as with_signs

Array = Any

_F32 = types.Array(types.float32, 1, "C", readonly=True)
_OUT = types.float32[::1]
_MATRIX = types.Array(types.float32, 2, "C", readonly=True)
_FLOAT = types.float32

_LOOSE = EXACT | {"fastmath": {"reassoc", "contract", "nsz", "arcp"}}  # NaNs stay NaNs

_ZERO = np.float32(0)
_TILE = 512  # columns; a dozen rows of so many floats fit into the L1 cache


@njit(**_LOOSE)
def _add_squares(near: Array, true: Array, base: Array, weights: Array, sums: Array) -> Any:
    """Add the sums of `weight_squares` over a block; return an upper bound of |true| and |base|."""
    one, two, three, four, five = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for i in range(true.size):
        e, d = near[i] - true[i], true[i] - base[i]
        one += e * e
        two += true[i] * true[i]
        three += d * d
        if weights.size:
            four += weights[i] * (e * e)
            five += weights[i] * (d * d)
    sums[0] += one
    sums[1] += two
    sums[2] += three
    sums[3] += four
    sums[4] += five
    # Roots of sums of squares, with a margin for rounding and for squares that underflow.
    return np.float32(1.001) * (np.sqrt(two) + np.sqrt(three)) + np.float32(4e-19)


@njit(**EXACT)
def _largest_error(near: Array, true: Array) -> Any:
    """Return the bits of the largest |near - true|; floats without sign are ordered as integers."""
    largest = np.int32(0)
    for i in range(true.size):
        error = np.float32(near[i] - true[i]).view(np.int32)
        largest = max(largest, error & np.int32(0x7FFFFFFF))
    return largest


@njit((_F32, _F32, _F32, _F32), **_LOOSE)
def weight_squares(near: Array, true: Array, base: Array, weights: Array) -> Any:
    """See `reference.weight_squares`."""
    sums, largest = np.zeros(5, np.float64), np.int32(0)
    for low in range(0, true.size, BLOCK):
        high = min(true.size, low + BLOCK)
        x, y = near[low:high], true[low:high]
        _add_squares(x, y, base[low:high], weights[low:high], sums)
        largest = max(largest, _largest_error(x, y))
    sizes = np.array([largest], np.int32).view(np.float32)
    return sums[0], sums[1], sums[2], sums[3], sums[4], sizes[0]


@njit(**EXACT)
def _code_row(
    x: Array,
    b: Array,
    out: Array,
    codes: Array,
    amount: Array,
    scale: Any,
    step: Any,
    more: Any,
    amounts: Array,
    factor: Any,
) -> None:
    own, unit = step * factor, np.float32(1) / scale
    for i in range(x.size):
        y = (x[i] * scale - np.rint(b[i] * scale)) / own
        y += np.float32(np.copysign(more, y))
        codes[i] = np.int32(y if abs(y) < np.float32(1 << 24) else np.float32(0))
    for i in range(x.size):
        amount[i] = amounts[codes[i] & np.int32(255)]
    for i in range(x.size):
        c = codes[i]
        a = amount[i] if abs(c) < np.int32(128) else np.float32(c) * step
        moved = (np.rint(b[i] * scale) + np.rint(a * factor)) * unit
        out[i] = moved if c != 0 else b[i]


@njit((_F32, _F32, _F32, _FLOAT, _FLOAT, _FLOAT, _F32, _F32, INT, INT), **EXACT)
def code_residuals(
    values: Array,
    base: Array,
    weights: Array,
    scale: Any,
    step: Any,
    zone: Any,
    amounts: Array,
    factors: Array,
    columns: int,
    start: int,
) -> Any:
    """See `reference.code_residuals`."""
    near = np.empty(values.size, np.float32)
    bitmap = np.empty((values.size + 7) // 8, np.uint8)
    kept = np.empty(values.size + 1, np.int32)
    codes, amount = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
    more, found, bound = np.float32(1) - zone, 0, _ZERO
    sums, largest = np.zeros(5, np.float64), np.int32(0)
    for low in range(0, values.size, BLOCK):
        high = min(values.size, low + BLOCK)
        at, row = low, (low + start) // columns
        while at < high:
            end = min(high, (row + 1) * columns - start)
            _code_row(
                values[at:end],
                base[at:end],
                near[at:end],
                codes[at - low : end - low],
                amount,
                scale,
                step,
                more,
                amounts,
                factors[row if factors.size > 1 else 0],
            )
            at = end
            row += 1
        x, b = values[low:high], base[low:high]
        size = _add_squares(near[low:high], x, b, weights[low:high], sums)
        largest = max(largest, _largest_error(near[low:high], x))
        bound = max(bound, size if size < np.inf else np.float32(np.inf))  # NaN becomes infinite
        bits = bitmap[low >> 3 : (high + 7) >> 3]
        codes[high - low : 8 * bits.size] = 0
        found += compact(codes[: 8 * bits.size], bits, kept[found:])
    sizes = np.array([largest], np.int32).view(np.float32)
    return (
        near,
        bitmap,
        kept[:found].copy(),
        (sums[0], sums[1], sums[2], sums[3], sums[4], sizes[0]),
        bound,
    )


@njit((_F32, _F32, _FLOAT, _FLOAT), **EXACT)
def quantize_units(values: Array, second: Array, step: Any, zone: Any) -> Any:
    """See `reference.quantize_units`."""
    bitmap = np.empty((values.size + 7) // 8, np.uint8)
    kept = np.empty(values.size + 1, np.int32)
    codes = np.empty(BLOCK, np.int32)
    more, found, bad = np.float32(1) - zone, 0, 0
    for low in range(0, values.size, BLOCK):
        high = min(values.size, low + BLOCK)
        x, s = values[low:high], second[low:high]
        for i in range(x.size):
            y = x[i] / np.sqrt(s[i]) / step
            none = s[i] == 0 and x[i] == 0
            y = y if s[i] > 0 else (np.float32(0) if none else np.float32(np.inf))
            bad += not abs(y) < np.float32(1 << 23)
            y += np.float32(np.copysign(more, y))
            codes[i] = np.int32(y if abs(y) < np.float32(1 << 24) else np.float32(0))
        bits = bitmap[low >> 3 : (high + 7) >> 3]
        codes[high - low : 8 * bits.size] = 0
        found += compact(codes[: 8 * bits.size], bits, kept[found:])
    return bitmap, kept[:found].copy(), bad == 0


@njit((_F32,), **EXACT)
def extent(values: Array) -> tuple[Any, Any]:
    """See `reference.extent`."""
    words = values.view(np.int32)
    least, largest = np.int32(0x7F800000), np.int32(0)
    for i in range(words.size):
        size = words[i] & np.int32(0x7FFFFFFF)
        least = min(least, size)
        largest = max(largest, size)
    found = np.array([least, largest], np.int32).view(np.float32)
    return found[0], found[1]


@njit((_OUT, U8, I32, _FLOAT, _FLOAT, _F32, _F32, INT, INT), **EXACT)
def change(
    out: Array,
    bitmap: Array,
    codes: Array,
    scale: Any,
    step: Any,
    amounts: Array,
    factors: Array,
    columns: int,
    start: int,
) -> None:
    """See `reference.change`."""
    places, amount = np.empty(BLOCK + 8, np.uint32), np.empty(BLOCK, np.float32)
    unit, seen = np.float32(1) / scale, 0
    for low in range(0, out.size, BLOCK):
        high = min(out.size, low + BLOCK)
        count = positions(bitmap[low >> 3 : (high + 7) >> 3], 0, places)
        c = codes[seen : seen + count]
        seen += count
        amount[:] = 0
        for i in range(c.size):
            known = amounts[c[i] & np.int32(255)]
            amount[places[i]] = known if abs(c[i]) < np.int32(128) else np.float32(c[i]) * step
        at, row = low, (low + start) // columns
        while at < high:
            end = min(high, (row + 1) * columns - start)
            o, a = out[at:end], amount[at - low : end - low]
            factor = factors[row if factors.size > 1 else 0]
            for i in range(o.size):
                moved = (np.rint(o[i] * scale) + np.rint(a[i] * factor)) * unit
                o[i] = moved if a[i] != 0 else o[i]
            at = end
            row += 1


@njit((_F32, INT, INT, INT), **_LOOSE)
def log_sums(values: Array, columns: int, start: int, rows: int) -> Any:
    """See `reference.log_sums`."""
    row_sums, row_counts = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    sums, counts = np.zeros(columns, np.float32), np.zeros(columns, np.int32)
    words = values.view(np.int32)
    low, least, largest = 0, np.int32(0x7F800000), np.int32(0)
    for row in range(rows):
        high = min(values.size, (row + 1) * columns - start)
        first = low + start - row * columns
        x = words[low:high]
        s, c = sums[first : first + x.size], counts[first : first + x.size]
        total, there = np.float32(0), np.int32(0)
        for i in range(x.size):
            word = x[i]
            m = np.float32(np.int32(word & np.int32(0x7FFFFF))) * np.float32(1 / 8388608)
            # log2(1 + m) within 0.002
            log = np.float32(np.int32(word >> np.int32(23))) - np.float32(127)
            log += m * (np.float32(1.4246) + m * (np.float32(-0.6087) + m * np.float32(0.1841)))
            here = np.int32(1) if word != 0 else np.int32(0)
            log *= np.float32(here)
            total += log
            there += here
            s[i] += log
            c[i] += here
            largest = max(largest, word)
            least = min(least, word if word != 0 else np.int32(0x7F800000))
        row_sums[row] = total
        row_counts[row] = there
        low = high
    edges = np.array([least, largest], np.int32).view(np.float32)
    return row_sums, row_counts, sums, counts, edges[0], edges[1]


@njit((_F32, _F32, INT, _OUT), **EXACT)
def product(row: Array, column: Array, start: int, out: Array) -> None:
    """See `reference.product`."""
    low = 0
    for r in range(row.size):
        high = min(out.size, (r + 1) * column.size - start)
        first = low + start - r * column.size
        o, factor = out[low:high], row[r]
        c = column[first : first + o.size]
        for i in range(o.size):
            o[i] = factor * c[i]
        low = high


@njit((_F32, _F32), **EXACT)
def divide_roots(values: Array, second: Array) -> Any:
    """See `reference.divide_roots`."""
    out = np.empty(values.size, np.float32)
    words = out.view(np.int32)
    largest = np.int32(0)
    for low in range(0, values.size, BLOCK):
        high = min(values.size, low + BLOCK)
        x, s, o, w = values[low:high], second[low:high], out[low:high], words[low:high]
        for i in range(x.size):
            y = x[i] / np.sqrt(s[i])
            o[i] = np.float32(0) if s[i] == 0 and x[i] == 0 else y
        for i in range(x.size):
            largest = max(largest, w[i] & np.int32(0x7FFFFFFF))
    return out, largest < np.int32(0x7F800000)


@njit((_MATRIX, _MATRIX), **_LOOSE)
def times_rows(matrix: Array, lines: Array) -> Array:
    """See `reference.times_rows`. Each read serves the sums of four lines."""
    ranks = lines.shape[0]
    out = np.zeros((matrix.shape[0], ranks), np.float32)
    whole = ranks // 4 * 4
    for low in range(0, matrix.shape[1], _TILE):
        high = min(matrix.shape[1], low + _TILE)
        for row in range(matrix.shape[0]):
            x = matrix[row, low:high]
            for k in range(0, whole, 4):
                y0, y1 = lines[k, low:high], lines[k + 1, low:high]
                y2, y3 = lines[k + 2, low:high], lines[k + 3, low:high]
                t0, t1, t2, t3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for i in range(x.size):
                    t0 += x[i] * y0[i]
                    t1 += x[i] * y1[i]
                    t2 += x[i] * y2[i]
                    t3 += x[i] * y3[i]
                out[row, k] += t0
                out[row, k + 1] += t1
                out[row, k + 2] += t2
                out[row, k + 3] += t3
            for k in range(whole, ranks):
                y0, t0 = lines[k, low:high], np.float32(0)
                for i in range(x.size):
                    t0 += x[i] * y0[i]
                out[row, k] += t0
    return out


@njit((_MATRIX, _MATRIX), **_LOOSE)
def times_columns(left: Array, matrix: Array) -> Array:
    """See `reference.times_columns`. Each write serves the products of four rows."""
    height, ranks = left.shape
    out = np.zeros((ranks, matrix.shape[1]), np.float32)
    whole = height // 4 * 4
    for low in range(0, matrix.shape[1], _TILE):
        high = min(matrix.shape[1], low + _TILE)
        for row in range(0, whole, 4):
            x0, x1 = matrix[row, low:high], matrix[row + 1, low:high]
            x2, x3 = matrix[row + 2, low:high], matrix[row + 3, low:high]
            for k in range(ranks):
                f0, f1, f2, f3 = left[row, k], left[row + 1, k], left[row + 2, k], left[row + 3, k]
                y = out[k, low:high]
                for i in range(x0.size):
                    y[i] += (f0 * x0[i] + f1 * x1[i]) + (f2 * x2[i] + f3 * x3[i])
        for row in range(whole, height):
            x0 = matrix[row, low:high]
            for k in range(ranks):
                f0, y = left[row, k], out[k, low:high]
                for i in range(x0.size):
                    y[i] += f0 * x0[i]
    return out


@njit((_MATRIX, _MATRIX, INT, _FLOAT, _F32, _OUT), **EXACT)
def directions(
    left: Array, right: Array, start: int, scale: Any, second: Array, out: Array
) -> None:
    """See `reference.directions`. Sums of integers are exact in any order."""
    columns, ranks = right.shape[1], left.shape[1]
    whole, low = ranks // 4 * 4, 0
    for row in range(left.shape[0]):
        end = min(second.size, (row + 1) * columns - start)
        while low < end:
            high = min(end, low + BLOCK)
            first = low + start - row * columns
            o, s = out[low:high], second[low:high]
            last = first + o.size
            o[:] = 0
            for rank in range(0, whole, 4):
                f0, f1 = left[row, rank], left[row, rank + 1]
                f2, f3 = left[row, rank + 2], left[row, rank + 3]
                l0, l1 = right[rank, first:last], right[rank + 1, first:last]
                l2, l3 = right[rank + 2, first:last], right[rank + 3, first:last]
                for i in range(o.size):
                    o[i] += (f0 * l0[i] + f1 * l1[i]) + (f2 * l2[i] + f3 * l3[i])
            for rank in range(whole, ranks):
                f0, l0 = left[row, rank], right[rank, first:last]
                for i in range(o.size):
                    o[i] += f0 * l0[i]
            for i in range(o.size):
                o[i] = o[i] * scale * np.sqrt(s[i])
            low = high


@njit((_F32, _F32), **_LOOSE)
def squares(x: Array, y: Array) -> tuple[Any, Any, Any]:
    """See `reference.squares`."""
    total, energy, largest = 0.0, 0.0, np.int32(0)
    for low in range(0, x.size, BLOCK):
        high = min(x.size, low + BLOCK)
        a, b = x[low:high], y[low:high]
        part, known = _ZERO, _ZERO
        for i in range(a.size):
            e = a[i] - b[i]
            part += e * e
            known += b[i] * b[i]
        total += part
        energy += known
        largest = max(largest, _largest_error(a, b))
    sizes = np.array([largest], np.int32).view(np.float32)
    return total, energy, sizes[0]


@njit((_F32, _F32), **_LOOSE)
def root_squares(x: Array, y: Array) -> tuple[Any, Any]:
    """See `reference.root_squares`."""
    error = energy = 0.0
    for low in range(0, x.size, BLOCK):
        high = min(x.size, low + BLOCK)
        a, b = x[low:high], y[low:high]
        one, two = np.float32(0), np.float32(0)
        for i in range(a.size):
            e = np.sqrt(a[i]) - np.sqrt(b[i])
            one += e * e
            two += a[i]
        error += one
        energy += two
    return error, energy
