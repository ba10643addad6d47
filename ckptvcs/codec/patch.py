"""Exact patches: the lossless residual from the near form of a slice to its exact words.

A patch exists only while its commit is one of the newest. So encoding is fast and mostly copies:
only the upper bytes of the residuals of weights, which are mostly 0, are worth compressing.
Layout: docs/format.md, "Exact patch".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.dtypes import DType
from ckptvcs.codec.kernels.reference import split_words
from ckptvcs.codec.lossless import DELTA, SPARSE, encode_sparse
from ckptvcs.codec.lossless import decode as decode_lossless
from ckptvcs.codec.masks import get_positions, put_bitmap
from ckptvcs.codec.sections import get_bytes, sample
from ckptvcs.codec.words import Words, octets, word_type
from ckptvcs.errors import CorruptionError, TruncatedError

SAME, WHOLE, NEAR = 0, 1, 2
_SPARSE = 1 / 12  # if fewer words have upper bytes, these and a mask are smaller

Buffers = tuple[bytes | memoryview, ...]
"""The parts of a slice, in order; they are not copied together."""


def encode(words: Words, near: Words, dtype: DType) -> Buffers:
    """Encode words against their near form, as many; the buffers may share memory with `words`.

    The result is verified, because older patches are deleted once it exists.

    Raises:
        CorruptionError: the result does not decode to `words`.
    """
    size = dtype.word
    if words.size:
        low = split_words(sample(words), sample(near), DELTA, dtype.floating)
        raw = size
        while raw and np.count_nonzero(low[raw - 1 :].any(axis=0)) < _SPARSE * low.shape[1]:
            raw -= 1
        if not raw:
            sparse = encode_sparse(words, near, dtype)
            if not np.array_equal(
                decode_lossless(memoryview(sparse), words.size, near, dtype), words
            ):
                raise CorruptionError("exact patch does not restore its source")
            return (sparse,)
        if raw < size and size in (2, 4):
            return _encode_near(words, near, dtype, raw)
    return bytes([WHOLE]), octets(words)


def _encode_near(words: Words, near: Words, dtype: DType, raw: int) -> Buffers:
    planes, bitmap, high, good = kernels.active().split_near(words, near, dtype.floating, raw)
    if not good:
        raise CorruptionError("exact patch does not restore its source")
    upper = high.view(np.uint8).reshape(high.size, 4).T[: dtype.word - raw]
    return (
        bytes([NEAR, raw]),
        *(octets(plane) for plane in planes),
        put_bitmap(bitmap, words.size, high.size),
        upper.tobytes(),
    )


def decode(
    data: memoryview, count: int, near: Words | None, dtype: DType, out: Words | None = None
) -> Words:
    """Decode a patch of `count` words, into `out` if it is given.

    Raises:
        TruncatedError, CorruptionError: `data` is not a patch of `count` words.
    """
    if not len(data):
        raise TruncatedError("corrupt exact patch: empty")
    if near is None:
        raise CorruptionError("exact patch requires its near form")
    form, size = data[0], dtype.word
    if form == SPARSE:
        return decode_lossless(data, count, near, dtype, out)
    if form == SAME and len(data) == 1:
        return near
    if form == WHOLE and len(data) == 1 + count * size:
        return np.frombuffer(data[1:], word_type(size))
    if form != NEAR or len(data) < 2 or size not in (2, 4) or data[1] >= size:
        raise CorruptionError("corrupt exact patch: unknown form or wrong length")
    planes = _near_planes(data, count, size)
    words = np.empty(count, word_type(size)) if out is None else out
    kernels.active().join_words(planes, near, DELTA, dtype.floating, words)
    return words


def _near_planes(data: memoryview, count: int, size: int) -> NDArray[np.uint8]:
    """Read the byte planes of the residuals from a patch of form NEAR: uint8 [size, count]."""
    raw, at = data[1], 2
    planes = np.zeros((size, count), np.uint8)
    for plane in planes[:raw]:
        plane[:], at = get_bytes(data, at, count)
    positions, at = get_positions(data, at, count)
    for plane in planes[raw:]:
        plane[positions], at = get_bytes(data, at, positions.size)
    if at != len(data):
        raise CorruptionError("corrupt exact patch: trailing bytes")
    return planes
