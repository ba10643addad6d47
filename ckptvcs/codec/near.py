"""The near codec: residuals of weights on a grid, second moments as rows x columns, first moments
in units of what the optimizer divides them by.

Of ExCP's family (residual, joint use of weights and moments, non-uniform levels), with what hurts
in it replaced.  Values are quantized with a dead zone: the code of y (in steps) is 0 where
|y| < zone, else sign(y) * floor(|y| + 1 - zone); each code comes back as the mean of its values.

    weight   base + level, on a grid of 2^-grid: float32 holds the integers of the grid exactly, so
             decoding rounds nothing; steps can differ by row (by the sensitivity of its weights)
    second   exp_avg_sq and the like: 2^(e/2), e = row + column, never zero where the moment is not
    first    exp_avg and the like: level, times sqrt(second) where there is one

Every operation of a decoder is one of integers, or one rounded float32 operation; tables stand in
for powers.  So all machines and devices decode the same bits.  Layout: docs/format.md, "Near
slices".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.codes import MAX_CODE, Codes, Integers, get_codes, put_codes
from ckptvcs.codec.planes import Bytes, get_section, put_section
from ckptvcs.codec.words import Words, from_float32, to_float32
from ckptvcs.errors import CorruptionError, TruncatedError

Floats = NDArray[np.float32]

_WEIGHT = struct.Struct("<hfBII")  # grid, step, levels, columns (0: no row factors), start
_MOMENT = struct.Struct("<fB")  # step, levels
_FACTORS = struct.Struct("<hII")  # exponent of the smallest factors, columns, start
_MAX_LEVELS = 15  # larger codes are so few that a level of their own does not pay
_FINENESS = 3  # a step is at least 2^3 units of the grid
_GRIDS = range(-120, 140)  # where float32 holds every multiple below 2^24 exactly
_NEUTRAL = 128  # the row factor 1
_ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)
_HALF_OCTAVES = range(-252, 255)  # exponents of second moments, in half octaves: normal floats
_LEAST_SQUARE = np.float32(2.0**-120)  # far below any optimizer's epsilon, squared

ROW_FACTORS: Floats = np.ldexp(
    _ROOTS[np.arange(256) % 4], (np.arange(256) - _NEUTRAL) // 4
).astype(np.float32)  # fmt: skip
"""2^((i - 128) / 4), as its float32, for a factor that is stored as i."""

SQUARES: Floats = np.ldexp(
    _ROOTS[2 * (np.array(_HALF_OCTAVES) % 2)], np.array(_HALF_OCTAVES) // 2
).astype(np.float32)  # fmt: skip
"""2^(e / 2), as its float32, for e from -252 to 254."""


@dataclass(frozen=True)
class Rows:
    """How the words of a slice lie in a matrix: `columns` a row, `start` words of the first row
    belong to the slice before.
    """

    columns: int
    start: int

    def count(self, words: int) -> int:
        """How many rows a slice of `words` words touches."""
        return -(-(self.start + words) // self.columns)

    def expand(self, values: Floats, words: int) -> Floats:
        """A value a row -> a value a word."""
        edges = np.arange(1, self.count(words) + 1) * self.columns - self.start
        return np.repeat(values, np.diff(np.minimum(edges, words), prepend=0))

    def matrix(self, values: NDArray[np.float32], fill: float) -> NDArray[np.float32]:
        """A value a word -> rows x columns, with `fill` where the slice has no words."""
        out = np.full((self.count(values.size), self.columns), fill, np.float32)
        out.reshape(-1)[self.start : self.start + values.size] = values
        return out


def quantize(values: Floats, zone: float) -> Integers:
    """The codes of `values`, which are in steps and finite, with a dead zone."""
    size = np.abs(values)
    size += np.float32(1 - zone)
    codes = size.astype(np.int32)  # truncates: no value is negative
    return np.negative(codes, out=codes, where=values < 0)


def _levels(values: Floats, codes: Integers, zone: float) -> NDArray[np.float64]:
    """The mean size of the values of each code, from 1 up to the largest that is worth one."""
    size = np.abs(codes)
    top = min(int(size.max(initial=0)), _MAX_LEVELS)
    small = (size > 0) & (size <= top)
    counts = np.bincount(size[small], minlength=top + 1)[1:]
    sums = np.bincount(size[small], np.abs(values[small]), minlength=top + 1)[1:]
    plain = np.arange(1, top + 1, dtype=np.float64)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), plain)
    # No level above twice its lower edge: so no value comes back worse than it would from zero.
    return np.minimum(means, 2 * (plain - 1 + zone))


def _sizes(codes: Codes, levels: Floats, step: np.float32) -> Floats:
    """The size that each code stands for: its level, or as many steps."""
    size = np.abs(codes.values)
    out: Floats = size.astype(np.float32) * step
    own = size <= levels.size
    table = np.concatenate((np.zeros(1, np.float32), levels))
    out[own] = table[size[own]]
    return out


# -- weights -----------------------------------------------------------------------------------


def choose_grid(smallest_step: float, largest: float) -> int | None:
    """The exponent of the grid for steps from `smallest_step` on and values up to `largest`.

    None where no grid is fine enough for the steps and small enough for float32.
    """
    fine = int(np.ceil(_FINENESS - np.log2(smallest_step)))
    small = 23 - int(np.frexp(largest)[1])
    grid = min(fine, small)
    return grid if grid in _GRIDS and grid >= fine - _FINENESS + 1 else None


def encode_weight(
    words: Words, base: Words | None, dtype: str, step: float, zone: float,
    rows: tuple[Rows, Bytes] | None = None,
) -> tuple[bytes, Words] | None:  # fmt: skip
    """Code one slice of a weight against its base, or (without one) by itself.

    `step` is that of a row whose factor is 1.  Without a base the grid itself is the quantizer:
    the largest that is not coarser than `step`.

    Returns the slice, and what `decode_weight` will return; None where values are not finite, or
    too large for a grid as fine as the step asks.
    """
    values = to_float32(words, dtype)
    before = None if base is None else to_float32(base, dtype)
    factors: Floats = np.ones(1, np.float32)
    least = step
    if rows is not None:
        factors = rows[0].expand(ROW_FACTORS[rows[1]], words.size)
        least = step * float(ROW_FACTORS[rows[1]].min())
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(np.abs(values).max(initial=0))
        if before is not None:
            largest = max(largest, float(np.abs(before).max(initial=0)))
    if not np.isfinite(largest) or not step > 0:
        return None
    if before is None:
        grid = int(np.ceil(-np.log2(step)))
        if grid not in _GRIDS or largest * 2.0**grid >= MAX_CODE - 1:
            return None
        step_units, zone = np.float32(1), 0.5
        residual: Floats = values * np.float32(2.0**grid)
    else:
        found = choose_grid(least, max(largest, least))
        if found is None:
            return None
        grid, scale = found, np.float32(2.0**found)
        step_units = np.float32(step * 2.0**grid)
        residual = (values * scale - np.rint(before * scale)) / (step_units * factors)
    if float(np.abs(residual).max(initial=0)) >= MAX_CODE - 1:
        return None
    codes = quantize(residual, zone) if before is not None else np.rint(residual).astype(np.int32)
    levels = np.zeros(0, "<u2")
    if before is not None:
        means = _levels(residual, codes, zone) * float(step_units)
        levels = np.clip(np.rint(means), 1, 65535).astype("<u2")
    head = _WEIGHT.pack(
        grid, step_units, levels.size, rows[0].columns if rows else 0, rows[0].start if rows else 0
    )
    payload = head + levels.tobytes()
    if rows is not None:
        payload += put_section(rows[1])
    payload += put_codes(codes)
    positions = np.flatnonzero(codes)
    kept = Codes(positions, codes[positions])
    decoded = _apply(kept, base, words.size, dtype, grid, step_units, levels, rows)
    if not np.isfinite(to_float32(decoded, dtype)).all():
        return None
    return payload, decoded


def _apply(
    codes: Codes, base: Words | None, count: int, dtype: str, grid: int, step: np.float32,
    levels: NDArray[np.uint16], rows: tuple[Rows, Bytes] | None,
) -> Words:  # fmt: skip
    """Base + levels where there are codes; the words of the base, or zero, elsewhere."""
    at = slice(None) if codes.positions is None else codes.positions
    scale, unit = np.float32(2.0**grid), np.float32(2.0**-grid)
    with np.errstate(over="ignore", invalid="ignore"):
        units = _sizes(codes, levels.astype(np.float32), step)
        if rows is not None:
            units *= rows[0].expand(ROW_FACTORS[rows[1]], count)[at]
        units = np.rint(units, out=units)
        np.negative(units, out=units, where=codes.values < 0)
        if base is not None:
            units += np.rint(to_float32(base[at], dtype) * scale)
        changed = from_float32(units * unit, dtype)
    if codes.positions is None and base is None:
        return changed
    out = np.zeros(count, changed.dtype) if base is None else base.copy()
    if codes.positions is None:
        moved = codes.values != 0
        out[moved] = changed[moved]
    else:
        out[at] = changed
    return out


def _take(layout: struct.Struct, data: memoryview, at: int) -> tuple[tuple[float, ...], int]:
    if at + layout.size > len(data):
        raise TruncatedError("a frame ends inside a header")
    return layout.unpack_from(data, at), at + layout.size


def _get_rows(columns: int, start: int) -> Rows:
    if start >= columns:
        raise CorruptionError("a frame holds rows of an impossible shape")
    return Rows(columns, start)


def decode_weight(data: memoryview, base: Words | None, count: int, dtype: str) -> Words:
    """Base (or zero) + levels, on the grid; entries whose code is 0 are the base's words.

    Raises:
        TruncatedError, CorruptionError: `data` is not a weight slice of `count` words.
    """
    (grid, step, size, columns, start), at = _take(_WEIGHT, data, 0)
    if grid not in _GRIDS or not 0 < step < np.inf or at + 2 * size > len(data):
        raise CorruptionError("a frame holds a weight on an impossible grid")
    levels = np.frombuffer(data[at : at + 2 * int(size)], "<u2")
    at += 2 * int(size)
    rows = None
    if columns:
        shape = _get_rows(int(columns), int(start))
        factors, at = get_section(data, at, shape.count(count))
        rows = shape, factors
    codes, at = get_codes(data, at, count)
    if at != len(data):
        raise CorruptionError("a frame has bytes after its codes")
    return _apply(codes, base, count, dtype, int(grid), np.float32(step), levels, rows)


def row_factors(second: Floats, rows: Rows, middle: float, gamma: float) -> Bytes:
    """Row factors of step sizes: (geometric mean of `second` in the row / middle)^(-gamma / 2),
    within 2.5 of 0 in natural logarithm, as stored.  Rows of zeros only get the factor 1.
    """
    logs = _row_means(second, rows)
    factor = np.clip(-gamma / 2 * (logs - np.log2(middle)) * np.log(2), -2.5, 2.5)
    return np.where(np.isfinite(logs), np.rint(4 * factor / np.log(2)) + _NEUTRAL, _NEUTRAL).astype(
        np.uint8
    )


def _row_means(second: Floats, rows: Rows) -> NDArray[np.float64]:
    """The mean of log2 over what is above zero in each row; minus infinity where nothing is."""
    matrix = rows.matrix(second, 0)
    above = matrix > 0
    logs = np.log2(matrix, out=np.zeros_like(matrix), where=above)
    counts = above.sum(1)
    sums = logs.sum(1, dtype=np.float64)
    return np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)


# -- second moments ----------------------------------------------------------------------------


def encode_second(words: Words, dtype: str, rows: Rows) -> tuple[bytes, Words] | None:
    """Code one slice of squares as a row times a column, by their mean logarithms.

    A row or column of zeros is zero; other zeros come back as what row and column say.  With as
    many columns as words each word has its own exponent.

    Returns the slice, and what `decode_second` will return; None where it has negative values,
    values that are not finite, or too wide a range.  No more columns than words.
    """
    values = to_float32(words, dtype)
    if not (values >= 0).all() or not np.isfinite(values).all():
        return None
    matrix = rows.matrix(values, 0)
    above = matrix > 0
    np.maximum(matrix, _LEAST_SQUARE, out=matrix)
    logs = np.log2(matrix, out=np.zeros_like(matrix), where=above)
    in_row, in_column = above.sum(1), above.sum(0)
    row = logs.sum(1, dtype=np.float64) / np.maximum(in_row, 1)
    logs -= row[:, None].astype(np.float32)
    logs *= above
    column = logs.sum(0, dtype=np.float64) / np.maximum(in_column, 1)
    row_codes, row_low = _exponents(row, in_row)
    column_codes, column_low = _exponents(column, in_column)
    low, codes = row_low + column_low, np.concatenate((row_codes, column_codes))
    top = low + int(row_codes.max()) + int(column_codes.max()) - 2
    if codes.max() > 255 or low < _HALF_OCTAVES.start or top >= _HALF_OCTAVES.stop:
        return None
    stored = codes.astype(np.uint8)
    payload = _FACTORS.pack(low, rows.columns, rows.start) + put_section(stored)
    return payload, _product(stored, low, rows, words.size, dtype)


def _exponents(logs: NDArray[np.float64], counts: NDArray[np.intp]) -> tuple[Integers, int]:
    """Half octaves above the smallest, plus 1; 0 where there is nothing.  And the smallest."""
    there = counts > 0
    halves = np.rint(2 * logs).astype(np.int32)
    low = int(halves[there].min()) if there.any() else 0
    return np.where(there, halves - low + 1, 0), low


_NOTHING = 1024  # entries of the table below that are zero


def _product(codes: Bytes, low: int, rows: Rows, count: int, dtype: str) -> Words:
    """2^((low + row + column) / 2), as words; zero where the row or the column is."""
    height = rows.count(count)
    row, column = codes[:height].astype(np.int32), codes[height:].astype(np.int32)
    squares = SQUARES[low - _HALF_OCTAVES.start :]
    table = from_float32(np.concatenate((np.zeros(_NOTHING, np.float32), squares)), dtype)
    # A row or a column of zeros leads to an entry below _NOTHING, whatever the other is.
    row = np.where(row > 0, row - 1 + _NOTHING, _NOTHING // 2)
    column = np.where(column > 0, column - 1, -_NOTHING // 2)
    at = (row[:, None] + column).reshape(-1)[rows.start : rows.start + count]
    words: Words = table[at]
    return words


def decode_second(data: memoryview, count: int, dtype: str) -> Words:
    """Rows times columns, through a table.

    Raises:
        TruncatedError, CorruptionError: `data` is no such slice of `count` words.
    """
    (low, columns, start), at = _take(_FACTORS, data, 0)
    rows = _get_rows(int(columns), int(start))
    if columns > count:
        raise CorruptionError("a frame holds more columns than words")
    codes, at = get_section(data, at, rows.count(count) + rows.columns)
    height = rows.count(count)
    top = int(low) + int(codes[:height].max(initial=0)) + int(codes[height:].max(initial=0)) - 2
    if at != len(data) or low < _HALF_OCTAVES.start or top >= _HALF_OCTAVES.stop:
        raise CorruptionError("a frame holds second moments that no float32 has")
    return _product(codes, int(low), rows, count, dtype)


# -- first moments -----------------------------------------------------------------------------


def encode_first(
    words: Words, second: Words | None, dtype: str, step: float, zone: float
) -> tuple[bytes, Words] | None:
    """Code one slice of a first moment: in units of sqrt(second) (what `second` decodes to), or
    plainly.  `step` is in those units; infinity drops everything.

    Returns the slice, and what `decode_first` will return; None where values are not finite, or
    not zero where `second` is.
    """
    values = to_float32(words, dtype)
    if not np.isfinite(values).all():
        return None
    if second is not None:
        root = np.sqrt(to_float32(second, dtype))
        if (values[root == 0] != 0).any():
            return None
        values = np.divide(values, root, out=np.zeros_like(values), where=root > 0)
    if not step > 0:
        step = 1.0
    scaled = (values / np.float32(step)) if np.isfinite(step) else np.zeros_like(values)
    if float(np.abs(scaled).max(initial=0)) >= MAX_CODE - 1:
        return None
    codes = quantize(scaled, zone)
    levels = (_levels(scaled, codes, zone) * step).astype("<f4")
    step = min(step, 1e30)
    payload = _MOMENT.pack(step, levels.size) + levels.tobytes() + put_codes(codes)
    positions = np.flatnonzero(codes)
    kept = Codes(positions, codes[positions])
    return payload, _moment(kept, second, words.size, dtype, np.float32(step), levels)


def _moment(
    codes: Codes, second: Words | None, count: int, dtype: str, step: np.float32, levels: Floats
) -> Words:
    at = slice(None) if codes.positions is None else codes.positions
    with np.errstate(over="ignore", invalid="ignore"):
        values = _sizes(codes, levels, step)
        np.negative(values, out=values, where=codes.values < 0)
        if second is not None:
            values *= np.sqrt(to_float32(second[at], dtype))
        changed = from_float32(values, dtype)
    out = np.zeros(count, changed.dtype)
    out[at] = changed
    if codes.positions is None:
        out[codes.values == 0] = 0
    return out


def decode_first(data: memoryview, second: Words | None, count: int, dtype: str) -> Words:
    """Levels, times sqrt(second) where there is one; zero where the code is.

    Raises:
        TruncatedError, CorruptionError: `data` is no such slice of `count` words.
    """
    (step, size), at = _take(_MOMENT, data, 0)
    end = at + 4 * int(size)
    if end > len(data):
        raise TruncatedError("a frame ends inside its levels")
    levels = np.frombuffer(data[at:end], "<f4")
    codes, at = get_codes(data, end, count)
    if at != len(data):
        raise CorruptionError("a frame has bytes after its codes")
    return _moment(codes, second, count, dtype, np.float32(step), levels)
