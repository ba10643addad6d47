"""Words: tensors as flat arrays of unsigned integers, and their values as float32."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
