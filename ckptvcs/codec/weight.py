"""Near weights: base + level, on a grid.

Of ExCP's family (residuals, joint use of weights and moments, non-uniform levels), with one step
for the whole model, or one a row by the sensitivity of its weights.  float32 holds the multiples of
a grid of 2^-grid exactly, so decoding rounds nothing: all machines and devices decode the same
bits, and levels can be added up.  Layout: docs/format.md, "Near slices".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import loops
from ckptvcs.codec.codes import MAX_CODE, Codes, Integers, get_codes, put_codes
from ckptvcs.codec.levels import TABLE, amounts_of, fit_levels, signed_table
from ckptvcs.codec.planes import Bytes, get_section, put_section, sample, sample_positions
from ckptvcs.codec.rows import NEUTRAL, QUARTERS, Rows, get_rows, take
from ckptvcs.codec.words import Words, from_float32, to_float32
from ckptvcs.errors import CorruptionError

Floats = NDArray[np.float32]

_HEAD = struct.Struct("<hfBII")  # grid, step, levels, columns (0: no row factors), start
_FINENESS = 3  # a step is at least 2^3 units of the grid
_GRIDS = range(-120, 127)  # where float32 holds every multiple below 2^24 exactly
_SAMPLE = 1 << 15  # words that levels are fitted on
_FACTOR_LIMIT = 2.5  # of a row's step, in natural logarithm


def choose_grid(smallest_step: float, largest: float) -> int | None:
    """The exponent of the grid for steps from `smallest_step` on and values below `largest`.

    None where no grid is fine enough for the steps and small enough for float32.
    """
    if not smallest_step > 1e-36:
        return None
    fine = int(np.ceil(_FINENESS - np.log2(smallest_step)))
    grid = min(fine, int(np.floor(np.log2(MAX_CODE / largest))))
    return grid if grid in _GRIDS and grid > fine - _FINENESS else None


def row_factors(logs: Floats, middle: float, gamma: float) -> Bytes:
    """Row factors of steps, as stored: (second moment / middle)^(-gamma / 2), within e^2.5 of 1.

    `logs` has log2 of the second moment of each row, NaN where there is none, `middle` that of the
    model.
    """
    octaves = -gamma / 2 * (logs - np.float32(middle))
    limit = _FACTOR_LIMIT / np.log(2)
    stored = np.rint(4 * np.clip(octaves, -limit, limit)) + NEUTRAL
    return np.where(np.isnan(logs), NEUTRAL, stored).astype(np.uint8)


def _largest(values: Floats) -> float:
    """max|value|; not finite where one is not."""
    return float(loops.active().extent(values)[1])


def encode_delta(
    words: Words, base: Words, dtype: str, step: float, zone: float,
    factors: tuple[Rows, Bytes] | None = None,
) -> tuple[bytes, Words] | None:  # fmt: skip
    """Code one slice of a weight against its base.  `step` is that of a row whose factor is 1.

    Returns the slice, and what `decode_weight` will return; None where values are not finite, or
    too large for a grid as fine as the step asks.
    """
    values, before = to_float32(words, dtype), to_float32(base, dtype)
    rows, stored = factors or (Rows(max(1, words.size)), np.full(1, NEUTRAL, np.uint8))
    scales = QUARTERS[stored]
    least = step * float(scales.min(initial=1))
    sizes = _largest(values), _largest(before)
    finite = all(map(np.isfinite, sizes))
    # Twice the largest step more than any value: what is decoded stays below 2^24 on the grid too.
    room = 2 * step * float(scales.max(initial=1))
    grid = choose_grid(least, max(sizes) + room) if finite else None
    if grid is None:
        return None
    scale = np.float32(2.0**grid)
    unit_step = np.float32(step * 2.0**grid)
    # No code can be too large: the residual is below 2^24 units of the grid, a step above 1.
    codes = loops.active().quantize(
        values, before, scale, unit_step * scales, rows.columns, rows.start, np.float32(zone)
    )
    levels = _fit(values, before, scale, unit_step, scales, rows, codes, zone)
    head = _HEAD.pack(
        grid, unit_step, levels.size, rows.columns if factors else 0, rows.start if factors else 0
    )
    section = put_section(stored, short=True) if factors else b""
    found = Codes(None, codes)
    decoded = _apply(found, base, dtype, grid, unit_step, levels, factors)
    if dtype != "F32" and not np.isfinite(to_float32(decoded, dtype)).all():
        return None  # rounded up to infinity
    return head + levels.tobytes() + section + put_codes(found, codes.size), decoded


def _fit(
    values: Floats, before: Floats, scale: np.float32, step: np.float32, factors: Floats,
    rows: Rows, codes: Integers, zone: float,
) -> NDArray[np.uint16]:  # fmt: skip
    """Levels in units of the grid, from a sample."""
    units = sample(values, _SAMPLE) * scale - np.rint(sample(before, _SAMPLE) * scale)
    row = rows.of(sample_positions(values.size, _SAMPLE))
    units /= step * (factors if factors.size == 1 else factors[row])
    means = fit_levels(units, sample(codes, _SAMPLE), zone) * float(step)
    return np.clip(np.rint(means), 1, 65535).astype("<u2")


def encode_keyframe(words: Words, dtype: str, step: float) -> tuple[bytes, Words] | None:
    """Code one slice of a weight by itself, on the coarsest grid that is not coarser than `step`.

    Returns and refuses as `encode_delta` does.
    """
    values = to_float32(words, dtype)
    largest = _largest(values)
    if not (step > 1e-36 and np.isfinite(largest)):
        return None
    grid = int(np.ceil(-np.log2(step)))
    if grid not in _GRIDS or largest * 2.0**grid >= MAX_CODE - 1:
        return None
    codes = np.rint(values * np.float32(2.0**grid)).astype(np.int32)
    payload = _HEAD.pack(grid, 1, 0, 0, 0) + put_codes(Codes(None, codes), codes.size)
    return payload, _keyframe(codes, dtype, grid)


def _apply(
    codes: Codes, base: Words, dtype: str, grid: int, step: np.float32,
    levels: NDArray[np.uint16], factors: tuple[Rows, Bytes] | None, *, in_place: bool = False,
) -> Words:  # fmt: skip
    """Base + levels where there are codes; the words of the base elsewhere."""
    sizes = levels.astype(np.float32)
    scale = np.float32(2.0**grid)
    rows, stored = factors or (Rows(max(1, base.size)), np.full(1, NEUTRAL, np.uint8))
    steps = signed_table(sizes, step), QUARTERS[stored], rows.columns, rows.start
    with np.errstate(over="ignore", invalid="ignore"):
        if codes.positions is None:
            near = loops.active().restore(to_float32(base, dtype), codes.values, scale, *steps)
            out = from_float32(near, dtype)
            if dtype != "F32":  # rounding must not touch the words of the base
                out = np.where(codes.values != 0, out, base)
        elif dtype == "F32":
            in_place = in_place and base.flags.writeable and codes.largest < TABLE
            out = base if in_place else base.copy()
            loops.active().change(
                out.view(np.float32), codes.positions, codes.values, scale, *steps
            )
        else:
            out = base.copy()
            near = to_float32(base, dtype).copy()
            loops.active().change(near, codes.positions, codes.values, scale, *steps)
            out[codes.positions] = from_float32(near[codes.positions], dtype)
    if codes.largest >= TABLE:
        large = np.flatnonzero(np.abs(codes.values) >= TABLE)
        at = large if codes.positions is None else codes.positions[large]
        _change(out, base, at, codes.values[large], dtype, scale, step, sizes, factors)
    return out


def _keyframe(codes: Integers, dtype: str, grid: int) -> Words:
    with np.errstate(over="ignore", invalid="ignore"):
        return from_float32(codes.astype(np.float32) * np.float32(2.0**-grid), dtype)


def _change(
    out: Words, base: Words, at: NDArray[np.signedinteger], codes: Integers, dtype: str,
    scale: np.float32, step: np.float32, levels: Floats, factors: tuple[Rows, Bytes] | None,
) -> None:  # fmt: skip
    """Change the words of codes that no table holds."""
    with np.errstate(over="ignore", invalid="ignore"):
        units = amounts_of(np.abs(codes), levels, step)
        if factors is not None:
            units *= QUARTERS[factors[1]][factors[0].of(at)]
        np.rint(units, out=units)
        np.negative(units, out=units, where=codes < 0)
        units += np.rint(to_float32(base[at], dtype) * scale)
        units *= np.float32(1) / scale
        out[at] = from_float32(units, dtype)


def decode_weight(
    data: memoryview, base: Words | None, count: int, dtype: str, *, in_place: bool = False
) -> Words:
    """Base (or zero) + levels, on the grid; entries whose code is 0 are the base's words.

    Raises:
        TruncatedError, CorruptionError: `data` is not a weight slice of `count` words.
    """
    (grid, step, size, columns, start), at = take(_HEAD, data, 0)
    if grid not in _GRIDS or not 0 < step < np.inf or at + 2 * int(size) > len(data):
        raise CorruptionError("a frame holds a weight on an impossible grid")
    levels = np.frombuffer(data[at : at + 2 * int(size)], "<u2")
    at += 2 * int(size)
    factors = None
    if columns:
        rows = get_rows(int(columns), int(start))
        stored, at = get_section(data, at, rows.count(count), short=True)
        factors = rows, stored
    codes, at = get_codes(data, at, count)
    if at != len(data):
        raise CorruptionError("a frame has bytes after its codes")
    if base is None and not size and step == 1 and factors is None:
        return _keyframe(codes.dense(count), dtype, int(grid))
    if base is None:
        base = np.zeros(count, np.uint32 if dtype == "F32" else np.uint16)
    return _apply(
        codes, base, dtype, int(grid), np.float32(step), levels, factors, in_place=in_place
    )
