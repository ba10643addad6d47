"""Chains: which frame stands on which, walked forward from a keyframe to a tensor.

    values[i] -> recipe -> frame -> base values[j] -> recipe -> frame -> ... -> keyframe

Slices of one tensor are cut alike along a chain, so one slice at a time is decoded from the
keyframe up: memory is a few slices, whatever the tensor.  Every slice read is checked against the
hash in its bundle; every tensor decoded is checked against its hash in the table of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from blake3 import blake3

from ckptvcs.codec.frame import PATCH, SLICE_WORDS, Companion, decode_slice, slice_counts
from ckptvcs.codec.words import Words, octets, word_type
from ckptvcs.errors import CorruptionError, TruncatedError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.recipe import NO_HASH, Frame, slice_hash
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.object import ObjectId

MAX_DEPTH = 4096
_PATCH = bytes([PATCH])
_MASTER = TensorInfo("", "F32", (), "model", "weight")


class Materialised(Protocol):
    """The tensors of a table of values, decoded and proven already."""

    def slice(self, tensor: int, number: int, out: Words | None = None) -> Words | None:
        """One slice of a tensor, not to be changed; None where it is not there after all.  With
        `out` it may come in that, and it is the caller who proves it.
        """

    def stays(self, tensor: int) -> bool:
        """Whether it is sure to have a tensor, so that nobody needs to look what lies below."""
        return False


Materials = Callable[[ObjectId], Materialised | None]
"""What there is for a table of values."""


@dataclass(frozen=True)
class Link:
    """One frame of a chain: its bundle, the chain that ends in its companion, and the tensor it
    decodes to where that is at hand.
    """

    bundle: ObjectId
    frame: Frame
    companion: tuple[Link, ...] = ()
    done: tuple[Materialised, int] | None = None


class ChainReader:
    """Decodes tensors of tables of values, from what is materialised where there is any."""

    def __init__(self, catalog: Catalog, materials: Materials = lambda _: None) -> None:
        self._catalog, self._materials = catalog, materials

    def links(self, values: ObjectId, tensor: int) -> list[Link]:
        """The frames a tensor is decoded from, the keyframe first, or what is at hand to stay.

        Raises:
            CorruptionError: a frame does not stand on one that is less deep.
        """
        return self._chain(*self._catalog.frame(values, tensor), self._done(values, tensor))

    def _done(self, values: ObjectId, tensor: int) -> tuple[Materialised, int] | None:
        found = self._materials(values)
        return None if found is None else (found, tensor)

    def _chain(
        self, bundle: ObjectId, frame: Frame, done: tuple[Materialised, int] | None,
        *, beside: bool = False,
    ) -> list[Link]:  # fmt: skip
        """The chain that ends in a frame of a bundle; one `beside` another has no companions."""
        chain: list[Link] = []
        limit = MAX_DEPTH
        while True:
            if frame.depth > limit:
                raise CorruptionError(f"bundle {bundle[:8]} stands on a frame that is not below it")
            companion: list[Link] = []
            if frame.companion is not None:
                if beside:
                    raise CorruptionError(f"bundle {bundle[:8]} names companions in turn")
                other = self._catalog.bundle(bundle)[frame.companion]
                companion = self._chain(bundle, other, None, beside=True)
            chain.append(Link(bundle, frame, tuple(companion), done))
            if frame.base is None or (done is not None and done[0].stays(done[1])):
                return chain[::-1]
            limit = frame.depth - 1
            done = self._done(*frame.base)
            bundle, frame = self._catalog.frame(*frame.base)

    def require_slices(self, values: ObjectId, tensor: int, info: TensorInfo) -> None:
        """Prove, before room is made for a tensor, that it has a frame of as many slices.

        Raises:
            CorruptionError: it has none; a schema may claim any size.
        """
        bundle, frame = self._catalog.frame(values, tensor)
        if len(frame.slices) != -(-info.words // SLICE_WORDS):
            raise CorruptionError(
                f"bundle {bundle[:8]} has another number of slices of {info.name}"
            )

    def depth(self, values: ObjectId, tensor: int) -> int:
        """How many frames lie below a tensor's own."""
        return self._catalog.frame(values, tensor)[1].depth

    def _slice_bytes(self, bundle: ObjectId, frame: Frame, number: int) -> memoryview:
        if number >= len(frame.slices):
            raise CorruptionError(f"bundle {bundle[:8]} holds a frame with too few slices")
        offset, length, expected = frame.slices[number]
        data = self._catalog.store.read_region(bundle, offset, length)
        if len(data) != length:
            raise TruncatedError(f"bundle {bundle[:8]} is cut off")
        proven_later = expected == NO_HASH and data[:1] == _PATCH
        if not proven_later and slice_hash(data) != expected:
            raise CorruptionError(f"bundle {bundle[:8]} is damaged: a slice has another hash")
        return memoryview(data)

    def decode_slice(
        self, chain: Sequence[Link], info: TensorInfo, number: int, count: int,
        out: Words | None = None,
    ) -> Words:  # fmt: skip
        """Slice `number` of a tensor, `count` words, not yet proven by the tensor's hash; in `out`,
        if there is one.
        """
        words, first = None, 0
        for place in range(len(chain) - 1, -1, -1):
            done = chain[place].done
            words = None if done is None else done[0].slice(done[1], number, out)
            if words is not None:
                first = place + 1
                break
        own = False
        for link in chain[first:]:
            own |= words is not None and out is not None and np.may_share_memory(words, out)
            words = self._apply(link, info, number, count, words, out, own=own)
            own = True
        assert words is not None
        return _placed(words, out)

    def apply(
        self, link: Link, info: TensorInfo, number: int, count: int, base: Words,
        out: Words | None = None,
    ) -> Words:  # fmt: skip
        """The same by one link alone, from the words of the slice that it stands on."""
        return _placed(self._apply(link, info, number, count, base, out, own=False), out)

    def _apply(
        self, link: Link, info: TensorInfo, number: int, count: int, base: Words | None,
        out: Words | None, *, own: bool,
    ) -> Words:  # fmt: skip
        data = self._slice_bytes(link.bundle, link.frame, number)
        companion = self._companion(link, number, count)
        return decode_slice(data, info.type, count, base, companion, own_base=own, out=out)

    def _companion(self, link: Link, number: int, count: int) -> Companion | None:
        if not link.companion:
            return None
        *below, last = link.companion
        data = self._slice_bytes(last.bundle, last.frame, number)
        base = None
        if below:  # only masters of rounded copies stand on others, and those are F32
            base = self.decode_slice(below, _MASTER, number, count)
        return Companion(data, base)

    def slices(self, values: ObjectId, tensor: int, info: TensorInfo) -> Iterator[Words]:
        """The words of a tensor, slice after slice; the last one comes after the proof.

        Raises:
            CorruptionError: the tensor does not have its recorded hash.
        """
        self.require_slices(values, tensor, info)
        chain = self.links(values, tensor)
        digest = blake3(max_threads=1)
        pending: Words | None = None
        for number, count in enumerate(slice_counts(info.words)):
            if pending is not None:
                yield pending
            pending = self.decode_slice(chain, info, number, count)
            digest.update(octets(pending))
        if digest.digest() != self._catalog.value(values, tensor):
            raise CorruptionError(f"{info.name} does not decode to its recorded hash")
        if pending is not None:
            yield pending

    def tensor(self, values: ObjectId, tensor: int, info: TensorInfo) -> Words:
        """All words of a tensor, proven."""
        parts = list(self.slices(values, tensor, info))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, word_type(info.type.word))


def _placed(words: Words, out: Words | None) -> Words:
    if out is None or np.may_share_memory(words, out):
        return words
    out[:] = words
    return out
