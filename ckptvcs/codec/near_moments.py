"""Near moments: second moments as row factor * column factor, first moments relative to them.

log2 of exp_avg_sq is almost a row term plus a column term. No entry becomes 0 unless its row or
column is 0, so the first step after a resume has the right size; with ExCP it is 2 to 14 times too
large. First moments are quantized after division by sqrt(exp_avg_sq), as Adam uses them.
Layout: docs/format.md, "Near slices", methods 5 to 7.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.codes import Codes, get_codes, put_codes
from ckptvcs.codec.matrix import HALF_POWERS, HALVES, Rows, get_rows
from ckptvcs.codec.quantize import amounts_of, fit_levels
from ckptvcs.codec.sections import get_section, put_section, sample, take
from ckptvcs.codec.words import (
    Floats,
    Integers,
    NearSlice,
    Words,
    double_squares,
    from_float32,
    room_for_floats,
    to_float32,
)
from ckptvcs.errors import CorruptionError, TruncatedError

_FACTORS = struct.Struct("<hII")  # low, columns, start
_FIRST = struct.Struct("<fB")  # quantization step, number of levels
_LEAST = np.float32(2.0**-120)  # far below any optimizer's epsilon, squared
_LARGEST_STEP = 1e30
_LEAST_SPREAD = 1e-30


def encode_second(words: Words, dtype: str, rows: Rows) -> NearSlice | None:
    """Encode a slice of a second moment as row factors * column factors, from mean logarithms.

    A row or column of zeros gets factor 0; other zeros get the product of their factors. A matrix
    has at most as many columns as the slice has words; then each word has its own exponent.

    Returns None if a value is negative or not finite, or if the range of values is too wide.
    """
    values = to_float32(words, dtype)
    if int(words.max(initial=0)) >> (8 * words.itemsize - 1):
        return None
    shape = rows.columns, rows.start, rows.count(words.size)
    row_sums, in_row, sums, in_column, least, largest = kernels.active().log_sums(values, *shape)
    if not np.isfinite(largest):
        return None
    if least < _LEAST:  # rare; zeros stay 0
        values = np.where((values < _LEAST) & (values != 0), _LEAST, values)
        row_sums, in_row, sums, in_column, *_ = kernels.active().log_sums(values, *shape)
    payload = put_second(row_sums, in_row, sums, in_column, rows, values)
    if payload is None:
        return None
    return NearSlice(payload, decode_second(memoryview(payload), words.size, dtype))


def put_second(
    row_sums: Floats,
    in_row: Integers,
    sums: Floats,
    in_column: Integers,
    rows: Rows,
    values: Floats | None,
) -> bytes | None:
    """Encode a slice from the results of `log_sums`; None if the range of values is too wide.

    `values` must be given if some values are 0.
    """
    row_codes, low = _exponents(row_sums / np.maximum(in_row, 1), in_row)
    # The columns compensate the rounding of the rows.
    rounded = np.where(row_codes > 0, row_codes - 1 + low, 0).astype(np.float32)
    rounded /= 2
    column = _column_means(rounded, in_row, sums, in_column, rows, values)
    column_codes, column_low = _exponents(column, in_column)
    low += column_low
    codes = np.concatenate((row_codes, column_codes))
    if codes.max() > 255 or not _within(low, row_codes, column_codes):
        return None
    stored = codes.astype(np.uint8)
    return _FACTORS.pack(low, rows.columns, rows.start) + put_section(stored, short=True)


@dataclass(frozen=True)
class Factors:
    """The row factors and column factors of a slice of second moments."""

    rows: Rows
    row: Floats
    column: Floats

    @classmethod
    def of(cls, payload: bytes | memoryview, count: int) -> Factors:
        """Return the factors of a slice of `count` words. Raises as `decode_second`."""
        data = memoryview(payload)
        (low, columns, start), at = take(_FACTORS, data, 0)
        rows = get_rows(columns, start)
        height = rows.count(count)
        if columns > count:
            raise CorruptionError("corrupt frame: more columns than words")
        codes, at = get_section(data, at, height + columns, short=True)
        if at != len(data) or not _within(low, codes[:height], codes[height:]):
            raise CorruptionError("corrupt frame: second moments out of the range of float32")
        exponents = codes.astype(np.int32) - 1
        exponents[:height] += low
        powers = HALF_POWERS[np.maximum(exponents - HALVES.start, 0)]
        factors = np.where(codes > 0, powers, np.float32(0))
        return cls(rows, factors[:height], factors[height:])

    def logs(self) -> Floats:
        """Return log2 of the geometric mean of each row; NaN for rows of zeros."""
        with np.errstate(divide="ignore"):
            row, column = np.log2(self.row), np.log2(self.column[self.column > 0])
        middle = column.mean() if column.size else np.float32(0)
        return np.where(self.row > 0, row + middle, np.float32(np.nan)).astype(np.float32)

    def roots(self) -> tuple[Floats, Floats] | None:
        """Return the square roots of both factors; None if a factor is 0."""
        if not (self.row.all() and self.column.all()):
            return None
        return np.sqrt(self.row), np.sqrt(self.column)


def _column_means(
    row: Floats,
    in_row: Integers,
    sums: Floats,
    in_column: Integers,
    rows: Rows,
    values: Floats | None,
) -> Floats:
    """Return the mean of log2(value) - row over the values above 0 of each column."""
    total = np.asarray(row * in_row, np.float64).sum()
    count = int(in_row.sum())
    if count == rows.columns * in_row.size:
        return np.asarray(sums / np.maximum(in_column, 1) - total / max(1, count), np.float32)
    matrix = np.zeros((in_row.size, rows.columns), np.bool_)
    inside = matrix.reshape(-1)[rows.start :]
    if values is None:  # all are above zero
        inside[:count] = True
    else:
        inside[: values.size] = values > 0
    means = (sums - row @ matrix) / np.maximum(in_column, 1)
    return np.asarray(means, np.float32)


def _exponents(logs: NDArray[np.floating], counts: Integers) -> tuple[Integers, int]:
    """Return half octaves above the smallest, plus 1 (0 for count 0); and the smallest."""
    nonzero = counts > 0
    halves = np.rint(2 * logs).astype(np.int32)
    low = int(halves[nonzero].min()) if nonzero.any() else 0
    return np.where(nonzero, halves - low + 1, 0).astype(np.int32), low


def _within(low: int, row: NDArray[np.integer], column: NDArray[np.integer]) -> bool:
    """Return whether all factors and products are normal floats."""
    high = low + int(row.max(initial=1)) - 1
    return low >= HALVES.start and high + int(column.max(initial=1)) - 1 < HALVES.stop


def decode_second(data: memoryview, count: int, dtype: str, out: Words | None = None) -> Words:
    """Decode a slice of `count` words: method 5. The result may use the memory of `out`.

    Raises:
        TruncatedError, CorruptionError: `data` is not a second moment of `count` words.
    """
    factors = Factors.of(data, count)
    near = room_for_floats(count, dtype, out)
    kernels.active().product(factors.row, factors.column, factors.rows.start, near)
    return from_float32(near, dtype)


def encode_first(
    words: Words, second: Words | None, dtype: str, step: float, zone: float
) -> NearSlice | None:
    """Encode a slice of a first moment: moment / sqrt(second), or the moment without `second`.

    `second` holds the decoded words of the second moment. `step` is the quantization step in root
    mean squares of the ratio, `zone` the dead zone in steps.

    Returns None if the ratio is not finite.
    """
    values = to_float32(words, dtype)
    squares = np.ones(1, np.float32) if second is None else to_float32(second, dtype)
    spread = _spread(sample(values), squares if second is None else sample(squares))
    width = np.float32(min(step * spread, _LARGEST_STEP) if spread > _LEAST_SPREAD else 1)
    if second is None:
        squares = np.ones(values.size, np.float32)
    bitmap, kept, is_finite = kernels.active().quantize_units(
        values, squares, width, np.float32(zone)
    )
    if not is_finite:
        return None
    mask = np.unpackbits(bitmap, count=words.size).view(np.bool_)
    units = np.asarray(values[mask] / np.sqrt(squares[mask]) / width, np.float32)
    levels = (fit_levels(units, kept, zone) * float(width)).astype("<f4")
    codes = Codes(bitmap, kept)
    payload = _FIRST.pack(width, levels.size) + levels.tobytes() + put_codes(codes, words.size)
    return NearSlice(payload, _moment(codes, second, words.size, dtype, width, levels))


def _spread(values: Floats, squares: Floats) -> float:
    """Return the root mean square of the finite entries of values / sqrt(squares)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        units = values / np.sqrt(squares)
        units = units[np.isfinite(units)]
        return float(np.sqrt(np.mean(double_squares(units)))) if units.size else 0.0


