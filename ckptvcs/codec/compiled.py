"""The loops of `ckptvcs.codec.loops`, compiled, each in one pass over memory.

What is stored or decoded keeps to the order and rounding of IEEE arithmetic, so both forms give the
same bits.  Loops that only measure or steer (`_LOOSE`) may add up in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

Array = Any

_F32, _I32, _U8 = (
    types.Array(kind, 1, "C", readonly=True) for kind in (types.float32, types.int32, types.uint8)
)
_MATRIX = types.Array(types.float32, 2, "C", readonly=True)
_FLOAT, _INT = types.float32, types.int64
"""Arguments, given here so that each loop is compiled once: for arrays that it only reads."""

_EXACT = {"nogil": True, "cache": True, "error_model": "numpy"}
_LOOSE = _EXACT | {"fastmath": True}

_BLOCK = 4096  # values whose intermediate results stay in the first cache
_TILE = 512  # columns of which a dozen lines stay there

_BYTES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_SIZES = _BYTES.sum(1).astype(np.int64)
_PLACES = np.argsort(1 - _BYTES, axis=1, kind="stable").astype(np.int32)
"""For each byte: where its bits are, from the top one on, those that are set first."""
_EXTRACTED = np.zeros((256, 256), np.uint8)
for _bit in range(8):
    _here = _BYTES[:, _bit].astype(bool)
    _EXTRACTED[_here] = (_EXTRACTED[_here] << 1) | _BYTES[:, _bit]
"""For each mask and byte: the bits that the mask keeps, in the lowest bits."""


@njit((_F32, _F32, _FLOAT, _F32, _INT, _INT, _FLOAT), **_EXACT)
def quantize(
    values: Array, base: Array, scale: Any, steps: Array, columns: int, start: int, zone: Any
) -> Array:
    """See `loops.quantize`."""
    codes = np.empty(values.size, np.int32)
    more = np.float32(1) - zone
    low = 0
    for row in range(steps.size):
        high = min(values.size, (row + 1) * columns - start)
        x, b, out = values[low:high], base[low:high], codes[low:high]
        step = steps[row]
        for i in range(x.size):
            y = (x[i] * scale - np.rint(b[i] * scale)) / step
            out[i] = np.int32(y + np.float32(np.copysign(more, y)))
        low = high
    return codes


@njit((_F32, _F32, _FLOAT, _FLOAT), **_EXACT)
def quantize_units(values: Array, second: Array, step: Any, zone: Any) -> Any:
    """See `loops.quantize_units`."""
    positions = np.empty(values.size, np.int32)
    codes = np.empty(values.size, np.int32)
    units = np.empty(_BLOCK, np.float32)
    more, found, bad = np.float32(1) - zone, 0, 0
    for low in range(0, values.size, _BLOCK):
        high = min(values.size, low + _BLOCK)
        x, s = values[low:high], second[low:high]
        for i in range(x.size):
            y = x[i] / np.sqrt(s[i]) / step
            y = y if s[i] > 0 else (np.float32(0) if x[i] == 0 else np.float32(np.inf))
            units[i] = y + np.float32(np.copysign(more, y))
        for i in range(x.size):
            y = units[i]
            if abs(y) >= np.float32(1):
                bad += not abs(y) < np.float32(1 << 24)
                positions[found] = low + i
                codes[found] = np.int32(y) if abs(y) < np.float32(1 << 24) else 0
                found += 1
            bad += y != y
    return positions[:found], codes[:found], bad == 0


@njit((_F32, _I32, _FLOAT, _F32, _F32, _INT, _INT), **_EXACT)
def restore(
    base: Array, codes: Array, scale: Any, amounts: Array, factors: Array, columns: int, start: int
) -> Array:
    """See `loops.restore`."""
    out = np.empty(base.size, np.float32)
    unit = np.float32(1) / scale
    found = np.empty(_BLOCK, np.float32)
    low = row = 0
    while low < base.size:
        end = (row + 1) * columns - start
        high = min(base.size, end, low + _BLOCK)
        b, c, o = base[low:high], codes[low:high], out[low:high]
        for i in range(b.size):
            found[i] = amounts[c[i] & np.int32(255)]
        factor = factors[row]
        for i in range(b.size):
            moved = (np.rint(b[i] * scale) + np.rint(found[i] * factor)) * unit
            o[i] = moved if c[i] != 0 else b[i]
        low = high
        row += high == end
    return out


@njit((_F32,), **_EXACT)
def extent(values: Array) -> tuple[Any, Any]:
    """See `loops.extent`."""
    words = values.view(np.int32)
    least, largest = np.int32(0x7F800000), np.int32(0)
    for i in range(words.size):  # floats without a sign are ordered as integers are
        size = words[i] & np.int32(0x7FFFFFFF)
        least = min(least, size)
        largest = max(largest, size)
    found = np.array([least, largest], np.int32).view(np.float32)
    return found[0], found[1]


@njit((_I32, _U8), **_EXACT)
def kept(codes: Array, bitmap: Array) -> Array:
    """See `loops.kept`."""
    out = np.empty(codes.size + 8, codes.dtype)
    count = 0
    whole = codes.size // 8
    for byte in range(whole):
        bits = bitmap[byte]
        if bits:
            eight = codes[8 * byte : 8 * byte + 8]
            places = _PLACES[bits]
            for i in range(8):
                out[count + i] = eight[places[i]]
            count += _SIZES[bits]
    for i in range(8 * whole, codes.size):
        out[count] = codes[i]
        count += (bitmap[whole] >> (7 - (i & 7))) & 1
    return out[:count].copy()


@njit((_U8, _U8), **_EXACT)
def extract(bits: Array, mask: Array) -> Array:
    """See `loops.extract`."""
    out = np.empty(bits.size, np.uint8)
    done, waiting, filled = 0, np.int64(0), np.int64(0)
    for byte in range(bits.size):
        kept = mask[byte]
        waiting = (waiting << _SIZES[kept]) | _EXTRACTED[kept, bits[byte]]
        filled += _SIZES[kept]
        if filled >= 8:
            filled -= 8
            out[done] = waiting >> filled
            waiting &= (np.int64(1) << filled) - 1
            done += 1
    if filled:
        out[done] = waiting << (8 - filled)
        done += 1
    return out[:done]


@njit((_U8, _INT), **_EXACT)
def bit_positions(bitmap: Array, count: int) -> Array:
    """See `loops.bit_positions`."""
    out = np.empty(8 * bitmap.size + 8, np.int32)
    found = 0
    for byte in range(bitmap.size):
        bits = bitmap[byte]
        first = np.int32(8 * byte)
        places = _PLACES[bits]
        for i in range(8):
            out[found + i] = first + places[i]
        found += _SIZES[bits]
    while found and out[found - 1] >= count:
        found -= 1
    return out[:found]


@njit((_I32, _U8), **_EXACT)
def with_signs(sizes: Array, signs: Array) -> Array:
    """See `loops.with_signs`."""
    out = np.empty(sizes.size, np.int32)
    for i in range(sizes.size):
        sign = np.int32((signs[i >> 3] >> (7 - (i & 7))) & 1)
        out[i] = (sizes[i] ^ -sign) + sign
    return out


@njit((types.int32[::1], _I32, _I32), **_EXACT)
def raise_sizes(sizes: Array, above: Array, kept: Array) -> Array:
    """See `loops.raise_sizes`."""
    out = np.empty(kept.size, np.int32)
    for i in range(kept.size):
        at = above[kept[i]]
        out[i] = at
        sizes[at] += 1
    return out


@njit((_U8, _U8, _INT, _INT), **_EXACT)
def join_bits(planes: Array, high: Array, count: int, bits: int) -> Array:
    """See `loops.join_bits`."""
    each = (count + 7) // 8
    out = np.empty(8 * each, np.int32)
    for byte in range(each):
        eight = out[8 * byte : 8 * byte + 8]
        eight[:] = 0
        for bit in range(bits):
            row = _BYTES[planes[bit * each + byte]]
            for i in range(8):
                eight[i] |= np.int32(row[i]) << np.int32(bit)
    for i in range(high.size):
        out[i] += (np.int32(high[i]) - np.int32(128)) << np.int32(bits)
    return out[:count]


@njit((types.float32[::1], _I32, _I32, _FLOAT, _F32, _F32, _INT, _INT), **_EXACT)
def change(
    out: Array, positions: Array, codes: Array, scale: Any, amounts: Array, factors: Array,
    columns: int, start: int,
) -> None:  # fmt: skip
    """See `loops.change`."""
    unit = np.float32(1) / scale
    low = row = 0
    while low < positions.size:
        factor, high = factors[row], positions.size
        if row + 1 < factors.size:
            high = low
            end = (row + 1) * columns - start
            while high < positions.size and positions[high] < end:
                high += 1
        p, c = positions[low:high], codes[low:high]
        for j in range(p.size):
            i = p[j]
            amount = np.rint(amounts[c[j] & np.int32(255)] * factor)
            out[i] = (np.rint(out[i] * scale) + amount) * unit
        low = high
        row += 1


@njit((_U8,), **_EXACT)
def gap_positions(gaps: Array) -> Array:
    """See `loops.gap_positions`."""
    out = np.empty(gaps.size, np.int64)
    found = 0
    at = np.int64(-1)
    for i in range(gaps.size):
        gap = np.int64(gaps[i])
        more = gap != 255
        at += gap + more
        out[found] = at
        found += more
    return out[:found].copy()


@njit((_F32, _INT, _INT, _INT), **_LOOSE)
def log_sums(
    values: Array, columns: int, start: int, rows: int
) -> tuple[Array, Array, Array, Array]:
    """See `loops.log_sums`."""
    row_sums, row_counts = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    sums, counts = np.zeros(columns, np.float32), np.zeros(columns, np.int32)
    words = values.view(np.int32)
    low = 0
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
        row_sums[row] = total
        row_counts[row] = there
        low = high
    return row_sums, row_counts, sums, counts


@njit((_F32, _F32, _INT, _INT), **_EXACT)
def product(row: Array, column: Array, start: int, count: int) -> Array:
    """See `loops.product`."""
    out = np.empty(count, np.float32)
    low = 0
    for r in range(row.size):
        high = min(count, (r + 1) * column.size - start)
        first = low + start - r * column.size
        o, factor = out[low:high], row[r]
        c = column[first : first + o.size]
        for i in range(o.size):
            o[i] = factor * c[i]
        low = high
    return out


@njit((_F32, _F32), **_EXACT)
def divide_roots(values: Array, second: Array) -> Any:
    """See `loops.divide_roots`."""
    out = np.empty(values.size, np.float32)
    words = out.view(np.int32)
    largest = np.int32(0)
    for low in range(0, values.size, _BLOCK):
        high = min(values.size, low + _BLOCK)
        x, s, o, w = values[low:high], second[low:high], out[low:high], words[low:high]
        for i in range(x.size):
            y = x[i] / np.sqrt(s[i])
            o[i] = np.float32(0) if s[i] == 0 and x[i] == 0 else y
        for i in range(x.size):
            largest = max(largest, w[i] & np.int32(0x7FFFFFFF))
    return out, largest < np.int32(0x7F800000)


@njit((types.float32[::1], _FLOAT, _F32), **_EXACT)
def multiply_roots(values: Array, scale: Any, second: Array) -> None:
    """See `loops.multiply_roots`."""
    for i in range(values.size):
        values[i] = values[i] * scale * np.sqrt(second[i])


@njit((_MATRIX, _MATRIX), **_LOOSE)
def times_rows(matrix: Array, lines: Array) -> Array:
    """See `loops.times_rows`."""
    out = np.zeros((matrix.shape[0], lines.shape[0]), np.float32)
    for low in range(0, matrix.shape[1], _TILE):
        high = min(matrix.shape[1], low + _TILE)
        for row in range(matrix.shape[0]):
            x = matrix[row, low:high]
            for k in range(lines.shape[0]):
                y = lines[k, low:high]
                total = np.float32(0)
                for i in range(x.size):
                    total += x[i] * y[i]
                out[row, k] += total
    return out


@njit((_MATRIX, _MATRIX), **_LOOSE)
def times_columns(left: Array, matrix: Array) -> Array:
    """See `loops.times_columns`."""
    out = np.zeros((left.shape[1], matrix.shape[1]), np.float32)
    even = left.shape[1] // 2 * 2
    for low in range(0, matrix.shape[1], _TILE):
        high = min(matrix.shape[1], low + _TILE)
        for row in range(matrix.shape[0]):
            x = matrix[row, low:high]
            for k in range(0, even, 2):
                one, two = left[row, k], left[row, k + 1]
                y, z = out[k, low:high], out[k + 1, low:high]
                for i in range(x.size):
                    y[i] += one * x[i]
                    z[i] += two * x[i]
            if even < left.shape[1]:
                one, y = left[row, even], out[even, low:high]
                for i in range(x.size):
                    y[i] += one * x[i]
    return out


@njit((_MATRIX, _MATRIX, _INT, _INT), **_EXACT)
def outer_sum(left: Array, right: Array, start: int, count: int) -> Array:
    """See `loops.outer_sum`; whole numbers add up the same in any order."""
    out = np.zeros(count, np.float32)
    columns, ranks = right.shape[1], left.shape[1]
    whole = ranks // 4 * 4
    low = 0
    for row in range(left.shape[0]):
        high = min(count, (row + 1) * columns - start)
        first = low + start - row * columns
        o = out[low:high]
        last = first + o.size
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
        low = high
    return out


@njit((_F32, _F32), **_LOOSE)
def squares(x: Array, y: Array) -> tuple[Any, Any, Any]:
    """See `loops.squares`."""
    total = energy = 0.0
    largest = np.int32(0)
    errors = np.empty(_BLOCK, np.float32)
    words = errors.view(np.int32)
    for low in range(0, x.size, _BLOCK):
        high = min(x.size, low + _BLOCK)
        a, b = x[low:high], y[low:high]
        part, known = np.float32(0), np.float32(0)
        for i in range(a.size):
            e = a[i] - b[i]
            errors[i] = e * e
            part += e * e
            known += b[i] * b[i]
        total += part
        energy += known
        for i in range(a.size):  # floats that are not negative are ordered as integers are
            largest = max(largest, words[i])
    words[0] = largest
    return total, energy, np.sqrt(errors[0])


@njit((_F32, _F32, _F32, _F32), **_LOOSE)
def weight_squares(near: Array, true: Array, base: Array, weights: Array) -> Any:
    """See `loops.weight_squares`."""
    error = energy = residual = weighted_error = weighted_residual = 0.0
    largest = np.int32(0)
    errors, changes = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    words = errors.view(np.int32)
    for low in range(0, true.size, _BLOCK):
        high = min(true.size, low + _BLOCK)
        a, b, c = near[low:high], true[low:high], base[low:high]
        one, two, three = np.float32(0), np.float32(0), np.float32(0)
        for i in range(b.size):
            e, d = a[i] - b[i], b[i] - c[i]
            errors[i], changes[i] = e * e, d * d
            one += e * e
            two += b[i] * b[i]
            three += d * d
        error += one
        energy += two
        residual += three
        for i in range(b.size):  # floats that are not negative are ordered as integers are
            largest = max(largest, words[i])
        if weights.size:
            w = weights[low:high]
            one, two = np.float32(0), np.float32(0)
            for i in range(b.size):
                one += w[i] * errors[i]
                two += w[i] * changes[i]
            weighted_error += one
            weighted_residual += two
    words[0] = largest
    return error, energy, residual, weighted_error, weighted_residual, np.sqrt(errors[0])


@njit((_F32, _F32), **_LOOSE)
def root_squares(x: Array, y: Array) -> tuple[Any, Any]:
    """See `loops.root_squares`."""
    error = energy = 0.0
    for low in range(0, x.size, _BLOCK):
        high = min(x.size, low + _BLOCK)
        a, b = x[low:high], y[low:high]
        one, two = np.float32(0), np.float32(0)
        for i in range(a.size):
            e = np.sqrt(a[i]) - np.sqrt(b[i])
            one += e * e
            two += a[i]
        error += one
        energy += two
    return error, energy
