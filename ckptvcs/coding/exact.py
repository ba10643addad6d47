"""Exact coding of one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from ckptvcs.codec import lossless
from ckptvcs.codec.frame import LOSSLESS, put_slice
from ckptvcs.codec.words import Words
from ckptvcs.coding.group import CodedGroup, CodedSlice, Errors, Target, Tensor
from ckptvcs.dtypes import DTYPES


def code_exactly(source: Words, base: Words | None, dtype: str) -> CodedSlice:
    """Code the words of a slice so that they come back."""
    payload = lossless.encode(source, base, DTYPES[dtype])
    stands_on_base = lossless.needs_base(memoryview(payload))
    return CodedSlice(put_slice(LOSSLESS, payload), source, source, stands_on_base)


class ExactCoder:
    """Codes a tensor against its base, or by itself."""

    def __init__(self, target: Target, base: Tensor | None) -> None:
        self.members = (target,)
        self.companions: Mapping[int, int] = {}
        self._base = base

    def code(self, number: int) -> CodedGroup:
        """Code one slice."""
        (target,) = self.members
        base = None if self._base is None else self._base.slice(number)
        coded = code_exactly(target.tensor.slice(number), base, target.dtype)
        return CodedGroup((coded,), (Errors(),))
