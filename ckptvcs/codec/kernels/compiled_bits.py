"""The compiled functions for bits, codes and the bytes of words; see `compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

Array = Any

I32, U8 = (types.Array(kind, 1, "C", readonly=True) for kind in (types.int32, types.uint8))
INT = types.int64
"""Types of arguments. With explicit types, numba compiles each function once, at import."""

EXACT = {"nogil": True, "cache": True, "error_model": "numpy"}
BLOCK = 4096
"""Values per block; the intermediate results fit into the L1 cache."""

_KINDS = (types.uint16, types.uint32)
_WORDS = [types.Array(kind, 1, "C", readonly=True) for kind in _KINDS]
_PLANES = types.Array(types.uint8, 2, "C", readonly=True)
_ONE = np.uint32(1)

_BYTES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_SIZES = _BYTES.sum(1).astype(np.int64)
_PLACES = np.argsort(1 - _BYTES, axis=1, kind="stable").astype(np.uint32)
"""For each byte: the positions of its set bits from the top one on, then the others."""
_SIGNS = -_BYTES.astype(np.int32)
"""For each byte: -1 for each set bit, else 0."""


@njit(**EXACT)
def _pack(flags: Array, bits: Array) -> None:
    """Pack flags, one per byte, to bits; the first flag is the top bit."""
    eights = flags.view(np.uint64)
    for byte in range(bits.size):
        bits[byte] = (eights[byte] * np.uint64(0x8040201008040201)) >> np.uint64(56)


@njit(**EXACT)
def compact(codes: Array, bitmap: Array, kept: Array) -> Any:
    """Write the bitmap of the codes that are not 0, and these codes; return their number.

    `codes` (at most BLOCK) has a multiple of 8 entries; the caller pads it with 0.
    """
    flags = np.empty(BLOCK, np.uint8)
    for i in range(codes.size):
        flags[i] = codes[i] != 0
    _pack(flags, bitmap)
    found = np.uint64(0)  # a signed index would be tested for being negative
    for i in range(codes.size):
        kept[found] = codes[i]
        found += np.uint64(flags[i])
    return np.int64(found)


@njit(**EXACT)
def positions(bitmap: Array, first: Any, out: Array) -> Any:
    """Write first + the position of each set bit; return their number.

    `out` needs room for 8 more.
    """
    found = np.uint64(0)
    for byte in range(bitmap.size):
        bits = bitmap[byte]
        for i in range(8):
            out[found + np.uint64(i)] = np.uint32(first + 8 * byte) + _PLACES[bits, i]
        found += np.uint64(_SIZES[bits])
    return np.int64(found)


@njit((U8, INT), **EXACT)
def bit_positions(bitmap: Array, count: int) -> Array:
    """See `reference.bit_positions`."""
    out = np.empty(8 * bitmap.size + 8, np.int32)
    found = positions(bitmap, 0, out.view(np.uint32))
    while found and out[found - 1] >= count:
        found -= 1
    return out[:found]


@njit((I32,), **EXACT)
def split(codes: Array) -> tuple[Array, Array, Array]:
    """See `reference.split`."""
    size = (codes.size + 7) // 8
    signs, large = np.empty(size, np.uint8), np.empty(size, np.uint8)
    rest, found = np.empty(codes.size + 1, np.int32), np.uint64(0)
    negative, above = np.zeros(BLOCK, np.uint8), np.zeros(BLOCK, np.uint8)
    for low in range(0, codes.size, BLOCK):
        c = codes[low : low + BLOCK]
        if c.size < BLOCK:
            negative[:] = 0
            above[:] = 0
        for i in range(c.size):
            negative[i] = c[i] < 0
            above[i] = abs(c[i]) > 1
        for i in range(c.size):
            rest[found] = abs(c[i])
            found += np.uint64(above[i])
        end = (low + c.size + 7) >> 3
        _pack(negative, signs[low >> 3 : end])
        _pack(above, large[low >> 3 : end])
    return signs, large, rest[: np.int64(found)].copy()


@njit((I32, U8), **EXACT)
def with_signs(sizes: Array, signs: Array) -> Array:
    """See `reference.with_signs`."""
    out = np.empty(sizes.size, np.int32)
    whole = sizes.size // 8
    for byte in range(whole):
        row, x, o = _SIGNS[signs[byte]], sizes[8 * byte :], out[8 * byte :]
        for i in range(8):
            o[i] = (x[i] ^ row[i]) - row[i]
    for i in range(8 * whole, sizes.size):
        sign = _SIGNS[signs[whole], i & 7]
        out[i] = (sizes[i] ^ sign) - sign
    return out


@njit((U8, U8, INT, INT), **EXACT)
def join_bits(planes: Array, high: Array, count: int, bits: int) -> Array:
    """See `reference.join_bits`."""
    each = (count + 7) // 8
    out = np.empty(8 * each, np.int32)
    for byte in range(each):
        eight = out[8 * byte : 8 * byte + 8]
        eight[:] = 0
        for bit in range(bits):
            row = _BYTES[planes[bit * each + byte]]
            for i in range(8):
                eight[i] |= np.int32(row[i]) << np.int32(bit)
    for i in range(high.size):
        out[i] += (np.int32(high[i]) - np.int32(128)) << np.int32(bits)
    return out[:count]


@njit((U8,), **EXACT)
def gap_positions(gaps: Array) -> Array:
    """See `reference.gap_positions`."""
    out = np.empty(gaps.size, np.int64)
    found = 0
    at = np.int64(-1)
    for i in range(gaps.size):
        gap = np.int64(gaps[i])
        more = gap != 255
        at += gap + more
        out[found] = at
        found += more
    return out[:found].copy()


@njit(**EXACT)
def _order(word: Any, low: Any, top: Any) -> Any:
    """Return order(word) of "Lossless slice"; `top` is the sign bit, `low` masks all other bits."""
    return word ^ (low & (np.uint32(0) - (word >> top)))


@njit([(words, words, INT, types.boolean) for words in _WORDS], **EXACT)
def split_words(words: Array, base: Array, transform: int, floating: bool) -> Array:
    """See `reference.split_words`."""
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
    """See `reference.join_words`."""
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
    """See `reference.split_near`."""
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
