"""Encode the tensors of a checkpoint as frames in packs, with hash tables and recipes.

    scan     hash every file and every tensor in one pass over the bytes (`source.scan`)
    reuse    refer to the stored frames of unchanged tensors; write duplicates once
    encode   all other tensors, slice by slice: frames go into the pack of their part, decoded
             words into the cached base of the next commit

Memory does not grow with the checkpoint, except for a hash and a place per tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptvcs.checkpoint.matching import alike
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.roles import LOSSY, WEIGHT
from ckptvcs.codec import kernels
from ckptvcs.codec.dtypes import WEIGHT_DTYPES, float_type
from ckptvcs.codec.frame import slice_counts
from ckptvcs.codec.patch import Buffers
from ckptvcs.codec.spec import NearSpec
from ckptvcs.codec.words import to_float32
from ckptvcs.decode.base_cache import BaseTensor, BaseWriter, MemoryBase, MemoryWriter, find_decoded
from ckptvcs.decode.chain import ChainReader, DecodedTable
from ckptvcs.encode.assemble import Assembly, Encoded, Place, StoredPlace, in_bundle
from ckptvcs.encode.exact import encode_patch
from ckptvcs.encode.frame_writer import Draft, PartWriter, PatchWriter
from ckptvcs.encode.group import EncodedGroup, Errors, GroupEncoder
from ckptvcs.encode.measure import count_nonfinite, report, report_tensors
from ckptvcs.encode.planner import Assignment, Attempt, Planner, TooCoarse
from ckptvcs.encode.source import SourceTensor, find_masters, stays
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit, ErrorReport
from ckptvcs.history.recipe import dump_values
from ckptvcs.history.schema import TensorInfo
from ckptvcs.parallel import Progress, ordered_map
from ckptvcs.store.ids import Kind, ObjectId, object_id

T = TypeVar("T")


@dataclass
class _BasePart:
    """One part of the base commit: its hash table, and the position of each tensor by name."""

    values: ObjectId
    hashes: list[bytes]
    positions: dict[str, tuple[int, TensorInfo]]


@dataclass
class _Work:
    """A group to encode: a draft for each member, and the number of slices."""

    encoder: GroupEncoder
    drafts: list[Draft]
    slices: int


@dataclass(frozen=True)
class _EncodedSlices:
    """Slice `index` of a group, with exact patches (None for slices that are exact).

    `nonfinite` counts the weights and moments that are infinite or NaN.
    """

    work: _Work
    index: int
    group: EncodedGroup
    patches: list[Buffers | None]
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
    ) -> None:
        """Prepare to encode `checkpoint`, whose tensor hashes `scan` returned.

        The base of the next commit is kept in `memory` if that is given, else in `cache`.
        """
        spec, keyframe, patched = attempt.spec, attempt.keyframe, attempt.patched
        kernels.prepare(checkpoint.size_bytes)
        self._decoded: dict[ObjectId, DecodedTable | None] = {}
        self._catalog, self._chain = catalog, ChainReader(catalog, self._decoded.get)
        self._cache, self._memory, self._spec = cache, memory, spec
        self._keyframe, self._bound, self._progress = keyframe, attempt.bound, progress
        self._checkpoint, self._hashes = checkpoint, hashes
        self._infos = checkpoint.schema.tensors
        self._base_parts = {} if base is None else self._load_base(base)
        self._numbers = {name: checkpoint.schema.stored(name) for name in PARTS}
        self._position = {
            number: position
            for row in self._numbers.values()
            for position, number in enumerate(row)
        }
        near = isinstance(spec.settings, NearSpec)
        self._on_device = {n for n in hashes if near and not patched and stays(checkpoint, n)}
        self._decoded_hashes = dict(hashes)
        self._places: dict[int, Place] = {}
        self._twins: dict[tuple[bytes, str, str, str], int] = {}
        self._copies: dict[int, list[int]] = {}
        self._twin_of: dict[int, int] = {}
        self._errors: dict[int, Errors] = {}
        self._depths: dict[int, int] = {}
        self._nonfinite = self._data_bytes = 0
        self._writers = {
            name: PartWriter(lambda: catalog.store.new_pack("packs")) for name in PARTS
        }
        self._patched = patched and spec.settings is not None
        self._patches = {
            name: PatchWriter(lambda: catalog.store.new_pack("packs")) for name in PARTS
        }
        self._planner = Planner(
            checkpoint,
            spec,
            find_masters(checkpoint) if near else {},
            self._base_tensor,
            keyframe=keyframe,
            alone=attempt.alone,
        )
        self._stored_parts = {name for name, row in self._numbers.items() if self._is_stored(row)}

    def _load_base(self, base: Commit) -> dict[str, _BasePart]:
        schema = self._catalog.schema(base.schema)
        names = alike([t.name for t in schema.tensors], [t.name for t in self._infos])
        parts = {}
        for name, state in base.parts.items():
            stored = self._catalog.store.contains(state.values)
            if not stored or not self._catalog.has_recipe(state.values):
                continue  # a retention rule dropped the part
            infos = [schema.tensors[number] for number in schema.stored(name)]
            hashes = self._catalog.all_values(state.values, len(infos))
            positions = {info.name: (position, info) for position, info in enumerate(infos)}
            positions |= {new: positions[old] for new, old in names.items() if old in positions}
            memory = self._memory if name == "model" else None
            self._decoded[state.values] = find_decoded(
                self._cache, memory, state.values, infos, hashes, change=True
            )
            parts[name] = _BasePart(state.values, hashes, positions)
        return parts

    def encode(self) -> Encoded:
        """Store the tensors of the checkpoint: durable on return, not yet visible.

        Raises:
            InvalidInputError: the checkpoint changed since it was scanned.
            TooFar: the checkpoint must be encoded as a keyframe.
            TooCoarse: the error exceeds a bound.
        """
        return self._encode_then(self._finish)

    def _encode_then(self, finish: Callable[[], T]) -> T:
        infos = [self._infos[number] for number in self._numbers["model"]]
        self._base_writer: BaseWriter | MemoryWriter
        if self._memory is None:
            self._base_writer = BaseWriter(self._cache, [info.size_bytes for info in infos])
        else:
            self._base_writer = self._memory.writer(infos)
        try:
            rows = [(group, self._not_stored(group)) for group in self._planner.groups()]
            jobs = (
                (work, number, self._patched)
                for work in map(self._begin, self._planner.encoders(rows))
                for number in range(work.slices)
            )
            for encoded in ordered_map(_encode_slices, jobs):
                self._put(encoded)
                del encoded  # free its memory while the next one is encoded
            self._check_bound()
            self._settle()
            return finish()
        finally:
            with contextlib.ExitStack() as stack:  # calls all, even if one raises
                stack.callback(self._base_writer.abort)
                for name in PARTS:
                    stack.callback(self._writers[name].abort)
                    stack.callback(self._patches[name].abort)

    # -- bases and reuse -----------------------------------------------------------------------

    def _is_stored(self, row: list[int]) -> bool:
        """Return whether the repository has the exact values of these tensors as a hash table."""
        table = dump_values([self._hashes[number] for number in row])
        return self._catalog.has_recipe(object_id(Kind.VALUES, table), patches=False)

    def _base_of(self, number: int) -> tuple[_BasePart, int] | None:
        """Return the place of the base tensor with the same name, type and shape."""
        info = self._infos[number]
        part = self._base_parts.get(info.part)
        position, base = part.positions.get(info.name, (0, None)) if part else (0, None)
        if part is None or base is None or (base.dtype, base.shape) != (info.dtype, info.shape):
            return None
        return part, position

    def _base_tensor(self, number: int) -> BaseTensor | None:
        """Return the base of a tensor, not yet verified, or None."""
        place = self._base_of(number)
        if place is None:
            return None
        base = BaseTensor(self._chain, place[0].values, place[1], self._infos[number])
        return base if base.has_same_slices() else None

    def _not_stored(self, group: list[int]) -> list[int]:
        """Return the tensors of a group that are not stored yet."""
        new = []
        for number in group:
            if self._infos[number].part in self._stored_parts:
                self._progress(self._infos[number].size_bytes)
            elif not self._reuse(number):
                new.append(number)
        return new

    def _reuse(self, number: int) -> bool:
        """Reuse a frame with this tensor's value, if one is stored or being written."""
        info, value = self._infos[number], self._hashes[number]
        # Parts are dropped separately, and roles are encoded differently: share neither.
        twin = self._twins.setdefault((value, info.dtype, info.part, info.role), number)
        if twin != number:
            self._copies.setdefault(twin, []).append(number)
            self._twin_of[number] = twin
            if twin in self._places:
                self._skip(number)
            else:
                self._progress(info.size_bytes)
            return True
        base = self._base_of(number)
        if base is None:
            return False
        part, position = base
        if part.hashes[position] != value:
            return False
        bundle, frame = self._catalog.place(part.values, position)
        depth = self._chain.depth(part.values, position)
        if self._keyframe and depth:
            return False
        self._places[number] = (bundle, frame)
        self._depths[number] = depth
        self._skip(number)
        return True

    def _skip(self, number: int) -> None:
        """Record a reused tensor: it has no error, and belongs to the base of the next commit."""
        info = self._infos[number]
        if info.part == "model":
            source = SourceTensor(self._checkpoint, number)
            errors = Errors()
            for index in range(len(slice_counts(info.words))):
                words = source.slice(index)
                self._base_writer.write(self._position[number], index, words, fresh=False)
                if info.role == WEIGHT:
                    errors.add(Errors(energy=energy_of(to_float32(words, float_type(info.dtype)))))
            if info.role == WEIGHT:
                self._errors[number] = errors
        self._progress(info.size_bytes)

    # -- encoding ------------------------------------------------------------------------------

    def _begin(self, assignment: Assignment) -> _Work:
        encoder, bases = assignment
        drafts: list[Draft] = []
        for index, target in enumerate(encoder.members):
            base = bases.get(target.number)
            info = self._infos[target.number]
            draft = self._writers[info.part].begin(
                target.dtype, base, steady=SourceTensor(self._checkpoint, target.number).steady
            )
            if index in encoder.companions:
                draft.companion = drafts[encoder.companions[index]].number
            self._places[target.number] = (None, draft.number)
            drafts.append(draft)
        words = self._infos[encoder.members[0].number].words
        work = _Work(encoder, drafts, len(slice_counts(words)))
        if not work.slices:
            self._end(work)
        return work

    def _put(self, encoded: _EncodedSlices) -> None:
        work, index = encoded.work, encoded.index
        self._nonfinite += encoded.nonfinite
        for target, draft, part, errors, patch in zip(
            work.encoder.members,
            work.drafts,
            encoded.group.slices,
            encoded.group.errors,
            encoded.patches,
            strict=True,
        ):
            info = self._infos[target.number]
            self._writers[info.part].append(draft, part)
            if patch is not None:
                self._patches[info.part].append(target.number, index, patch)
            if info.part == "model":
                for number in (target.number, *self._copies.get(target.number, ())):
                    self._base_writer.write(
                        self._position[number],
                        index,
                        part.decoded,
                        fresh=part.decoded is not part.source,
                    )
            self._errors.setdefault(target.number, Errors()).add(errors)
            self._progress(part.decoded.nbytes)
        if index + 1 == work.slices:
            self._end(work)

    def _end(self, work: _Work) -> None:
        for target, draft in zip(work.encoder.members, work.drafts, strict=True):
            self._decoded_hashes[target.number] = draft.digest.digest()
            if draft.exact and target.number in self._on_device:
                self._hashes[target.number] = self._decoded_hashes[target.number]
            read = draft.source or (draft.digest if draft.exact else None)
            if read is not None and read.digest() != self._hashes[target.number]:
                raise SourceTensor(self._checkpoint, target.number).changed()
            based = draft.base is not None and draft.uses_base
            self._depths[target.number] = draft.base.depth + 1 if based else 0  # type: ignore[union-attr]

    def _check_bound(self) -> None:
        error = report(self._errors, self._infos).weight_rel
        if self._bound and error > self._bound:
            raise TooCoarse(error / self._bound)

    # -- publishing ----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Give each duplicate tensor the place and hash of its twin."""
        self._checkpoint.check_unchanged()
        for number, twin in self._twin_of.items():
            if twin in self._places:  # otherwise the whole part is stored already
                self._places[number] = self._places[twin]
            self._decoded_hashes[number] = self._decoded_hashes[twin]
            if number in self._on_device:
                self._hashes[number] = self._hashes[twin]

    def _finish(self) -> Encoded:
        assembly = Assembly(self._catalog, self._depths, patched=self._patched)
        for name, row in self._numbers.items():
            assembly.add(
                name,
                row,
                (self._decoded_hashes, self._hashes),
                partial(self._finish_frames, name, row),
                partial(self._finish_patch, name, row),
            )
        if "model" in assembly.parts and "model" not in self._stored_parts:
            self._base_writer.finish(assembly.parts["model"].values)
        return Encoded(
            assembly.parts,
            assembly.tables,
            assembly.recipes,
            max(self._depths.values(), default=0),
            self._data_bytes,
            assembly.patch_bytes,
            self._nonfinite,
            report(self._errors, self._infos),
            self._reports(),
            assembly.shared,
            self._planner.notes,
        )

    def _reports(self) -> dict[int, ErrorReport]:
        """Return the error report of each near tensor, copies included."""
        if self._spec.settings is None:
            return {}
        errors = dict(self._errors)
        errors |= {n: errors[twin] for n, twin in self._twin_of.items() if twin in errors}
        return report_tensors(errors, self._infos)

    def _finish_frames(self, name: str, row: list[int]) -> list[StoredPlace]:
        """Publish the frames of a part; return the place of each tensor of `row`."""
        bundle, size = self._writers[name].finish(self._catalog.store.publish)
        self._data_bytes += size
        return in_bundle([self._places[number] for number in row], bundle)

    def _finish_patch(self, name: str, row: list[int], values: ObjectId, exact: bytes) -> int:
        """Publish the exact patch of a part; return its size in bytes."""
        writer, frames = self._patches[name], []
        for position, number in enumerate(row):
            info, twin = self._infos[number], self._twin_of.get(number, number)
            frames.append(writer.frame(twin, info, (values, position), self._depths[twin] + 1))
        return writer.finish(frames, exact, self._catalog.store.publish)


def _encode_slices(job: tuple[_Work, int, bool]) -> _EncodedSlices:
    work, number, patched = job
    encoded = work.encoder.encode(number)
    patches: list[Buffers | None] = []
    nonfinite = 0
    for target, part in zip(work.encoder.members, encoded.slices, strict=True):
        exact = part.decoded is part.source
        if exact and target.role in LOSSY and target.dtype in WEIGHT_DTYPES:
            nonfinite += count_nonfinite(part.decoded, target.dtype)
        if exact or not patched:
            patches.append(None)
        else:
            patches.append(encode_patch(target.tensor.slice(number), part.decoded, target.dtype))
    return _EncodedSlices(work, number, encoded, patches, nonfinite)


def energy_of(values: NDArray[np.float32]) -> float:
    """Return the sum of squares of weights, or 0 if it is not finite."""
    total = float(np.square(values, dtype=np.float64).sum())
    return total if np.isfinite(total) else 0.0