def _moment(
    codes: Codes, second: Words | None, count: int, dtype: str, step: np.float32, levels: Floats
) -> Words:
    bitmap, values = codes.sparse()
    positions = kernels.active().bit_positions(bitmap, count)
    with np.errstate(over="ignore", invalid="ignore"):
        amounts = amounts_of(np.abs(values), levels, step)
        np.negative(amounts, out=amounts, where=values < 0)
        if second is not None:
            amounts *= np.sqrt(to_float32(second[positions], dtype))
        changed = from_float32(amounts, dtype)
    out = np.zeros(count, changed.dtype)
    out[positions] = changed
    return out


def decode_first(data: memoryview, second: Words | None, count: int, dtype: str) -> Words:
    """Decode a slice of `count` words: method 7, or 6 without `second`.

    Raises:
        TruncatedError, CorruptionError: `data` is not a first moment of `count` words.
    """
    (step, size), at = take(_FIRST, data, 0)
    end = at + 4 * size
    if end > len(data):
        raise TruncatedError("corrupt frame: truncated reconstruction levels")
    levels = np.frombuffer(data[at:end], "<f4")
    codes, at = get_codes(data, end, count)
    if at != len(data):
        raise CorruptionError("corrupt frame: trailing bytes after its codes")
    return _moment(codes, second, count, dtype, np.float32(step), levels)
