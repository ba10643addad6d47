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
from ckptvcs.codec.spec import CodecSpec, NearSpec
from ckptvcs.codec.words import to_float32
from ckptvcs.decode.base_cache import MemoryBase
from ckptvcs.encode.assemble import EncodedTensor, StoredPlace, in_bundle
from ckptvcs.encode.bases import match_tensors
from ckptvcs.encode.encoder import Encoder, energy_of
from ckptvcs.encode.group import Errors
from ckptvcs.encode.planner import Attempt, within_bounds
from ckptvcs.encode.source import SourceTensor, scan
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit, ErrorReport, PartState
from ckptvcs.history.schema import Schema
from ckptvcs.parallel import quiet
from ckptvcs.store.ids import ObjectId, PackId


@dataclass(frozen=True)
class ShardPlan:
    """The base commit and the settings of all processes (see `planner.Attempt`)."""

    base: ObjectId | None
    spec: CodecSpec
    keyframe: bool
    patched: bool


@dataclass(frozen=True)
class Stored(EncodedTensor):
    """A tensor whose frame is stored.

    patch    the place of the frame of its exact patch, if it has one
    errors   sums of its errors; `known` is the report of a tensor that the base has
    proof    exact hash table of the base and the position there, which verify the patch
    """

    patch: StoredPlace | None
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
    _, hashes = scan(checkpoint, quiet, stay=near and not plan.patched)
    base = None if plan.base is None else catalog.commit(plan.base)
    unchanged = {} if base is None else _unchanged(catalog, plan, base, checkpoint, hashes)
    (file,) = checkpoint.files
    infos = checkpoint.schema.tensors
    literals = {
        piece.offset: file.source.read(piece.offset, piece.size)
        for piece in file.pieces
        if piece.tensor is None or (infos[piece.tensor].inline and not piece.checksum)
    }

    size, schema, step = file.source.size, checkpoint.schema, checkpoint.step
    shard = Shard(file.format, size, file.pieces, literals, schema, step, unchanged)
    if base is not None and len(unchanged) == len(hashes):
        return shard
    if base is not None:
        _adopt(memory, catalog, base)

    def encode(attempt: Attempt) -> Shard:
        encoder = Encoder(
            catalog,
            cache,
            attempt,
            base,
            checkpoint,
            dict(hashes),
            progress=quiet,
            memory=memory,
            joined=True,
        )
        return encoder.run(lambda: _publish(encoder, shard, memory))

    first = Attempt.first(plan.spec, keyframe=plan.keyframe, patched=plan.patched)
    return within_bounds(first, encode)


def _adopt(memory: MemoryBase, catalog: Catalog, base: Commit) -> None:
    """Keep only the weights in memory that the base has."""
    state, schema = base.parts.get("model"), catalog.schema(base.schema)
    if state is not None and catalog.has_recipe(state.values):
        names = [schema.tensors[number].name for number in schema.stored("model")]
        hashes = catalog.all_values(state.values, len(names))
        memory.adopt(state.values, dict(zip(names, hashes, strict=True)))


def _publish(encoder: Encoder, shard: Shard, memory: MemoryBase) -> Shard:
    """Publish the frames and patches of a shard; return it with the places of its tensors."""
    stored: dict[int, Stored] = {}
    loose: list[PackId] = []
    for part, row in encoder.rows.items():
        tensors = [encoder.tensors[number] for number in row]
        places = in_bundle([t.place for t in tensors], encoder.publish_frames(part))
        packs, patches = encoder.publish_loose(part)
        loose += packs
        for number, tensor, place in zip(row, tensors, places, strict=True):
            patch, errors = patches.get(number), encoder.errors.get(number)
            stored[number] = Stored(tensor.near, tensor.exact, place, tensor.depth, patch, errors)
    names = {number: shard.schema.tensors[number].name for number in encoder.rows["model"]}
    encoder.keep_sample(ObjectId(""))
    memory.keep({name: stored[number].near for number, name in names.items()})
    return replace(
        shard,
        stored=stored,
        data_bytes=encoder.data_bytes,
        nonfinite=encoder.nonfinite,
        loose=tuple(loose),
    )


def _unchanged(
    catalog: Catalog,
    plan: ShardPlan,
    base: Commit,
    checkpoint: Checkpoint,
    hashes: dict[int, bytes],
) -> dict[int, Stored]:
    """Return all tensors as the base stores them exactly; none if any tensor changed."""
    assert plan.base is not None
    schema, reports = catalog.schema(base.schema), catalog.errors(plan.base)
    matches = match_tensors(schema.tensors, checkpoint.schema.tensors)
    states = {part: state for part, state in base.parts.items() if _is_exact(catalog, state)}
    positions = {n: at for part in states for at, n in enumerate(schema.stored(part))}
    stored: dict[int, Stored] = {}
    for number, value in hashes.items():
        old = matches.get(number, -1)
        if old not in positions:
            return {}
        state, position = states[schema.tensors[old].part], positions[old]
        if catalog.value(state.exact or state.values, position) != value:
            return {}
        proof = None if state.exact is None else (state.exact, position)
        stored[number] = Stored(
            catalog.value(state.values, position),
            value,
            catalog.frame_place(state.values, position),
            catalog.depth(state.values, position),
            proof and catalog.frame_place(*proof),
            _errors(checkpoint, number, reports.get(old)),
            reports.get(old),
            proof,
        )
    return stored


def _is_exact(catalog: Catalog, state: PartState) -> bool:
    """Return whether a part of the base can be restored exactly."""
    if state.exact is None:
        return catalog.has_recipe(state.values)
    tables = state.values, state.exact
    return all(map(catalog.has_recipe, tables)) and not catalog.is_fading(state.exact)


def _errors(checkpoint: Checkpoint, number: int, report: ErrorReport | None) -> Errors | None:
    """Return the error sums of a weight from its report; None for other tensors."""
    info, tensor = checkpoint.schema.tensors[number], SourceTensor(checkpoint, number)
    if info.role != WEIGHT:
        return None
    dtype = float_type(info.dtype)
    energy = sum(energy_of(to_float32(words, dtype)) for words in tensor.slices())
    error = 0.0 if report is None else report.weight_rel**2 * energy
    return Errors(error, energy, largest=0.0 if report is None else report.max_abs)
