"""Exact coding of one slice: reversible arithmetic, byte planes, one section a plane.

    words --transform--> words --split--> plane 0 .. plane w-1 --section--> bytes

Three transforms, the cheapest on a sample wins (docs/format.md, "Lossless slice"):

    PLAIN    the words as they are
    ROTATED  rotated left by one bit, so that the exponent of a float fills whole bytes
    DELTA    ordered-integer difference to the base, zig-zag: values near their base get
             small numbers, whatever their exponent

XOR with the base is not among them: a carry across a power of two flips every bit of it, and the
difference was never larger on any trajectory measured.
"""

from __future__ import annotations

import struct

import numpy as np

from ckptvcs.codec.planes import entropy_bits, get_section, put_section, sample
from ckptvcs.codec.words import Words, word_type
from ckptvcs.dtypes import DType
from ckptvcs.errors import CorruptionError, TruncatedError

PLAIN, ROTATED, DELTA = 0, 1, 2
_HEAD = struct.Struct("<B")


def _rotate_left(words: Words) -> Words:
    bits = words.dtype.itemsize * 8
    one = words.dtype.type(1)
    return (words << one) | (words >> words.dtype.type(bits - 1))


def _rotate_right(words: Words) -> Words:
    bits = words.dtype.itemsize * 8
    one = words.dtype.type(1)
    return (words >> one) | (words << words.dtype.type(bits - 1))


def _order(words: Words, floating: bool) -> Words:
    """Map words so that neighbouring values get neighbouring integers; its own inverse."""
    if not floating:
        return words
    signed = words.view(f"<i{words.dtype.itemsize}")
    bits = words.dtype.itemsize * 8
    low = words.dtype.type((1 << (bits - 1)) - 1)
    return words ^ ((signed >> (bits - 1)).view(words.dtype) & low)


def _difference(words: Words, base: Words, floating: bool) -> Words:
    delta = _order(words, floating) - _order(base, floating)
    signed = delta.view(f"<i{words.dtype.itemsize}")
    bits = words.dtype.itemsize * 8
    return (delta << words.dtype.type(1)) ^ (signed >> (bits - 1)).view(words.dtype)


def _undo_difference(zigzag: Words, base: Words, floating: bool) -> Words:
    one = zigzag.dtype.type(1)
    delta = (zigzag >> one) ^ (~(zigzag & one) + one)
    return _order(delta + _order(base, floating), floating)


def _forward(transform: int, words: Words, base: Words | None, dtype: DType) -> Words:
    if transform == DELTA:
        assert base is not None
        return _difference(words, base, dtype.floating)
    return _rotate_left(words) if transform == ROTATED else words


def _planes(words: Words) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The bytes of `words` by significance: shape (word size, n), least significant first."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(words.size, words.itemsize).T)


def _cost_bits(words: Words) -> float:
    return sum(entropy_bits(plane) for plane in _planes(words))


def _cheapest(words: Words, base: Words | None, dtype: DType) -> int:
    """The transform with the smallest order-0 entropy on a sample."""
    options = [PLAIN]
    if dtype.floating:
        options.append(ROTATED)
    if base is not None:
        options.append(DELTA)
    if len(options) == 1:
        return PLAIN
    words_sample = sample(words)
    base_sample = None if base is None else sample(base)
    return min(
        options,
        key=lambda option: _cost_bits(_forward(option, words_sample, base_sample, dtype)),
    )


def encode(words: Words, base: Words | None, dtype: DType) -> bytes:
    """Code one slice of words exactly; `base` has as many words, or is None."""
    transform = _cheapest(words, base, dtype)
    planes = _planes(_forward(transform, words, base, dtype))
    return _HEAD.pack(transform) + b"".join(
        put_section(plane, text=dtype.name == "U8") for plane in planes
    )


def needs_base(data: memoryview) -> bool:
    """Whether `data` was coded against a base."""
    return len(data) > 0 and data[0] == DELTA


def decode(data: memoryview, count: int, base: Words | None, dtype: DType) -> Words:
    """Read back the `count` words that `encode` was given.

    Raises:
        TruncatedError, CorruptionError: `data` is not a lossless slice of `count` words.
    """
    if len(data) < _HEAD.size:
        raise TruncatedError("a frame ends before its first section")
    transform = data[0]
    if transform > DELTA or (transform == DELTA and base is None):
        raise CorruptionError("a frame has an unknown transform or lacks its base")
    at = _HEAD.size
    rows = np.empty((count, dtype.word), np.uint8)
    for plane in range(dtype.word):
        rows[:, plane], at = get_section(data, at, count)
    if at != len(data):
        raise CorruptionError("a frame has bytes after its last section")
    words: Words = rows.reshape(-1).view(word_type(dtype.word))
    if transform == DELTA:
        assert base is not None
        return _undo_difference(words, base, dtype.floating)
    return _rotate_right(words) if transform == ROTATED else words
