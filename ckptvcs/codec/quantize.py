"""Dead-zone quantization with levels: what sizes the codes of a slice stand for.

The code of y (in steps) is 0 where |y| < zone, else sign(y) * floor(|y| + 1 - zone).  Small codes
come back as the mean of their values (non-uniform levels, as ExCP has them), large ones as so many
steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.codes import Integers

Floats = NDArray[np.float32]

_MAX_LEVELS = 15  # larger codes are so few that a level of their own does not pay
TABLE = 128  # codes below this in magnitude are looked up


def fit_levels(units: Floats, codes: Integers, zone: float) -> NDArray[np.float64]:
    """The mean |units| of each code from 1 up to the largest that is worth a level of its own.

    `units` are in steps.  No level is above twice the lower edge of its
    code: so no value comes back worse than it would from zero.
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
    """What codes of these sizes (not negative) stand for: their level, or as many steps."""
    table = np.concatenate((np.zeros(1, np.float32), levels))
    known = table[np.minimum(sizes, levels.size)]
    with np.errstate(over="ignore"):
        return np.where(sizes <= levels.size, known, sizes.astype(np.float32) * step)


def signed_table(levels: Floats, step: np.float32) -> Floats:
    """What each code c from -127 to 127 stands for, with its sign, at c & 255."""
    codes = np.arange(256, dtype=np.int32)
    codes -= np.where(codes > TABLE, 256, 0).astype(np.int32)
    amounts = amounts_of(np.abs(codes), levels, step)
    return np.where(codes < 0, -amounts, amounts)
