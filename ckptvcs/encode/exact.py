"""Encode one tensor losslessly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ckptvcs.codec import lossless, patch
from ckptvcs.codec.dtypes import DTYPES, WEIGHT_DTYPES
from ckptvcs.codec.frame import LOSSLESS, NEAR_WEIGHT, PATCH, put_slice
from ckptvcs.codec.near_weight import encode_difference, encode_keyframe, find_grid
from ckptvcs.codec.words import NearSlice, Words
from ckptvcs.encode.group import CodedGroup, CodedSlice, Errors, Target, Tensor


def code_exactly(source: Words, base: Words | None, dtype: str) -> CodedSlice:
    """Encode a slice losslessly."""
    payload = lossless.encode(source, base, DTYPES[dtype])
    stands_on_base = lossless.needs_base(memoryview(payload))
    return CodedSlice(put_slice(LOSSLESS, payload), source, source, stands_on_base)


def code_again(words: Words, base: Words | None, dtype: str) -> CodedSlice:
    """Code a slice that was decoded so that the same comes back, in as few bytes as any form takes:
    on the grid of near weights, or losslessly.
    """
    options = [code_exactly(words, base, dtype)]
    near: NearSlice | None = None
    if dtype in WEIGHT_DTYPES and words.size:
        if base is not None:
            near = encode_difference(words, base, dtype)
        else:
            grid = find_grid(words, dtype)
            near = None if grid is None else encode_keyframe(words, dtype, 2.0**-grid)
    if near is not None and np.array_equal(near.decoded, words):
        data = put_slice(NEAR_WEIGHT, near.payload)
        options.append(CodedSlice(data, words, words, base is not None))
    return min(options, key=lambda option: len(option.data))


SAME = bytes([PATCH, patch.SAME])
"""A slice of a patch whose words are those of the near form."""


def code_patch(source: Words, near: Words, dtype: str) -> patch.Buffers:
    """What makes the words of a slice of its near form, as a slice."""
    return bytes([PATCH]), *patch.encode(source, near, DTYPES[dtype])


class ExactCoder:
    """Encodes a tensor losslessly, with or without a base."""

    def __init__(self, target: Target, base: Tensor | None) -> None:
        self.members = (target,)
        self.companions: Mapping[int, int] = {}
        self._base = base

    def code(self, number: int) -> CodedGroup:
        """Encode one slice."""
        (target,) = self.members
        base = None if self._base is None else self._base.slice(number)
        coded = code_exactly(target.tensor.slice(number), base, target.dtype)
        return CodedGroup((coded,), (Errors(),))
