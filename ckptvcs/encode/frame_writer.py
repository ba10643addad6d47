"""Write the frames and the exact patch of one part of a commit, each into its own pack."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from ckptvcs.codec.frame import slices_of
from ckptvcs.codec.patch import Buffers
from ckptvcs.codec.words import octets
from ckptvcs.encode.bases import BaseTensor
from ckptvcs.encode.exact import SAME
from ckptvcs.encode.group import EncodedSlice
from ckptvcs.hashing import Hasher, hasher
from ckptvcs.history.recipe import NO_HASH, Frame, Recipe, dump_bundle, dump_recipe, slice_hash
from ckptvcs.history.schema import TensorInfo
from ckptvcs.parallel import Pool
from ckptvcs.store.ids import Kind, ObjectId, object_id
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import PackInfo, PackWriter

_LATE = 6  # slices in memory that wait to be written

Slice = tuple[int, int, bytes]
"""The offset of a slice in its region, its length, and its hash."""


@dataclass
class Draft:
    """A frame that is being written.

    steady   the original cannot change while it is read
    exact    all slices so far decode to the original
    digest   hash of the decoded words
    source   hash of the original words; None while they equal the decoded words, or if `steady`
    """

    number: int
    dtype: str
    base: BaseTensor | None
    steady: bool = False
    companion: int | None = None
    uses_base: bool = False
    exact: bool = True
    slices: list[Slice] = field(default_factory=list)
    digest: Hasher = field(default_factory=lambda: hasher())
    source: Hasher | None = None

    @property
    def depth(self) -> int:
        """Return the number of frames below this one in the chain."""
        return self.base.depth + 1 if self.base is not None and self.uses_base else 0

    def frame(self) -> Frame:
        """Return the complete frame."""
        base = self.base.place if self.base is not None and self.uses_base else None
        return Frame(base, self.depth, self.companion, tuple(self.slices), self.dtype)


class Region:
    """Writes slices into the region of a bundle, in its own pack."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._pack: PackWriter | None = None
        self._at = 0

    def write(self, *buffers: bytes | memoryview, hashed: bool = True) -> Slice:
        """Add a slice, given in pieces."""
        offset = self._at
        for data in buffers:
            self.pack.append_region(data)
            self._at += len(data)
        return offset, self._at - offset, slice_hash(*buffers) if hashed else NO_HASH

    @property
    def pack(self) -> PackWriter:
        """Return the pack, which is created on first use."""
        if self._pack is None:
            self._pack = self._store.new_pack("packs")
        return self._pack

    def publish(self, frames: list[Frame]) -> tuple[ObjectId, PackInfo]:
        """Publish the pack with the bundle of these frames; return the bundle's id and the pack."""
        bundle = self.pack.add(Kind.BUNDLE, dump_bundle(frames))
        return bundle, self._store.publish(self.pack)

    def abort(self) -> None:
        """Delete the temporary file unless it was published."""
        if self._pack is not None:
            self._pack.abort()


class PartWriter(Region):
    """Writes the frames of one part into their own pack."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.drafts: list[Draft] = []

    def begin(self, dtype: str, base: BaseTensor | None, *, steady: bool) -> Draft:
        draft = Draft(len(self.drafts), dtype, base, steady)
        self.drafts.append(draft)
        return draft

    def append(self, draft: Draft, encoded: EncodedSlice) -> None:
        draft.slices.append(self.write(encoded.data))
        draft.uses_base |= encoded.uses_base
        draft.exact &= encoded.decoded is encoded.source
        if draft.source is None and not draft.steady and encoded.decoded is not encoded.source:
            draft.source = draft.digest.copy()
        if draft.source is not None and encoded.source is not None:
            draft.source.update(octets(encoded.source))
        draft.digest.update(octets(encoded.decoded))

    def finish(self) -> tuple[ObjectId | None, int]:
        """Publish the pack; return the bundle's id and the pack's bytes."""
        if not self.drafts:
            return None, 0
        bundle, pack = self.publish([draft.frame() for draft in self.drafts])
        return bundle, pack.size_bytes


class PatchWriter(Region):
    """Writes the exact patch of one part (the lossless residual from near to exact).

    A pack holds the whole patch, and deleting the pack makes the patch expire. Exact patches are
    most of the bytes of a commit, so a thread hashes and writes them. `joined` patches of several
    processes are copied without decoding, so each of their slices has a hash.
    """

    def __init__(self, store: ObjectStore, *, joined: bool = False) -> None:
        super().__init__(store)
        self._hashed = joined
        self._thread: Pool | None = None
        self._slices: dict[tuple[int, int], Future[Slice]] = {}
        self._late: deque[Future[Slice]] = deque()

    def append(self, tensors: Iterable[int], index: int, buffers: Buffers) -> None:
        """Add a slice of equal tensors. The buffers must not change until `frame` is called."""
        if self._thread is None:
            self._thread = Pool(1)
        future = self._thread.start(partial(self.write, *buffers, hashed=self._hashed))
        self._slices |= {(tensor, index): future for tensor in tensors}
        self._late.append(future)
        if len(self._late) > _LATE:
            self._late.popleft().result()

    def frame(
        self, tensor: int, info: TensorInfo, base: tuple[ObjectId, int] | None, depth: int
    ) -> Frame:
        """Return the frame of a tensor; slices that were not added change nothing."""
        while self._late:  # a region must have one writer at a time
            self._late.popleft().result()
        slices = []
        for index in slices_of(info.words):
            future = self._slices.get((tensor, index))
            if future is None:
                slices.append(self.write(SAME, hashed=self._hashed))
            else:
                slices.append(future.result())
        return Frame(base, depth, None, tuple(slices), info.dtype)

    def finish(self, frames: list[Frame], table: bytes) -> int:
        """Publish the pack with the exact hash table and its recipe; return its bytes."""
        exact = object_id(Kind.VALUES, table)
        bundle = self.pack.add(Kind.BUNDLE, dump_bundle(frames, exact))
        self.pack.add(Kind.VALUES, table)
        owners, numbers = (0,) * len(frames), tuple(range(len(frames)))
        recipe = Recipe(exact, 0, (bundle,), owners, numbers, patch=True)
        self.pack.add(Kind.RECIPE, dump_recipe(recipe))
        return self._store.publish(self.pack).size_bytes

    def abort(self) -> None:
        """Stop the thread and delete the pack unless it was published."""
        if self._thread is not None:
            self._thread.shutdown(cancel=True)
        super().abort()
