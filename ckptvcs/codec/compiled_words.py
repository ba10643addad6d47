"""The loops of `ckptvcs.codec.loops` over the bytes of words, compiled; see `compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from ckptvcs.codec.compiled_codes import BLOCK, EXACT, INT, compact

Array = Any

_KINDS = (types.uint16, types.uint32)
_WORDS = [types.Array(kind, 1, "C", readonly=True) for kind in _KINDS]
_PLANES = types.Array(types.uint8, 2, "C", readonly=True)
_ONE = np.uint32(1)


@njit(**EXACT)
def _order(word: Any, low: Any, top: Any) -> Any:
    """Floats by size: `low` is all bits but the sign, at bit `top`; 0 leaves the word."""
    return word ^ (low & (np.uint32(0) - (word >> top)))


@njit([(words, words, INT, types.boolean) for words in _WORDS], **EXACT)
def split_words(words: Array, base: Array, transform: int, floating: bool) -> Array:
    """See `loops.split_words`."""
    size = words.itemsize
    out = np.empty((size, words.size), np.uint8)
    top = np.uint32(8 * size - 1)
    every = np.uint32((np.int64(1) << (8 * size)) - 1)
    low = every >> _ONE if floating else np.uint32(0)
    block = np.empty(BLOCK, np.uint32)
    for first in range(0, words.size, BLOCK):
        w = words[first : first + BLOCK]
        if transform == 2:
            b = base[first : first + BLOCK]
            for i in range(w.size):
                x = _order(np.uint32(w[i]), low, top) - _order(np.uint32(b[i]), low, top)
                block[i] = (x << _ONE) ^ (np.uint32(0) - ((x >> top) & _ONE))
        elif transform == 1:
            for i in range(w.size):
                x = np.uint32(w[i])
                block[i] = (x << _ONE) | (x >> top)
        else:
            for i in range(w.size):
                block[i] = np.uint32(w[i])
        for plane in range(size):
            o, shift = out[plane, first : first + BLOCK], np.uint32(8 * plane)
            for i in range(w.size):
                o[i] = np.uint8(block[i] >> shift)
    return out


@njit(
    [
        (_PLANES, words, INT, types.boolean, kind[::1])
        for words, kind in zip(_WORDS, _KINDS, strict=True)
    ],
    **EXACT,
)
def join_words(planes: Array, base: Array, transform: int, floating: bool, out: Array) -> None:
    """See `loops.join_words`."""
    size = planes.shape[0]
    top = np.uint32(8 * size - 1)
    every = np.uint32((np.int64(1) << (8 * size)) - 1)
    low = every >> _ONE if floating else np.uint32(0)
    block = np.empty(BLOCK, np.uint32)
    for first in range(0, out.size, BLOCK):
        o = out[first : first + BLOCK]
        block[:] = 0
        for plane in range(size):
            p, shift = planes[plane, first : first + BLOCK], np.uint32(8 * plane)
            for i in range(o.size):
                block[i] |= np.uint32(p[i]) << shift
        if transform == 2:
            b = base[first : first + BLOCK]
            for i in range(o.size):
                x = (block[i] >> _ONE) ^ (np.uint32(0) - (block[i] & _ONE))
                x = (x + _order(np.uint32(b[i]), low, top)) & every
                o[i] = _order(x, low, top)
        elif transform == 1:
            for i in range(o.size):
                o[i] = (block[i] >> _ONE) | ((block[i] & _ONE) << top)
        else:
            for i in range(o.size):
                o[i] = block[i]


@njit([(words, words, types.boolean, INT) for words in _WORDS], **EXACT)
def split_near(words: Array, near: Array, floating: bool, raw: int) -> Any:
    """See `loops.split_near`."""
    size = words.itemsize
    planes = np.empty((raw, words.size), np.uint8)
    bitmap = np.empty((words.size + 7) // 8, np.uint8)
    kept, found = np.empty(words.size + 1, np.int32), 0
    top, rest = np.uint32(8 * size - 1), np.uint32(8 * raw)
    every = np.uint32((np.int64(1) << (8 * size)) - 1)
    low = every >> _ONE if floating else np.uint32(0)
    block, high = np.empty(BLOCK, np.uint32), np.zeros(BLOCK, np.int32)
    wrong = np.uint32(0)
    for first in range(0, words.size, BLOCK):
        w, n = words[first : first + BLOCK], near[first : first + BLOCK]
        for i in range(w.size):
            before = _order(np.uint32(n[i]), low, top)
            x = (_order(np.uint32(w[i]), low, top) - before) & every
            t = ((x << _ONE) & every) ^ (every & (np.uint32(0) - (x >> top)))
            block[i] = t
            back = (t >> _ONE) ^ (np.uint32(0) - (t & _ONE))
            wrong |= _order((back + before) & every, low, top) ^ np.uint32(w[i])
            high[i] = t >> rest
        high[w.size :] = 0
        for plane in range(raw):
            o, shift = planes[plane, first : first + BLOCK], np.uint32(8 * plane)
            for i in range(w.size):
                o[i] = np.uint8(block[i] >> shift)
        end = (first + w.size + 7) >> 3
        bits = bitmap[first >> 3 : end]
        found += compact(high[: 8 * bits.size], bits, kept[found:])
    return planes, bitmap, kept[:found].copy(), wrong == 0
