"""Encode a slice losslessly: transform the words, split them into byte planes, compress these.

    words --transform--> words --split--> plane 0 .. plane w-1 --section--> bytes

The encoder uses the transform with the smallest entropy on a sample:

    PLAIN    the words
    ROTATED  the words rotated left by one bit: the exponent of a float fills whole bytes
    DELTA    zig-zag difference to the base, as integers in the order of the floats: small for
             values near their base

XOR with the base is not a transform: near a power of two it is large for almost equal values, and
DELTA was at least as small in all measured runs. Layout: docs/format.md, "Lossless slice".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.dtypes import DType
from ckptvcs.codec.sections import entropy_bits, get_section, put_section, sample
from ckptvcs.codec.words import Words, word_type
from ckptvcs.errors import CorruptionError, TruncatedError

Planes = NDArray[np.uint8]

PLAIN, ROTATED, DELTA = 0, 1, 2


def _split(words: Words, base: Words | None, transform: int, dtype: DType) -> Planes:
    base = words if base is None else base
    return _kernels_for(words).split_words(words, base, transform, dtype.floating)


def _kernels_for(words: Words) -> kernels.Kernels:
    """Return the kernels for a word size; the compiled ones support 2 and 4 bytes."""
    return kernels.active() if words.itemsize in (2, 4) else kernels.REFERENCE


def _cheapest(words: Words, base: Words | None, dtype: DType) -> int:
    """Return the transform with the smallest order-0 entropy on a sample."""
    options = [PLAIN]
    if dtype.floating:
        options.append(ROTATED)
    if base is not None:
        options.append(DELTA)
    if len(options) == 1:
        return PLAIN
    words, base = sample(words), None if base is None else sample(base)
    return min(
        options, key=lambda option: sum(map(entropy_bits, _split(words, base, option, dtype)))
    )


def encode(words: Words, base: Words | None, dtype: DType) -> bytes:
    """Encode a slice losslessly, against `base` (as many words) if it is given."""
    transform = _cheapest(words, base, dtype)
    planes = _split(words, base, transform, dtype)
    text = dtype.name == "U8"
    return b"".join((bytes([transform]), *(put_section(plane, text=text) for plane in planes)))


def needs_base(data: memoryview) -> bool:
    """Return whether a lossless slice needs a base."""
    return len(data) > 0 and data[0] == DELTA


def decode(
    data: memoryview, count: int, base: Words | None, dtype: DType, out: Words | None = None
) -> Words:
    """Decode a slice of `count` words, into `out` if it is given.

    Raises:
        TruncatedError, CorruptionError: `data` is not a lossless slice of `count` words.
    """
    if not len(data):
        raise TruncatedError("corrupt frame: no section")
    transform = data[0]
    if transform > DELTA or (transform == DELTA and base is None):
        raise CorruptionError("corrupt frame: unknown transform, or its base is missing")
    at = 1
    planes = np.empty((dtype.word, count), np.uint8)
    for plane in range(dtype.word):
        planes[plane], at = get_section(data, at, count)
    if at != len(data):
        raise CorruptionError("corrupt frame: trailing bytes after its last section")
    words = np.empty(count, word_type(dtype.word)) if out is None else out
    base = words if base is None else base
    _kernels_for(words).join_words(planes, base, transform, dtype.floating, words)
    return words
