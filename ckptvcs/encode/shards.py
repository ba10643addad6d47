"""Encode the shards of a distributed commit, one in each process.

    plan     sent by the joining process to all: the base and the settings
    shard    the reply: the place of each encoded tensor, and all other contents of its rank's file

The frames of a shard are durable in their own packs, but not visible until a commit names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckptvcs.checkpoint.layout import Piece
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.codec.dtypes import float_type
from ckptvcs.codec.frame import slice_counts
from ckptvcs.codec.spec import CodecSpec, NearSpec
from ckptvcs.codec.words import to_float32
from ckptvcs.decode.base_cache import MemoryBase
from ckptvcs.encode.encoder import Encoder, energy_of
from ckptvcs.encode.frame_writer import PatchWriter
from ckptvcs.encode.group import Errors
from ckptvcs.encode.planner import Attempt, within_bounds
from ckptvcs.encode.source import SourceTensor, scan
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit, ErrorReport, PartState
from ckptvcs.history.schema import Schema
from ckptvcs.store.ids import ObjectId, PackId


@dataclass(frozen=True)
class ShardPlan:
    """The base commit and the settings of all processes (see `planner.Attempt`)."""

    base: ObjectId | None
    spec: CodecSpec
    keyframe: bool
    patched: bool


@dataclass(frozen=True)
class Stored:
    """A stored tensor.

    value, exact    hashes of the decoded and of the original tensor
    bundle, frame   the place of its frame, at `depth` in its chain
    patch           the place of the frame of its exact patch, if it has one
    errors          sums of its errors; `known` is the report of a tensor that the base has
    proof           exact hash table of the base and the position there, which verify the patch
    """

    value: bytes
    exact: bytes
    bundle: ObjectId
    frame: int
    depth: int
    patch: tuple[ObjectId, int] | None
    errors: Errors | None
    known: ErrorReport | None = None
    proof: tuple[ObjectId, int] | None = None


@dataclass(frozen=True)
class Shard:
    """The file that one process contributes to a commit, and the places of its tensors.

    `literals` are the bytes outside of frames, by offset in the file; `loose` are the packs with
    exact patches to join.
    """

    format: str
    size: int
    pieces: tuple[Piece, ...]
    literals: Mapping[int, bytes]
    schema: Schema
    step: int | None
    stored: Mapping[int, Stored]
    data_bytes: int = 0
    nonfinite: int = 0
    loose: tuple[PackId, ...] = ()


def encode_shard(
    catalog: Catalog, cache: Path, plan: ShardPlan, checkpoint: Checkpoint, memory: MemoryBase
) -> Shard:
    """Store the tensors of one process: durable on return, not yet visible.

    `memory` has the base, and takes that of the next commit. The joining process has a lease, so
    gc keeps the packs.

    Raises:
        InvalidInputError: the state changed while it was read.
        CorruptionError, MissingObjectError: the base is damaged or missing.
        StorageError: the disk is full, or fails.
    """
    near = isinstance(plan.spec.settings, NearSpec)
    _, hashes = scan(checkpoint, lambda _: None, stay=near and not plan.patched)
    unchanged = {} if plan.base is None else _unchanged(catalog, plan, checkpoint, hashes)
    (file,) = checkpoint.files
    infos = checkpoint.schema.tensors
    literals = {
        piece.offset: file.source.read(piece.offset, piece.size)
        for piece in file.pieces
        if piece.tensor is None or (infos[piece.tensor].inline and not piece.checksum)
    }

    size, schema, step = file.source.size, checkpoint.schema, checkpoint.step
    shard = Shard(file.format, size, file.pieces, literals, schema, step, unchanged)
    if plan.base is not None and len(unchanged) == len(hashes):
        return shard

    def encode(attempt: Attempt) -> Shard:
        encoder = _ShardEncoder(catalog, cache, attempt, plan, checkpoint, dict(hashes), memory)
        return encoder.encode_shard(shard)

    first = Attempt.first(plan.spec, keyframe=plan.keyframe, patched=plan.patched)
    return within_bounds(first, encode)


def _unchanged(
    catalog: Catalog, plan: ShardPlan, checkpoint: Checkpoint, hashes: dict[int, bytes]
) -> dict[int, Stored]:
    """Return all tensors as the base stores them exactly; none if any tensor changed."""
    assert plan.base is not None
    base = catalog.commit(plan.base)
    schema, reports = catalog.schema(base.schema), catalog.errors(plan.base)
    tensors = _base_tensors(catalog, base, schema)
    stored: dict[int, Stored] = {}
    for number, value in hashes.items():
        info = checkpoint.schema.tensors[number]
        base_tensor = tensors.get(info.name)
        if base_tensor is None or base_tensor.exact != value:
            return {}
        base_info = schema.tensors[base_tensor.number]
        if (base_info.part, base_info.dtype, base_info.shape) != (
            info.part,
            info.dtype,
            info.shape,
        ):
            return {}
        state, position = base_tensor.state, base_tensor.position
        values, proof = state.values, None if state.exact is None else (state.exact, position)
        report = reports.get(base_tensor.number)
        stored[number] = Stored(
            base_tensor.near,
            value,
            *catalog.place(values, position),
            catalog.frame(values, position)[1].depth,
            proof and catalog.place(*proof),
            _errors(checkpoint, number, report),
            report,
            proof,
        )
    return stored


@dataclass(frozen=True)
class _BaseTensor:
    """A tensor of the base commit: number in the schema, position in hash tables, hashes."""

    number: int
    state: PartState
    position: int
    near: bytes
    exact: bytes


def _base_tensors(catalog: Catalog, base: Commit, schema: Schema) -> dict[str, _BaseTensor]:
    """Return the tensors, by name, of those parts of the base that can be restored exactly."""
    tensors = {}
    for part, state in base.parts.items():
        if not catalog.has_recipe(state.values):
            continue
        if state.exact is not None and (
            not catalog.has_recipe(state.exact) or catalog.is_fading(state.exact)
        ):
            continue
        row = schema.stored(part)
        near = exact = catalog.all_values(state.values, len(row))
        if state.exact is not None:
            exact = catalog.all_values(state.exact, len(row))
        for position, number in enumerate(row):
            tensors[schema.tensors[number].name] = _BaseTensor(
                number, state, position, near[position], exact[position]
            )
    return tensors


def _errors(checkpoint: Checkpoint, number: int, report: ErrorReport | None) -> Errors | None:
    """Return the error sums of a weight from its report; None for other tensors."""
    info, tensor = checkpoint.schema.tensors[number], SourceTensor(checkpoint, number)
    if info.role != WEIGHT:
        return None
    slices = range(len(slice_counts(info.words)))
    energy = sum(energy_of(to_float32(tensor.slice(n), float_type(info.dtype))) for n in slices)
    error = 0.0 if report is None else report.weight_rel**2 * energy
    return Errors(error, energy, largest=0.0 if report is None else report.max_abs)


class _ShardEncoder(Encoder):
    """Encodes one shard; `memory` has the base of the tensors of its process only."""

    def __init__(
        self,
        catalog: Catalog,
        cache: Path,
        attempt: Attempt,
        plan: ShardPlan,
        checkpoint: Checkpoint,
        hashes: dict[int, bytes],
        memory: MemoryBase,
    ) -> None:
        base = None if plan.base is None else catalog.commit(plan.base)
        if base is not None and "model" in base.parts:
            schema, values = catalog.schema(base.schema), base.parts["model"].values
            names = [schema.tensors[number].name for number in schema.stored("model")]
            if catalog.has_recipe(values):
                base_hashes = catalog.all_values(values, len(names))
                memory.adopt(values, dict(zip(names, base_hashes, strict=True)))
        super().__init__(
            catalog,
            cache,
            attempt,
            base,
            checkpoint,
            hashes,
            progress=lambda _: None,
            memory=memory,
        )
        self._stored_parts = set()  # hash tables cover all processes
        self._memory: MemoryBase = memory
        self._patches = {
            name: PatchWriter(lambda: catalog.store.new_pack("packs"), joined=True)
            for name in PARTS
        }

    def encode_shard(self, shard: Shard) -> Shard:
        """Store the tensors and return `shard` with their places.

        Raises:
            InvalidInputError, TooFar, TooCoarse: as in `encode`.
        """
        return self._encode_then(lambda: self._finish_shard(shard))

    def _finish_shard(self, shard: Shard) -> Shard:
        stored: dict[int, Stored] = {}
        loose: list[PackId] = []
        for name, row in self._numbers.items():
            places = self._finish_frames(name, row)
            patches = self._loose(name, row, loose)
            for number, place in zip(row, places, strict=True):
                stored[number] = Stored(
                    self._decoded_hashes[number],
                    self._hashes[number],
                    *place,
                    self._depths[self._twin_of.get(number, number)],
                    patches.get(number),
                    self._errors.get(number),
                )
        model = self._numbers["model"]
        self._memory.keep({self._infos[n].name: self._decoded_hashes[n] for n in model})
        return replace(
            shard,
            stored=stored,
            data_bytes=self._data_bytes,
            nonfinite=self._nonfinite,
            loose=tuple(loose),
        )

    def _loose(
        self, name: str, row: list[int], loose: list[PackId]
    ) -> dict[int, tuple[ObjectId, int]]:
        """Publish the patches of a part, to be joined; return the place of each frame."""
        lossy = [n for n in row if self._decoded_hashes[n] != self._hashes[n]]
        if not self._patched or not lossy:
            return {}
        writer = self._patches[name]
        frames = [writer.frame(self._twin_of.get(n, n), self._infos[n], None, 0) for n in lossy]
        bundle, info = writer.finish_loose(frames, self._catalog.store.publish)
        loose.append(info.id)
        return {number: (bundle, frame) for frame, number in enumerate(lossy)}
