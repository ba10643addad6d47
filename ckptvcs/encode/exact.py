"""Encode one tensor losslessly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ckptvcs.codec import lossless, patch
from ckptvcs.codec.dtypes import DTYPES, WEIGHT_DTYPES
from ckptvcs.codec.frame import LOSSLESS, NEAR_WEIGHT, PATCH, put_slice
from ckptvcs.codec.near_weight import encode_difference, encode_keyframe, find_grid
from ckptvcs.codec.words import NearSlice, Words
from ckptvcs.encode.group import EncodedGroup, EncodedSlice, Errors, Target


def encode_exactly(source: Words, base: Words | None, dtype: str) -> EncodedSlice:
    """Encode a slice losslessly."""
    payload = lossless.encode(source, base, DTYPES[dtype])
    uses_base = lossless.needs_base(memoryview(payload))
    return EncodedSlice(put_slice(LOSSLESS, payload), source, source, uses_base)


def reencode(words: Words, base: Words | None, dtype: str) -> EncodedSlice:
    """Re-encode a decoded slice without loss, in the smallest form.

    Decoded near weights lie on a grid, and often fit the near form exactly.
    """
    options = [encode_exactly(words, base, dtype)]
    near: NearSlice | None = None
    if dtype in WEIGHT_DTYPES and words.size:
        if base is not None:
            near = encode_difference(words, base, dtype)
        else:
            grid = find_grid(words, dtype)
            near = None if grid is None else encode_keyframe(words, dtype, 2.0**-grid)
    if near is not None and np.array_equal(near.decoded, words):
        data = put_slice(NEAR_WEIGHT, near.payload)
        options.append(EncodedSlice(data, words, words, base is not None))
    return min(options, key=lambda option: len(option.data))


SAME = bytes([PATCH, patch.SAME])
"""The slice of an exact patch that changes no word."""


def encode_patch(source: Words, near: Words, dtype: str) -> patch.Buffers:
    """Return the slice of the exact patch that turns `near` into `source`."""
    return bytes([PATCH]), *patch.encode(source, near, DTYPES[dtype])


class ExactEncoder:
    """Encodes a tensor losslessly, against its base if it has one."""

    def __init__(self, target: Target) -> None:
        self.members = (target,)
        self.companions: Mapping[int, int] = {}

    def encode(self, number: int) -> EncodedGroup:
        """Encode one slice."""
        (target,) = self.members
        base = None if target.base is None else target.base.slice(number)
        coded = encode_exactly(target.tensor.slice(number), base, target.dtype)
        return EncodedGroup((coded,), (Errors(),))
