"""Near moments: second moments as a row times a column, first moments in units of their roots.

log2 of exp_avg_sq is almost a row plus a column, and never zero where the moment is not: so the
first step after a resume has the right size, where ExCP's is 2 to 14 times too large.  First
moments matter by their ratio to it.  Layout: docs/format.md, "Near slices".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.codes import Codes, Integers, get_codes, put_codes
from ckptvcs.codec.matrix import HALVES, Rows, get_rows, half_powers, take
from ckptvcs.codec.quantize import amounts_of, fit_levels
from ckptvcs.codec.sections import Bytes, get_section, put_section, sample
from ckptvcs.codec.words import NearSlice, Words, from_float32, room_for_floats, to_float32
from ckptvcs.errors import CorruptionError, TruncatedError

Floats = NDArray[np.float32]

_FACTORS = struct.Struct("<hII")  # exponent of the smallest row, columns, start
_FIRST = struct.Struct("<fB")  # step, levels
_LEAST = np.float32(2.0**-120)  # far below any optimizer's epsilon, squared
_LARGEST_STEP = 1e30
_LEAST_SPREAD = 1e-30


def encode_second(words: Words, dtype: str, rows: Rows) -> NearSlice | None:
    """Code one slice of squares as rows times columns, by their mean logarithms.

    A row or column of zeros is zero; other zeros come back as what row and column say.  With as
    many columns as words each word has its own exponent; more are not possible.

    Returns the slice, and what `decode_second` will return; None where values are negative or not
    finite, or their range is too wide.
    """
    values = to_float32(words, dtype)
    if int(words.max(initial=0)) >> (8 * words.itemsize - 1):  # the sign of a word is its top bit
        return None
    shape = rows.columns, rows.start, rows.count(words.size)
    row_sums, in_row, sums, in_column, least, largest = kernels.active().log_sums(values, *shape)
    if not np.isfinite(largest):
        return None
    if least < _LEAST:  # rare; what is zero stays zero
        values = np.where((values < _LEAST) & (values != 0), _LEAST, values)
        row_sums, in_row, sums, in_column, *_ = kernels.active().log_sums(values, *shape)
    payload = put_second(row_sums, in_row, sums, in_column, rows, values)
    return (
        None
        if payload is None
        else NearSlice(payload, decode_second(memoryview(payload), words.size, dtype))
    )


def put_second(
    row_sums: Floats,
    in_row: Integers,
    sums: Floats,
    in_column: Integers,
    rows: Rows,
    values: Floats | None,
) -> bytes | None:
    """Return the payload of a slice from what `kernels.log_sums` says of it; None where the range
    of its values is too wide.  `values` is given where some of them are 0.
    """
    row_codes, low = _exponents(row_sums / np.maximum(in_row, 1), in_row)
    # What rounding took from the rows goes to the columns.
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
    """The rows and the columns whose product a slice of second moments is."""

    rows: Rows
    row: Floats
    column: Floats

    @classmethod
    def of(cls, payload: bytes, count: int) -> Factors:
        """Those of a slice of `count` words that `encode_second` made."""
        (low, columns, start), at = take(_FACTORS, memoryview(payload), 0)
        rows = Rows(int(columns), int(start))
        height = rows.count(count)
        codes, _ = get_section(memoryview(payload), at, height + rows.columns, short=True)
        return cls(rows, *_rows_and_columns(codes, int(low), height))

    def logs(self) -> Floats:
        """log2 of each row's geometric mean; NaN for zeros."""
        with np.errstate(divide="ignore"):
            row, column = np.log2(self.row), np.log2(self.column[self.column > 0])
        middle = column.mean() if column.size else np.float32(0)
        return np.where(self.row > 0, row + middle, np.float32(np.nan)).astype(np.float32)

    def roots(self) -> tuple[Floats, Floats] | None:
        """The square roots of both; None where one is 0."""
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
    """The mean of log2(value) - its row over what is above zero in each column."""
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
    """Half octaves above the smallest, plus 1; 0 where there is nothing.  And the smallest."""
    there = counts > 0
    halves = np.rint(2 * logs).astype(np.int32)
    low = int(halves[there].min()) if there.any() else 0
    return np.where(there, halves - low + 1, 0).astype(np.int32), low


