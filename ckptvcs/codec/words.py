"""Words: tensors as flat arrays of unsigned integers, and their conversion to numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.dtypes import DTYPES, WEIGHT_DTYPES, float_type

Words = NDArray[np.unsignedinteger]
"""The little-endian words of a tensor, flat."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Bytes = NDArray[np.uint8]

NONE = np.zeros(0, np.float32)
"""An empty array, for arguments that are not given."""


class NearSlice(NamedTuple):
    """A near slice: its payload and the words that it decodes to.

    `sums` is the result of `weight_squares` (`ckptvcs.codec.kernels`) if the encoder computed it.
    """

    payload: bytes
    decoded: Words
    sums: tuple[float, ...] | None = None


def octets(array: NDArray[np.generic]) -> memoryview:
    """Return the bytes of a contiguous array without copying them."""
    return array.view(np.uint8).data


def double_squares(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the squares in float64, in a new array.

    A ufunc that casts takes memory for its buffers without the interpreter's lock; where there is
    none left, numpy ends the process. `astype` raises MemoryError.
    """
    wide = values.astype(np.float64)
    return np.square(wide, out=wide)


_WORD_TYPES: dict[int, np.dtype[np.unsignedinteger]] = {
    size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)
}


def word_type(word: int) -> np.dtype[np.unsignedinteger]:
    """Return numpy's little-endian unsigned type of `word` bytes (1, 2, 4 or 8)."""
    return _WORD_TYPES[word]


def to_float32(words: Words, dtype: str) -> NDArray[np.float32]:
    """Convert F32, F16 or BF16 words to float32 exactly; round F64 words to nearest."""
    if dtype == "F32":
        return words.view(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore", invalid="ignore"):
            return words.view(np.float64).astype(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def room_for_floats(count: int, dtype: str, out: Words | None) -> NDArray[np.float32]:
    """Return an array for `count` floats that become words of `dtype`: `out` if that is F32."""
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


# Element type -> bits of the mantissa, bias of the exponent, the smallest byte (without its sign)
# that is infinite, and the smallest one that is NaN.
_MINIFLOATS = {
    "F8_E4M3": (3, 7, 0x7F, 0x7F),
    "F8_E5M2": (2, 15, 0x7C, 0x7D),
    "F8_E4M3FNUZ": (3, 8, 0x80, 0x80),
    "F8_E5M2FNUZ": (2, 16, 0x80, 0x80),
}


def numbers_of(dtype: str) -> int:
    """Return the count of numbers per element: two for complex types and F4, else one."""
    return 2 if dtype == "F4" or float_type(dtype) != dtype else 1


def to_float64(words: Words, dtype: str) -> NDArray[np.float64]:
    """Convert words to numbers, `numbers_of(dtype)` per element.

    Integers of more than 53 bits are rounded; all other values are exact.
    """
    dtype = float_type(dtype)
    if dtype == "F64":
        return words.view(np.float64)
    if dtype in WEIGHT_DTYPES:
        with np.errstate(invalid="ignore"):  # converting a signalling NaN
            return to_float32(words, dtype).astype(np.float64)
    if dtype in _MINIFLOATS or dtype in ("F8_E8M0", "F4"):
        return _table(dtype)[words].reshape(-1)
    if dtype.startswith("I"):
        return words.view(f"<i{DTYPES[dtype].word}").astype(np.float64)
    return words.astype(np.float64)


@lru_cache
def _table(dtype: str) -> NDArray[np.float64]:
    """Return the value of each byte, shape [256], or [256, 2] for F4."""
    byte = np.arange(256)
    if dtype == "F8_E8M0":  # a power of two, without a sign
        powers: NDArray[np.float64] = np.exp2(byte - 127.0)
        powers[255] = np.nan
        return powers
    if dtype == "F4":  # the low half is the first number
        four = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        four = np.concatenate([four, -four])
        return np.stack([four[byte & 15], four[byte >> 4]], axis=1)
    mantissa_bits, bias, infinite, nan = _MINIFLOATS[dtype]
    low = byte & 0x7F
    exponent, mantissa = low >> mantissa_bits, low & ((1 << mantissa_bits) - 1)
    # Subnormals have no leading one, and the same power of two as exponent 1.
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values: NDArray[np.float64] = fraction * np.exp2(np.maximum(exponent, 1.0) - bias)
    values[(low >= infinite) & (low < nan)] = np.inf
    values[low >= nan] = np.nan
    values = np.where(byte > 0x7F, -values, values)
    if infinite > 0x7F:  # the byte of negative zero is NaN
        values[0x80] = np.nan
    return values
