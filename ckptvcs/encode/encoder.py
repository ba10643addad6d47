"""Encode the tensors of a checkpoint as frames in packs, with hash tables and recipes.

    scan     hash every file and every tensor in one pass over the bytes (`source.scan`)
    reuse    refer to the stored frames of unchanged tensors; write duplicates once
    encode   all other tensors, slice by slice: frames go into the pack of their part, decoded
             words into the cached base of the next commit

Memory does not grow with the checkpoint, except for a hash and a place per tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.roles import LOSSY, WEIGHT
from ckptvcs.codec import kernels
from ckptvcs.codec.dtypes import WEIGHT_DTYPES, float_type
from ckptvcs.codec.frame import slices_of
from ckptvcs.codec.patch import Buffers
from ckptvcs.codec.spec import NearSpec
from ckptvcs.codec.words import double_squares, to_float32
from ckptvcs.decode.base_cache import MemoryBase, open_writer
from ckptvcs.encode.assemble import Encoded, EncodedTensor, StoredPlace, assemble
from ckptvcs.encode.bases import Bases
from ckptvcs.encode.error_sample import FOLDER, ErrorSample
from ckptvcs.encode.exact import encode_patch
from ckptvcs.encode.frame_writer import Draft, PartWriter, PatchWriter
from ckptvcs.encode.group import EncodedSlice, Errors, GroupEncoder, Target
from ckptvcs.encode.measure import count_nonfinite, report, report_tensors
from ckptvcs.encode.planner import Attempt, Planner
from ckptvcs.encode.source import SourceTensor, stays
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit, ErrorReport
from ckptvcs.history.recipe import dump_values
from ckptvcs.parallel import Progress, ordered_map
from ckptvcs.store.ids import Kind, ObjectId, PackId, object_id

T = TypeVar("T")


@dataclass
class _Work:
    """A group to encode: a draft for each member, and the words and slices of each."""

    encoder: GroupEncoder
    drafts: list[Draft]
    words: int
    slices: int


@dataclass(frozen=True)
class _EncodedSlices:
    """Slice `index` of a group, with the exact patch of each member (None if it is exact).

    `nonfinite` counts the weights and moments that are infinite or NaN.
    """

    work: _Work
    index: int
    members: list[tuple[Target, Draft, EncodedSlice, Errors, Buffers | None]]
    nonfinite: int


class Encoder:
    """Encodes one checkpoint against a base commit; used once."""

    def __init__(
        self,
        catalog: Catalog,
        cache: Path,
        attempt: Attempt,
        base: Commit | None,
        checkpoint: Checkpoint,
        hashes: dict[int, bytes],
        *,
        progress: Progress,
        memory: MemoryBase | None = None,
        joined: bool = False,
    ) -> None:
        """Prepare to encode `checkpoint`, whose tensor hashes `scan` returned.

        The base of the next commit is kept in `memory` if that is given, else in `cache`. The
        tensors of a `joined` checkpoint share hash tables and patches with those of other ones.
        """
        kernels.prepare(checkpoint.size_bytes)
        self._catalog, self._attempt, self._checkpoint = catalog, attempt, checkpoint
        self._hashes, self._progress = hashes, progress
        self._infos = checkpoint.schema.tensors
        self._bases = Bases(catalog, cache, memory, base, self._infos)
        self._planner = Planner(checkpoint, attempt, self._bases)
        near = isinstance(attempt.spec.settings, NearSpec) and not attempt.patched
        self._on_device = {number for number in hashes if near and stays(checkpoint, number)}
        self.rows = {part: checkpoint.schema.stored(part) for part in PARTS}
        parts = () if joined else PARTS
        self._stored_parts = {part for part in parts if self._is_stored(self.rows[part])}
        self._position = {number: at for row in self.rows.values() for at, number in enumerate(row)}
        model = [self._infos[number] for number in self.rows["model"]]
        self._open_base = partial(open_writer, cache, memory, model)
        self._sample = ErrorSample(model)
        self._keep_sample = partial(self._sample.keep, cache.parent / FOLDER, memory)
        self._frames = {part: PartWriter(catalog.store) for part in PARTS}
        self._patches = {part: PatchWriter(catalog.store, joined=joined) for part in PARTS}
        self._numbers: dict[tuple[bytes, str, str, str], int] = {}  # by value, type, part and role
        self._copies: defaultdict[int, list[int]] = defaultdict(list)
        self.tensors: dict[int, EncodedTensor] = {}
        self.errors: dict[int, Errors] = {}
        self.nonfinite = self.data_bytes = 0

    def encode(self) -> Encoded:
        """Store the tensors of the checkpoint: durable on return, not yet visible.

        Raises:
            InvalidInputError: the checkpoint changed since it was scanned.
            TooFar: the checkpoint must be encoded as a keyframe.
            TooCoarse: the error exceeds a bound.
        """
        return self.run(self._finish)

    def run(self, finish: Callable[[], T]) -> T:
        """Encode the tensors as `encode` does, and return the result of `finish`."""
        with ExitStack() as stack:  # calls all, even if one raises
            self._next_base = self._open_base()
            stack.callback(self._next_base.abort)
            for part in PARTS:
                stack.callback(self._frames[part].abort)
                stack.callback(self._patches[part].abort)
            rows = [(group, self._not_stored(group)) for group in self._planner.groups()]
            jobs = (
                (work, number, self._attempt.patched)
                for work in map(self._begin, self._planner.encoders(rows))
                for number in range(work.slices)
            )
            for encoded in ordered_map(_encode_slices, jobs, lambda job: job[0].words):
                self._put(encoded)
                del encoded  # free its memory while the next one is encoded
            self._attempt.check(report(self.errors, self._infos))
            self._checkpoint.check_unchanged()
            for number, copies in self._copies.items():
                self.tensors |= dict.fromkeys(copies, self.tensors[number])
            return finish()

    # -- reuse ---------------------------------------------------------------------------------

    def _is_stored(self, row: list[int]) -> bool:
        """Return whether the repository has the exact values of these tensors as a hash table."""
        table = dump_values([self._hashes[number] for number in row])
        return self._catalog.has_recipe(object_id(Kind.VALUES, table), patches=False)

    def _not_stored(self, group: list[int]) -> list[int]:
        """Return the tensors of a group that are not stored yet."""
        new = []
        for number in group:
            if self._infos[number].part in self._stored_parts:
                value = self._hashes[number]
                self.tensors[number] = EncodedTensor(value, value, (None, 0), 0)
                self._progress(self._infos[number].size_bytes)
            elif not self._reuse(number):
                new.append(number)
        return new

    def _reuse(self, number: int) -> bool:
        """Reuse a frame with this tensor's value, if one is stored or being written."""
        info, value = self._infos[number], self._hashes[number]
        # Parts are dropped separately, and roles are encoded differently: share neither.
        first = self._numbers.setdefault((value, info.dtype, info.part, info.role), number)
        if first != number:
            self._copies[first].append(number)
            if first in self.tensors:
                self._skip(number)
            else:
                self._progress(info.size_bytes)
            return True
        base = self._bases.places.get(number)
        if base is None or self._catalog.value(*base) != value:
            return False
        depth = self._catalog.depth(*base)
        if self._attempt.keyframe and depth:
            return False
        self.tensors[number] = EncodedTensor(value, value, self._catalog.frame_place(*base), depth)
        self._skip(number)
        return True

    def _skip(self, number: int) -> None:
        """Record a reused tensor: it has no error, and belongs to the base of the next commit."""
        info = self._infos[number]
        if info.part == "model":
            source = SourceTensor(self._checkpoint, number)
            errors = Errors()
            for index, words in enumerate(source.slices()):
                self._next_base.write(self._position[number], index, words, fresh=False)
                if info.role == WEIGHT:
                    errors.add(Errors(energy=energy_of(to_float32(words, float_type(info.dtype)))))
            if info.role == WEIGHT:
                self.errors[number] = errors
        self._progress(info.size_bytes)

    # -- encoding ------------------------------------------------------------------------------

    def _begin(self, encoder: GroupEncoder) -> _Work:
        drafts: list[Draft] = []
        for index, target in enumerate(encoder.members):
            steady = SourceTensor(self._checkpoint, target.number).steady
            writer = self._frames[self._infos[target.number].part]
            draft = writer.begin(target.dtype, target.base, steady=steady)
            if target.base is not None and target.role == WEIGHT:
                self._planner.measure_movement(target)
            if index in encoder.companions:
                draft.companion = drafts[encoder.companions[index]].number
            drafts.append(draft)
        words = self._infos[encoder.members[0].number].words
        work = _Work(encoder, drafts, words, len(slices_of(words)))
        if not work.slices:
            self._end(work)
        return work

    def _put(self, encoded: _EncodedSlices) -> None:
        work, index = encoded.work, encoded.index
        self.nonfinite += encoded.nonfinite
        for target, draft, part, errors, patch in encoded.members:
            info = self._infos[target.number]
            numbers = target.number, *self._copies.get(target.number, ())
            self._frames[info.part].append(draft, part)
            if patch is not None:
                self._patches[info.part].append(numbers, index, patch)
            if info.part == "model":
                fresh = part.decoded is not part.source
                for number in numbers:
                    self._next_base.write(self._position[number], index, part.decoded, fresh=fresh)
                    if target.role == WEIGHT and part.source is not None:
                        words = part.decoded, part.source
                        self._sample.add(self._position[number], index, *words, target.dtype)
            if target.base is not None and target.role == WEIGHT:
                errors.movement = self._planner.movement(target, errors)
            self.errors.setdefault(target.number, Errors()).add(errors)
            self._progress(part.decoded.nbytes)
        if index + 1 == work.slices:
            self._end(work)

    def _end(self, work: _Work) -> None:
        for target, draft in zip(work.encoder.members, work.drafts, strict=True):
            near, exact = draft.digest.digest(), self._hashes[target.number]
            if draft.exact and target.number in self._on_device:
                exact = near
            read = draft.source or (draft.digest if draft.exact else None)
            if read is not None and read.digest() != exact:
                raise SourceTensor(self._checkpoint, target.number).changed()
            place = None, draft.number
            self.tensors[target.number] = EncodedTensor(near, exact, place, draft.depth)

    # -- publishing ----------------------------------------------------------------------------

    def _finish(self) -> Encoded:
        patch = self._publish_patch if self._attempt.patched else None
        encoded = assemble(self._catalog, self.tensors, self.rows, self.publish_frames, patch)
        if "model" in encoded.parts and "model" not in self._stored_parts:
            self.keep_sample(encoded.parts["model"].values)
            self._next_base.finish(encoded.parts["model"].values)
        encoded.data_bytes, encoded.nonfinite = self.data_bytes, self.nonfinite
        encoded.error, encoded.errors = report(self.errors, self._infos), self._reports()
        encoded.notes = self._planner.notes
        return encoded

    def keep_sample(self, values: ObjectId) -> None:
        """Keep the sample of errors for the next commit, if there are any errors."""
        if any(errors.error for errors in self.errors.values()):
            self._keep_sample(values)

    def _reports(self) -> dict[int, ErrorReport]:
        """Return the error report of each near tensor, copies included."""
        if self._attempt.spec.settings is None:
            return {}
        errors = dict(self.errors)
        for number, copies in self._copies.items():
            if number in errors:
                errors |= dict.fromkeys(copies, errors[number])
        return report_tensors(errors, self._infos)

    def publish_frames(self, part: str) -> ObjectId | None:
        """Publish the new frames of a part; return their bundle."""
        bundle, size = self._frames[part].finish()
        self.data_bytes += size
        return bundle

    def _publish_patch(
        self, part: str, values: ObjectId, exact: bytes, depths: Mapping[int, int]
    ) -> int:
        """Publish the exact patch of a part; return its size in bytes."""
        writer = self._patches[part]
        frames = [
            writer.frame(number, self._infos[number], (values, position), depths[number] + 1)
            for position, number in enumerate(self.rows[part])
        ]
        return writer.finish(frames, exact)

    def publish_loose(self, part: str) -> tuple[list[PackId], dict[int, StoredPlace]]:
        """Publish the exact patches of a part, to be joined; return their pack and places."""
        lossy = [n for n in self.rows[part] if self.tensors[n].near != self.tensors[n].exact]
        if not self._attempt.patched or not lossy:
            return [], {}
        writer = self._patches[part]
        frames = [writer.frame(number, self._infos[number], None, 0) for number in lossy]
        bundle, pack = writer.publish(frames)
        return [pack.id], {number: (bundle, frame) for frame, number in enumerate(lossy)}


def _encode_slices(job: tuple[_Work, int, bool]) -> _EncodedSlices:
    work, number, patched = job
    group = work.encoder.encode(number)
    members = []
    nonfinite = 0
    rows = zip(work.encoder.members, work.drafts, group.slices, group.errors, strict=True)
    for target, draft, part, errors in rows:
        patch: Buffers | None = None
        if part.decoded is not part.source:
            if patched:
                patch = encode_patch(target.tensor.slice(number), part.decoded, target.dtype)
        elif target.role in LOSSY and target.dtype in WEIGHT_DTYPES:
            nonfinite += count_nonfinite(part.decoded, target.dtype)
        members.append((target, draft, part, errors, patch))
    return _EncodedSlices(work, number, members, nonfinite)


def energy_of(values: NDArray[np.float32]) -> float:
    """Return the sum of squares of weights, or 0 if it is not finite."""
    total = float(double_squares(values).sum())
    return total if np.isfinite(total) else 0.0
