"""Encode a slice losslessly: transform the words, split them into byte planes, compress these.

    words --transform--> words --split--> plane 0 .. plane w-1 --section--> bytes

The encoder uses the transform with the smallest size on a sample:

    PLAIN    the words
    ROTATED  the words rotated left by one bit: the exponent of a float fills whole bytes
    DELTA    zig-zag difference to the base, as integers in the order of the floats: small for
             values near their base
    SPARSE   the same, of the words that differ from the base, with a mask that says which do

XOR with the base is not a transform: near a power of two it is large for almost equal values, and
DELTA was at least as small in all measured runs. Layout: docs/format.md, "Lossless slice".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.dtypes import DType
from ckptvcs.codec.masks import Mask, get_positions, put_mask
from ckptvcs.codec.sections import entropy_bits, get_section, put_section, sample
from ckptvcs.codec.words import Words, word_type
from ckptvcs.errors import CorruptionError, TruncatedError

Planes = NDArray[np.uint8]

PLAIN, ROTATED, DELTA, SPARSE = 0, 1, 2, 3


def _split(words: Words, base: Words | None, transform: int, dtype: DType) -> Planes:
    base = words if base is None else base
    return _kernels_for(words).split_words(words, base, transform, dtype.floating)


def _kernels_for(words: Words) -> kernels.Kernels:
    """Return the kernels for a word size; the compiled ones support 2 and 4 bytes."""
    return kernels.active() if words.itemsize in (2, 4) else kernels.REFERENCE


def _bits(planes: Planes) -> float:
    """Return about how many bits a word takes; a Huffman code has at least one bit per symbol."""
    entropies = map(entropy_bits, planes)
    return sum(max(bits, 1.0) if bits else 0.0 for bits in entropies)


def _changed(planes: Planes) -> Mask:
    """Return which words differ from the base; `planes` are those of DELTA."""
    changed: Mask = np.any(planes, axis=0)
    return changed


def _sparse_bits(planes: Planes) -> float:
    """Return about how many bits a word takes as SPARSE; `planes` are those of DELTA."""
    kept = _changed(planes)
    density = float(kept.mean()) if kept.size else 0.0
    return entropy_bits(kept.view(np.uint8)) + density * _bits(planes[:, kept])


def _cheapest(words: Words, base: Words | None, dtype: DType) -> int:
    """Return the transform with the smallest size on a sample."""
    options = [PLAIN]
    if dtype.floating:
        options.append(ROTATED)
    if base is not None:
        options.append(DELTA)
    if len(options) == 1:
        return PLAIN
    words, base = sample(words), None if base is None else sample(base)
    planes = {option: _split(words, base, option, dtype) for option in options}
    bits = {option: _bits(split) for option, split in planes.items()}
    if DELTA in planes:
        bits[SPARSE] = _sparse_bits(planes[DELTA])
    return min(bits, key=bits.__getitem__)


def encode(words: Words, base: Words | None, dtype: DType) -> bytes:
    """Encode a slice losslessly, against `base` (as many words) if it is given."""
    transform = _cheapest(words, base, dtype)
    if transform == SPARSE and base is not None:
        return encode_sparse(words, base, dtype)
    planes = _split(words, base, transform, dtype)
    text = dtype.name == "U8"
    return b"".join((bytes([transform]), *(put_section(plane, text=text) for plane in planes)))


def encode_sparse(words: Words, base: Words, dtype: DType) -> bytes:
    """Encode a slice of which most words are those of the base."""
    planes = _split(words, base, DELTA, dtype)
    kept = _changed(planes)
    sections = (put_section(np.ascontiguousarray(plane[kept]), short=True) for plane in planes)
    return b"".join((bytes([SPARSE]), put_mask(kept, short=True), *sections))


def needs_base(data: memoryview) -> bool:
    """Return whether a lossless slice needs a base."""
    return len(data) > 0 and data[0] in (DELTA, SPARSE)


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
    if transform > SPARSE or (needs_base(data) and base is None):
        raise CorruptionError("corrupt frame: unknown transform, or its base is missing")
    at = 1
    if transform == SPARSE:
        transform = DELTA
        positions, at = get_positions(data, at, count, short=True)
        planes = np.zeros((dtype.word, count), np.uint8)
        for plane in planes:
            plane[positions], at = get_section(data, at, positions.size, short=True)
    else:
        planes = np.empty((dtype.word, count), np.uint8)
        for number in range(dtype.word):
            planes[number], at = get_section(data, at, count)
    if at != len(data):
        raise CorruptionError("corrupt frame: trailing bytes after its last section")
    words = np.empty(count, word_type(dtype.word)) if out is None else out
    base = words if base is None else base
    _kernels_for(words).join_words(planes, base, transform, dtype.floating, words)
    return words
