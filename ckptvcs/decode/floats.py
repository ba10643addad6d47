"""The numbers that words stand for, whatever their element type, as float64.

Floats of up to 64 bits and integers of up to 53 come out exactly; longer integers are rounded.
A complex number comes out as two numbers, an F4 pair (which shares a byte) as well.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.words import Words, to_float32
from ckptvcs.dtypes import DTYPES, WEIGHT_DTYPES
from ckptvcs.errors import InvalidInputError
from ckptvcs.history.schema import BIG, UNKNOWN, TensorInfo

Floats = NDArray[np.float64]

_PARTS = {"C32": "F16", "C64": "F32", "C128": "F64"}
# Element type -> bits of the mantissa, bias of the exponent, and which bytes but the sign are no
# finite number: (first infinite, first that is no number).  The rest of a byte is the exponent.
_MINIFLOATS = {
    "F8_E4M3": (3, 7, 0x7F, 0x7F),
    "F8_E5M2": (2, 15, 0x7C, 0x7D),
    "F8_E4M3FNUZ": (3, 8, 0x80, 0x80),
    "F8_E5M2FNUZ": (2, 16, 0x80, 0x80),
}


def numbers_of(dtype: str) -> int:
    """How many numbers one element is."""
    return 2 if dtype in _PARTS or dtype == "F4" else 1


def in_our_order(words: Words, info: TensorInfo) -> Words:
    """The words of a tensor as little-endian ones.

    Raises:
        InvalidInputError: nobody knows in which order they are.
    """
    if info.order == UNKNOWN:
        raise InvalidInputError(
            f"{info.name} is of a big-endian machine, and its file does not say how it is stored",
            hint="'ckpt checkout' gives the file back",
        )
    return words.byteswap() if info.order == BIG else words


def to_float64(words: Words, dtype: str) -> Floats:
    """The numbers of flat words, `numbers_of` for each element, in their order."""
    dtype = _PARTS.get(dtype, dtype)
    if dtype == "F64":
        return words.view(np.float64)
    if dtype in WEIGHT_DTYPES:
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            return to_float32(words, dtype).astype(np.float64)
    if dtype in _MINIFLOATS or dtype in ("F8_E8M0", "F4"):
        return _table(dtype)[words].reshape(-1)
    if dtype.startswith("I"):
        return words.view(f"<i{DTYPES[dtype].word}").astype(np.float64)
    return words.astype(np.float64)


@lru_cache
def _table(dtype: str) -> Floats:
    """What each byte stands for: 256 rows."""
    byte = np.arange(256)
    if dtype == "F8_E8M0":  # a power of two, without a sign
        powers: Floats = np.exp2(byte - 127.0)
        powers[255] = np.nan
        return powers
    if dtype == "F4":  # the low half comes first
        four = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        four = np.concatenate([four, -four])
        return np.stack([four[byte & 15], four[byte >> 4]], axis=1)
    mantissa_bits, bias, infinite, none = _MINIFLOATS[dtype]
    low = byte & 0x7F
    exponent, mantissa = low >> mantissa_bits, low & ((1 << mantissa_bits) - 1)
    # The lowest exponent has no leading one, and stands for the same power as the next.
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values: Floats = fraction * np.exp2(np.maximum(exponent, 1.0) - bias)
    values[(low >= infinite) & (low < none)] = np.inf
    values[low >= none] = np.nan
    values = np.where(byte > 0x7F, -values, values)
    if infinite > 0x7F:  # no negative zero: its byte is the one that is no number
        values[0x80] = np.nan
    return values
