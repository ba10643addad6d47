"""Near weights: the base plus a quantized residual, on a grid.

As in ExCP, residuals have non-uniform reconstruction levels, and moments guide the quantization.
The quantization step is that of the whole model, times a factor for each row. All results are
multiples of 2^-grid, which float32 holds exactly: every machine decodes the same bits, and deltas
can be added. Layout: docs/format.md, "Near slices", method 4.
"""

from __future__ import annotations

import struct
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.codes import MAX_CODE, Codes, get_codes, put_codes
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.matrix import NEUTRAL, QUARTERS, Rows, get_rows
from ckptvcs.codec.quantize import TABLE, fit_levels, signed_table
from ckptvcs.codec.sections import get_section, put_section, sample, sample_positions, take
from ckptvcs.codec.words import (
    NONE,
    Bytes,
    Floats,
    Integers,
    NearSlice,
    Words,
    from_float32,
    to_float32,
    word_type,
)
from ckptvcs.errors import CorruptionError

NO_FACTORS = np.full(1, NEUTRAL, np.uint8)

_HEAD = struct.Struct("<hfBII")  # grid, quantization step, J, columns (0: no row factors), start
_FINENESS = 3  # log2 of the units of the grid per quantization step, if values allow it
_GRIDS = range(-120, 127)  # float32 holds all multiples below 2^24 of these grids
_SAMPLE = 1 << 14  # words from which levels are computed
_FACTOR_LIMIT = 2.5  # largest natural logarithm of a row factor


def choose_grid(smallest_step: float, largest: float) -> int | None:
    """Return the exponent of the grid for these steps and for values below `largest`.

    None if float32 has no grid that is fine enough.
    """
    if not smallest_step > 1e-36:
        return None
    fine = int(np.ceil(_FINENESS - np.log2(smallest_step)))
    grid = min(fine, int(np.floor(np.log2(MAX_CODE / largest))))
    return grid if grid in _GRIDS and grid > fine - _FINENESS else None


def row_factors(logs: Floats, middle: float, gamma: float) -> Bytes:
    """Return the bytes of the row factors: (second moment / middle)^(-gamma / 2).

    `logs` has log2 of the second moment of each row (NaN: factor 1), `middle` is that of the model.
    Factors are between e^-2.5 and e^2.5.
    """
    octaves = -gamma / 2 * (logs - np.float32(middle))
    limit = _FACTOR_LIMIT / np.log(2)
    stored = np.rint(4 * np.clip(octaves, -limit, limit)) + NEUTRAL
    return np.where(np.isnan(logs), NEUTRAL, stored).astype(np.uint8)


class Residuals(Protocol):
    """A slice of a weight and of its base, in memory or on a device."""

    size: int

    def sample(self, size: int) -> tuple[Floats, Floats]:
        """Return values and base at the positions of `sections.sample`."""

    def code(
        self,
        scale: np.float32,
        step: np.float32,
        zone: np.float32,
        amounts: Floats,
        factors: Floats,
        columns: int,
        start: int,
    ) -> tuple[Bytes, Integers, tuple[float, ...], float]:
        """Return all results of `code_residuals` but the first."""

    def largest(self) -> float:
        """Return the largest magnitude in values and base; not finite if one of them is not."""


class _InMemory:
    def __init__(self, values: Floats, base: Floats, weights: Floats) -> None:
        self.values, self.base, self.weights = values, base, weights
        self.size, self.near = values.size, NONE

    def sample(self, size: int) -> tuple[Floats, Floats]:
        return sample(self.values, size), sample(self.base, size)

    def code(self, *how: Any) -> tuple[Bytes, Integers, tuple[float, ...], float]:
        coded = kernels.active().code_residuals(self.values, self.base, self.weights, *how)
        self.near, bitmap, codes, sums, bound = coded
        return bitmap, codes, sums, bound

    def largest(self) -> float:
        extents = [kernels.active().extent(x)[1] for x in (self.values, self.base)]
        return float(np.max(extents))  # NaN if one is NaN


