"""Exact patches: what makes the words of a slice of those of its near form, at the speed of memory.

A patch lives as long as its commit is among the newest, so it is copied where a general coder would
search: weights are near their near form, which leaves their top bytes mostly 0; what is left of
them, and all of the moments, hardly compresses.  Layout: docs/format.md, "Exact patch".
"""

from __future__ import annotations

import numpy as np

from ckptvcs.codec import loops
from ckptvcs.codec.lossless import DELTA, loops_for
from ckptvcs.codec.planes import Bytes, get_bytes, sample
from ckptvcs.codec.sparse import get_positions, put_bitmap
from ckptvcs.codec.words import Words, octets, word_type
from ckptvcs.dtypes import DType
from ckptvcs.errors import CorruptionError, TruncatedError

SAME, WHOLE, NEAR = 0, 1, 2
_SPARSE = 1 / 12  # of the bytes of a plane: below, these and where they are take less room

Buffers = tuple[bytes | memoryview, ...]
"""Bytes that stand one after another; not copied, as long as they are only passed on."""


def encode(words: Words, near: Words, dtype: DType) -> Buffers:
    """Code words against their near form, as many; the buffers may be those of `words`."""
    loop = loops_for(words)
    size = dtype.word
    tops = loop.split_words(sample(words), sample(near), DELTA, dtype.floating)
    raw = size
    while raw and np.count_nonzero(tops[raw - 1]) < _SPARSE * tops.shape[1]:
        raw -= 1
    if raw == size:
        return bytes([WHOLE]), octets(words)
    planes = loop.split_words(words, near, DELTA, dtype.floating)
    parts: list[bytes | memoryview] = [bytes([NEAR, raw])]
    parts += [octets(plane) for plane in planes[:raw]]
    for plane in planes[raw:]:
        bitmap = np.packbits(plane != 0)
        kept = plane[loops.active().bit_positions(bitmap, plane.size)]
        parts += [put_bitmap(bitmap, plane.size, kept.size), octets(kept)]
    return tuple(parts)


def decode(
    data: memoryview, count: int, near: Words | None, dtype: DType, out: Words | None = None
) -> Words:
    """Read back the `count` words that `encode` was given; in `out`, if there is one.

    Raises:
        TruncatedError, CorruptionError: `data` is no patch of `count` words.
    """
    if not len(data):
        raise TruncatedError("a patch is empty")
    if near is None:
        raise CorruptionError("a patch lacks what it is for")
    form = data[0]
    if form == SAME and len(data) == 1:
        return near
    size = dtype.word
    if form == WHOLE and len(data) == 1 + count * size:
        return np.frombuffer(data[1:], word_type(size))
    if form != NEAR or len(data) < 2 or data[1] >= size:
        raise CorruptionError("a patch has an unknown form, or another length")
    raw, at = data[1], 2
    planes = np.zeros((size, count), np.uint8)
    for plane in range(size):
        at = _get_plane(data, at, planes[plane], sparse=plane >= raw)
    if at != len(data):
        raise CorruptionError("a patch goes on after its end")
    words = np.empty(count, word_type(size)) if out is None else out
    loops_for(words).join_words(planes, near, DELTA, dtype.floating, words)
    return words


def _get_plane(data: memoryview, at: int, plane: Bytes, *, sparse: bool) -> int:
    """Read a plane, which is 0; where the next one begins."""
    if not sparse:
        plane[:], at = get_bytes(data, at, plane.size)
        return at
    positions, at = get_positions(data, at, plane.size)
    plane[positions], at = get_bytes(data, at, positions.size)
    return at
