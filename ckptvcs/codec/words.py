"""Words: tensors as flat arrays of unsigned integers, and the numbers that they stand for."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.dtypes import DTYPES, WEIGHT_DTYPES

Words = NDArray[np.unsignedinteger]
"""A flat array of unsigned integers holding the little-endian words of a tensor."""

NONE = np.zeros(0, np.float32)
"""No values."""


class NearSlice(NamedTuple):
    """A slice in a near form: the payload, the words it decodes to, and sums over their errors (as
    `kernels.weight_squares` has them) where these came out on the way.
    """

    payload: bytes
    decoded: Words
    sums: tuple[float, ...] | None = None


def octets(array: NDArray[np.generic]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.view(np.uint8).data


_WORD_TYPES: dict[int, np.dtype[np.unsignedinteger]] = {
    size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)
}


def word_type(word: int) -> np.dtype[np.unsignedinteger]:
    """The little-endian unsigned numpy type of `word` bytes (1, 2, 4 or 8)."""
    return _WORD_TYPES[word]


def to_float32(words: Words, dtype: str) -> NDArray[np.float32]:
    """The values of F32, F16 or BF16 words as float32, exactly; those of F64 words to nearest."""
    if dtype == "F32":
        return words.view(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore", invalid="ignore"):
            return words.view(np.float64).astype(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def room_for_floats(count: int, dtype: str, out: Words | None) -> NDArray[np.float32]:
    """Where `count` values go that become words of `dtype`: `out` itself where these are float32,
    and there is one.
    """
    if out is not None and dtype == "F32":
        return out.view(np.float32)
    return np.empty(count, np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> Words:
    """Round finite float32 values to words of F64, F32, F16 or BF16, to nearest, ties to even."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F64":
        return values.astype(np.float64).view(np.uint64)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)


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
    """Return how many numbers one element is: two for complex types and for F4 (a pair a byte)."""
    return 2 if dtype in _PARTS or dtype == "F4" else 1


def to_float64(words: Words, dtype: str) -> NDArray[np.float64]:
    """Return the numbers that flat words stand for, `numbers_of` for each element, in their order.

    Floats of up to 64 bits and integers of up to 53 come out exactly; longer integers are rounded.
    """
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
def _table(dtype: str) -> NDArray[np.float64]:
    """What each byte stands for: 256 rows."""
    byte = np.arange(256)
    if dtype == "F8_E8M0":  # a power of two, without a sign
        powers: NDArray[np.float64] = np.exp2(byte - 127.0)
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
    values: NDArray[np.float64] = fraction * np.exp2(np.maximum(exponent, 1.0) - bias)
    values[(low >= infinite) & (low < none)] = np.inf
    values[low >= none] = np.nan
    values = np.where(byte > 0x7F, -values, values)
    if infinite > 0x7F:  # no negative zero: its byte is the one that is no number
        values[0x80] = np.nan
    return values