def encode_delta(
    words: Words,
    base: Words,
    dtype: str,
    step: float,
    zone: float,
    factors: tuple[Rows, Bytes] | None = None,
    weights: Floats = NONE,
) -> NearSlice | None:
    """Encode a slice of a weight against its base.

    `step` is the quantization step of a row with factor 1, `zone` the dead zone in steps, `factors`
    the matrix and the bytes of its row factors. For F32, the result has the sums of
    `weight_squares`, weighted by `weights` (float32 [n]).

    Returns None if values are not finite, or too large for a grid that is fine enough.
    """
    slices = _InMemory(
        to_float32(words, dtype), to_float32(base, dtype), weights if dtype == "F32" else NONE
    )
    delta = put_delta(slices, step, zone, factors)
    if delta is None:
        return None
    payload, sums = delta
    if dtype == "F64":  # unchanged entries keep all bits of the base
        decoded = decode_weight(memoryview(payload), base, words.size, dtype)
    else:
        decoded = from_float32(slices.near, dtype)
    if dtype != "F32" and not np.isfinite(to_float32(decoded, dtype)).all():
        return None  # rounded up to infinity
    return NearSlice(payload, decoded, sums if dtype == "F32" else None)


def put_delta(
    residuals: Residuals, step: float, zone: float, factors: tuple[Rows, Bytes] | None
) -> tuple[bytes, tuple[float, ...]] | None:
    """Encode a slice; return it and the sums of `weight_squares`, or None as in `encode_delta`.

    In contrast to `encode_delta`, entries of a 16-bit weight may round to infinity.
    """
    rows, stored = factors or (Rows(max(1, residuals.size)), NO_FACTORS)
    scales = QUARTERS[stored]
    least, most = (step * float(edge(initial=1)) for edge in (scales.min, scales.max))
    room = 2 * most  # so that decoded values are below 2^24 units, too
    grid, is_final = choose_grid(least, room), False  # assumes small values, to save a pass
    while True:
        if grid is None:
            return None
        scale, unit_step = np.float32(2.0**grid), np.float32(step * 2.0**grid)
        levels = _fit(residuals, scale, unit_step, scales, rows, zone)
        if levels is None:
            return None
        table = signed_table(levels.astype(np.float32), unit_step)
        bitmap, codes, sums, bound = residuals.code(
            scale, unit_step, np.float32(zone), table, scales, rows.columns, rows.start
        )
        if is_final or (float(bound) + room) * 2.0**grid < MAX_CODE:
            break
        largest, before, is_final = residuals.largest(), grid, True
        grid = choose_grid(least, largest + room) if np.isfinite(largest) else None
        if grid == before:
            break
    columns, start = (rows.columns, rows.start) if factors else (0, 0)
    head = _HEAD.pack(grid, unit_step, levels.size, columns, start)
    section = put_section(stored, short=True) if factors else b""
    coded = put_codes(Codes(bitmap, codes), residuals.size)
    return head + levels.tobytes() + section + coded, sums


def _fit(
    residuals: Residuals,
    scale: np.float32,
    step: np.float32,
    factors: Floats,
    rows: Rows,
    zone: float,
) -> NDArray[np.uint16] | None:
    """Return levels in units of the grid, from a sample; None if codes would be too large."""
    with np.errstate(over="ignore", invalid="ignore"):
        values, before = residuals.sample(_SAMPLE)
        units = values * scale - np.rint(before * scale)
        row = rows.of(sample_positions(residuals.size, _SAMPLE))
        units /= step * (factors if factors.size == 1 else factors[row])
        if not (np.abs(units) < MAX_CODE).all():
            return None
    codes = (units + np.copysign(np.float32(1 - zone), units)).astype(np.int32)
    means = fit_levels(units, codes, zone) * float(step)
    return np.clip(np.rint(means), 1, 65535).astype("<u2")


def encode_keyframe(words: Words, dtype: str, step: float) -> NearSlice | None:
    """Encode a slice of a weight without a base, on the coarsest grid of at most `step`.

    Returns None if values are not finite or too large.
    """
    values = to_float32(words, dtype)
    largest = float(kernels.active().extent(values)[1])
    if not (step > 1e-36 and np.isfinite(largest)):
        return None
    grid = int(np.ceil(-np.log2(step)))
    if grid not in _GRIDS or largest * 2.0**grid >= MAX_CODE - 1:
        return None
    codes = np.rint(values * np.float32(2.0**grid)).astype(np.int32)
    payload = _HEAD.pack(grid, 1, 0, 0, 0) + put_codes(Codes(None, codes), codes.size)
    return NearSlice(payload, _keyframe(codes, dtype, grid))