def _within(low: int, row: NDArray[np.integer], column: NDArray[np.integer]) -> bool:
    """Whether all factors and products are normal floats."""
    high = low + int(row.max(initial=1)) - 1
    return low >= HALVES.start and high + int(column.max(initial=1)) - 1 < HALVES.stop


def _rows_and_columns(codes: Bytes, low: int, height: int) -> tuple[Floats, Floats]:
    exponents = codes.astype(np.int32) - 1
    exponents[:height] += low
    factors = np.where(codes > 0, half_powers(np.maximum(exponents, HALVES.start)), np.float32(0))
    return factors[:height], factors[height:]


def decode_second(data: memoryview, count: int, dtype: str, out: Words | None = None) -> Words:
    """A row's power of two times a column's; in `out`, if there is one for float32.

    Raises:
        TruncatedError, CorruptionError: `data` is not such a slice of `count` words.
    """
    (low, columns, start), at = take(_FACTORS, data, 0)
    rows = get_rows(int(columns), int(start))
    if columns > count:
        raise CorruptionError("corrupt frame: more columns than words")
    codes, at = get_section(data, at, rows.count(count) + rows.columns, short=True)
    height = rows.count(count)
    if at != len(data) or not _within(int(low), codes[:height], codes[height:]):
        raise CorruptionError("corrupt frame: second moments out of the range of float32")
    near = room_for_floats(count, dtype, out)
    kernels.active().product(*_rows_and_columns(codes, int(low), height), rows.start, near)
    return from_float32(near, dtype)


def encode_first(
    words: Words, second: Words | None, dtype: str, step: float, zone: float
) -> NearSlice | None:
    """Code one slice of a first moment: in units of sqrt(second) (what `second` decodes to), or
    plainly.  `step` is in standard deviations of these.

    Returns the slice, and what `decode_first` will return; None where values are not finite, or
    not zero where `second` is.
    """
    values = to_float32(words, dtype)
    squares = np.ones(1, np.float32) if second is None else to_float32(second, dtype)
    spread = _spread(sample(values), squares if second is None else sample(squares))
    width = (
        np.float32(min(step * spread, _LARGEST_STEP)) if spread > _LEAST_SPREAD else np.float32(1)
    )
    if second is None:
        squares = np.ones(values.size, np.float32)
    bitmap, kept, good = kernels.active().quantize_units(values, squares, width, np.float32(zone))
    if not good:
        return None
    found = np.unpackbits(bitmap, count=words.size).view(np.bool_)
    units = np.asarray(values[found] / np.sqrt(squares[found]) / width, np.float32)
    levels = (fit_levels(units, kept, zone) * float(width)).astype("<f4")
    codes = Codes(bitmap, kept)
    payload = _FIRST.pack(width, levels.size) + levels.tobytes() + put_codes(codes, words.size)
    return NearSlice(payload, _moment(codes, second, words.size, dtype, width, levels))


def _spread(values: Floats, squares: Floats) -> float:
    """The root mean square of values / sqrt(squares), where that is finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        units = values / np.sqrt(squares)
        units = units[np.isfinite(units)]
        return float(np.sqrt(np.mean(np.square(units, dtype=np.float64)))) if units.size else 0.0


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
    """Levels, times sqrt(second) where there is one; zero where the code is.

    Raises:
        TruncatedError, CorruptionError: `data` is not such a slice of `count` words.
    """
    (step, size), at = take(_FIRST, data, 0)
    end = at + 4 * int(size)
    if end > len(data):
        raise TruncatedError("corrupt frame: truncated reconstruction levels")
    levels = np.frombuffer(data[at:end], "<f4")
    codes, at = get_codes(data, end, count)
    if at != len(data):
        raise CorruptionError("corrupt frame: trailing bytes after its codes")
    return _moment(codes, second, count, dtype, np.float32(step), levels)
