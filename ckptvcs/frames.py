"""Frames of one part of a commit on their way into a pack of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from blake3 import blake3

from ckptvcs.bases import BaseTensor
from ckptvcs.codec.words import octets
from ckptvcs.coding.group import CodedSlice
from ckptvcs.history.recipe import Frame, dump_bundle, slice_hash
from ckptvcs.store.object import Kind, ObjectId
from ckptvcs.store.pack import PackInfo, PackWriter


@dataclass
class Draft:
    """A frame that is being written: hashes of what it decodes to, and of what it was made from
    (None while that is the same, and where that is `steady`).
    """

    number: int
    base: BaseTensor | None
    steady: bool = False
    companion: int | None = None
    stands_on_base: bool = False
    exact: bool = True
    slices: list[tuple[int, int, bytes]] = field(default_factory=list)
    digest: blake3 = field(default_factory=lambda: blake3(max_threads=1))
    source: blake3 | None = None


class PartWriter:
    """The frames of one part on their way into a pack of their own."""

    def __init__(self, new_pack: Callable[[], PackWriter]) -> None:
        self._new_pack = new_pack
        self._pack: PackWriter | None = None
        self._at = 0
        self.drafts: list[Draft] = []

    def begin(self, base: BaseTensor | None, *, steady: bool) -> Draft:
        draft = Draft(len(self.drafts), base, steady)
        self.drafts.append(draft)
        return draft

    def append(self, draft: Draft, coded: CodedSlice) -> None:
        if self._pack is None:
            self._pack = self._new_pack()
        self._pack.append_region(coded.data)
        draft.slices.append((self._at, len(coded.data), slice_hash(coded.data)))
        self._at += len(coded.data)
        draft.stands_on_base |= coded.stands_on_base
        draft.exact &= coded.decoded is coded.source
        if draft.source is None and not draft.steady and coded.decoded is not coded.source:
            draft.source = draft.digest.copy()
        if draft.source is not None and coded.source is not None:
            draft.source.update(octets(coded.source))
        draft.digest.update(octets(coded.decoded))

    def _frame(self, draft: Draft) -> Frame:
        if draft.base is None or not draft.stands_on_base:
            return Frame(None, 0, draft.companion, tuple(draft.slices))
        base = (draft.base.values, draft.base.tensor)
        return Frame(base, draft.base.depth + 1, draft.companion, tuple(draft.slices))

    def finish(self, publish: Callable[[PackWriter], PackInfo]) -> tuple[ObjectId | None, int]:
        """Write the bundle and publish the pack: its id, and the bytes on disk."""
        if not self.drafts:
            return None, 0
        pack = self._pack or self._new_pack()
        bundle = pack.add(Kind.BUNDLE, dump_bundle([self._frame(draft) for draft in self.drafts]))
        return bundle, publish(pack).size_bytes

    def abort(self) -> None:
        if self._pack is not None:
            self._pack.abort()