def find_grid(words: Words, dtype: str) -> int | None:
    """Return the coarsest grid of which all values are multiples.

    None if all values are 0, one is subnormal or not finite, or 24 bits do not hold them.
    """
    bits = to_float32(words, dtype).view(np.uint32) & np.uint32(0x7FFFFFFF)
    bits = bits[bits != 0]
    exponents = (bits >> np.uint32(23)).astype(np.int32)
    if not bits.size or int(exponents.min()) == 0 or int(exponents.max()) == 255:
        return None
    fraction = (bits & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
    lowest = fraction & (~fraction + np.uint32(1))
    zeros = (lowest.astype(np.float32).view(np.uint32) >> np.uint32(23)).astype(np.int32) - 127
    grid = 150 - int((exponents + zeros).min())
    largest = float(bits.max().view(np.float32))
    return grid if grid in _GRIDS and largest * 2.0**grid < MAX_CODE - 1 else None


def encode_difference(words: Words, base: Words, dtype: str) -> NearSlice | None:
    """Encode a slice of a weight against any earlier base exactly: the sum of the deltas between.

    Returns None if the two have no common grid.
    """
    grids = [find_grid(words, dtype), find_grid(base, dtype)]
    if grids[0] is None or grids[1] is None:
        return None
    grid = max(grids[0], grids[1])
    scale = np.float32(2.0**grid)
    with np.errstate(over="ignore", invalid="ignore"):
        values, before = (to_float32(x, dtype) * scale for x in (words, base))
        steps = values - before
        if not (max(np.abs(x).max() for x in (values, before, steps)) < MAX_CODE):
            return None
    payload = _HEAD.pack(grid, 1, 0, 0, 0)
    payload += put_codes(Codes(None, steps.astype(np.int32)), words.size)
    return NearSlice(payload, decode_weight(memoryview(payload), base, words.size, dtype))


def _keyframe(codes: Integers, dtype: str, grid: int) -> Words:
    with np.errstate(over="ignore", invalid="ignore"):
        return from_float32(codes.astype(np.float32) * np.float32(2.0**-grid), dtype)


def _get_levels(
    data: memoryview, at: int, grid: float, step: float, size: int
) -> tuple[NDArray[np.uint16], int]:
    """Check the header of a slice and read its `size` reconstruction levels."""
    end = at + 2 * size
    if grid not in _GRIDS or not 0 < step < np.inf or end > len(data):
        raise CorruptionError("corrupt weight slice: invalid grid or quantization step")
    levels = np.frombuffer(data[at:end], "<u2")
    if size >= TABLE or not int(levels.min(initial=1)):
        raise CorruptionError("corrupt weight slice: invalid reconstruction levels")
    return levels, end


def decode_weight(
    data: memoryview, base: Words | None, count: int, dtype: str, *, in_place: bool = False
) -> Words:
    """Decode a slice of `count` words: method 4. `in_place` may overwrite `base`.

    Raises:
        TruncatedError, CorruptionError: `data` is not a weight slice of `count` words.
    """
    (grid, step, size, columns, start), at = take(_HEAD, data, 0)
    levels, at = _get_levels(data, at, grid, step, size)
    rows, stored = Rows(max(1, count)), NO_FACTORS
    if columns:
        rows = get_rows(columns, start)
        stored, at = get_section(data, at, rows.count(count), short=True)
    codes, at = get_codes(data, at, count)
    if at != len(data):
        raise CorruptionError("corrupt frame: trailing bytes after its codes")
    if base is None and not size and step == 1 and not columns:
        return _keyframe(codes.dense(count), dtype, grid)
    if base is None:
        base = np.zeros(count, word_type(DTYPES[dtype].word))
    in_place = in_place and base.flags.writeable
    near = to_float32(base if dtype != "F32" or in_place else base.copy(), dtype)
    kernels.active().change(
        near,
        *codes.sparse(),
        np.float32(2.0**grid),
        np.float32(step),
        signed_table(levels.astype(np.float32), np.float32(step)),
        QUARTERS[stored],
        rows.columns,
        rows.start,
    )
    if dtype == "F32":
        return near.view(np.uint32)
    # Entries with code 0 keep the words of the base, which may be NaNs.
    moved = codes.dense(count) != 0
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(moved, from_float32(near, dtype), base)
