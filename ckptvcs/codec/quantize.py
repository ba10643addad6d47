"""Reconstruction levels of a quantizer with a dead zone.

The code of y, in quantization steps, is 0 if |y| < zone, else sign(y) * floor(|y| + 1 - zone).
The level of a small magnitude is the mean of its values (non-uniform levels, as in ExCP). A larger
magnitude m stands for m steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.words import Floats, Integers

_MAX_LEVELS = 15  # larger codes are too rare to be worth a level
TABLE = 128  # the table of levels holds codes with magnitudes below this


def fit_levels(units: Floats, codes: Integers, zone: float) -> NDArray[np.float64]:
    """Return the mean |units| of each magnitude, from 1 to the largest that gets a level.

    `units` are the values in quantization steps. A level is at most twice the smallest value of its
    code, so that no value gets a larger error than from code 0.
    """
    size = np.abs(codes)
    top = min(int(size.max(initial=0)), _MAX_LEVELS)
    small = size <= top
    values = np.abs(units[small])
    counts = np.bincount(size[small], minlength=top + 1)[1:]
    sums = np.bincount(size[small], values, minlength=top + 1)[1:]
    plain = np.arange(1, top + 1, dtype=np.float64)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), plain)
    return np.minimum(means, 2 * (plain - 1 + zone))


def amounts_of(sizes: Integers, levels: Floats, step: np.float32) -> Floats:
    """Return L(m) for each magnitude m: its level if it has one, else m * step."""
    table = np.concatenate((np.zeros(1, np.float32), levels))
    level = table[np.minimum(sizes, levels.size)]
    with np.errstate(over="ignore"):
        return np.where(sizes <= levels.size, level, sizes.astype(np.float32) * step)


def signed_table(levels: Floats, step: np.float32) -> Floats:
    """Return a table of the signed levels of codes c from -127 to 127, at index c & 255."""
    codes = np.arange(256, dtype=np.int32)
    codes -= np.where(codes > TABLE, 256, 0).astype(np.int32)
    amounts = amounts_of(np.abs(codes), levels, step)
    return np.where(codes < 0, -amounts, amounts)
