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
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.dtypes import DType
from ckptvcs.codec.kernels import reference
from ckptvcs.codec.sections import entropy_bits, get_section, put_section, sample
from ckptvcs.codec.words import Words, word_type
from ckptvcs.errors import CorruptionError, TruncatedError

Planes = NDArray[np.uint8]

PLAIN, ROTATED, DELTA = 0, 1, 2
_HEAD = struct.Struct("<B")


def _split(words: Words, base: Words | None, transform: int, dtype: DType) -> Planes:
    there = base if transform == DELTA and base is not None else words
    planes: Planes = _loops_for(words).split_words(words, there, transform, dtype.floating)
    return planes


def _loops_for(words: Words) -> ModuleType:
    """The loops for words of a size: those that are compiled know 2 and 4 bytes."""
    return kernels.active() if words.itemsize in (2, 4) else reference


def _cost_bits(planes: Planes) -> float:
    return sum(entropy_bits(plane) for plane in planes)


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
        options, key=lambda option: _cost_bits(_split(words_sample, base_sample, option, dtype))
    )


def encode(words: Words, base: Words | None, dtype: DType) -> bytes:
    """Encode one slice losslessly, against `base` (as many words) if given."""
    transform = _cheapest(words, base, dtype)
    planes = _split(words, base, transform, dtype)
    text = dtype.name == "U8"
    return b"".join((_HEAD.pack(transform), *(put_section(plane, text=text) for plane in planes)))


def needs_base(data: memoryview) -> bool:
    """Whether `data` was coded against a base."""
    return len(data) > 0 and data[0] == DELTA


def decode(
    data: memoryview, count: int, base: Words | None, dtype: DType, out: Words | None = None
) -> Words:
    """Decode `count` words, into `out` if it is given.

    Raises:
        TruncatedError, CorruptionError: `data` is not a lossless slice of `count` words.
    """
    if len(data) < _HEAD.size:
        raise TruncatedError("corrupt frame: no section")
    transform = data[0]
    if transform > DELTA or (transform == DELTA and base is None):
        raise CorruptionError("corrupt frame: unknown transform, or its base is missing")
    at = _HEAD.size
    planes = np.empty((dtype.word, count), np.uint8)
    for plane in range(dtype.word):
        planes[plane], at = get_section(data, at, count)
    if at != len(data):
        raise CorruptionError("corrupt frame: trailing bytes after its last section")
    words = np.empty(count, word_type(dtype.word)) if out is None else out
    there = base if transform == DELTA and base is not None else words
    _loops_for(words).join_words(planes, there, transform, dtype.floating, words)
    return words
