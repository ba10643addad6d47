"""A stored commit as the source of an encoder: its tensors are decoded while they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from ckptvcs.checkpoint.layout import Source
from ckptvcs.checkpoint.open import Checkpoint, InputFile
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.words import Words, octets
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.history.schema import TensorInfo

_RECENT = 64  # decoded slices that stay in memory


class _Decoded(Source):
    """The stored tensors of a commit, one after another."""

    def __init__(self, restorer: Restorer, infos: Sequence[TensorInfo], starts: list[int]) -> None:
        self._restorer, self._infos, self._starts = restorer, infos, starts
        self.size = starts[-1]
        self._slice = lru_cache(_RECENT)(self._decode)

    def _decode(self, tensor: int, number: int) -> Words:
        restorer = self._restorer
        links, info = restorer.links(tensor), self._infos[tensor]
        return restorer.chain.decode_slice(links, info, number)

    def read(self, offset: int, length: int) -> bytes:
        """Return a slice: a reader asks for nothing else."""
        return bytes(self.view(offset, length))

    def view(self, offset: int, length: int) -> memoryview:
        """Return a slice without a copy."""
        if not length:
            return memoryview(b"")
        tensor = bisect_right(self._starts, offset) - 1
        start = offset - self._starts[tensor]
        number = start // (SLICE_WORDS * self._infos[tensor].type.word)
        return octets(self._slice(tensor, number))[:length]


def as_checkpoint(restorer: Restorer) -> Checkpoint:
    """Return a stored commit as a checkpoint, whose optimizer is not known.

    The tensors must have been verified: nothing checks them again.  Dropped parts are left out.
    """
    gone = {part for part, form in restorer.fidelity.items() if form == "dropped"}
    infos = tuple(
        replace(info, inline=True) if info.part in gone else info
        for info in restorer.schema.tensors
    )
    starts = [0, *accumulate(0 if info.inline else info.size_bytes for info in infos)]
    places = tuple((0, start) for start in starts[:-1])
    file = InputFile("state", _Decoded(restorer, infos, starts), "", ())
    return Checkpoint(
        "state", (file,), (), replace(restorer.schema, tensors=infos), places, None, {}, {}
    )
