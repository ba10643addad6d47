"""Interpolation between two decoded slices.

Every step is one float64 operation of IEEE 754, so the result has the same bits on every machine.
Layout: docs/format.md, "Recipe".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.words import Words, from_float32, to_float32


def interpolate(first: Words, last: Words, part: int, whole: int, dtype: str) -> Words:
    """Return the words `part / whole` of the way from `first` to `last`.

    `dtype` is their type, one of `WEIGHT_DTYPES`.  `whole` is at most `recipe.MAX_SHARE`, so that
    both products are exact for a float32.  F64 words are rounded once, others to float32 first.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean = _doubles(first, dtype) * np.float64(whole - part)
        mean += _doubles(last, dtype) * np.float64(part)
        mean /= np.float64(whole)
        if dtype == "F64":
            return mean.view(first.dtype)
        return from_float32(mean.astype(np.float32), dtype)


def _doubles(words: Words, dtype: str) -> NDArray[np.float64]:
    if dtype == "F64":
        return words.view(np.float64)
    return to_float32(words, dtype).astype(np.float64)
