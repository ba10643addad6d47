"""Shards: what each of several processes codes of one commit, and tells the one that joins them.

    ticket   from the one that joins to all: what to code against, and how
    shard    back: where each tensor lies, by its frame; all else that makes up the file of its rank

A shard's frames stand in packs of its own, durable and seen by nobody, until a commit names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """How all processes are to code: against which commit, and whether exactly too."""

    base: ObjectId | None
    spec: CodecSpec
    keyframe: bool
    patched: bool


@dataclass(frozen=True)
class Stored:
    """A stored tensor: the hashes of its decoded and of its original value, the frame of a bundle
    that it is, how many frames are below it; the frame of its exact patch, where it has one.

    What a commit has already has `known` errors, and its patch is proven by the tensor that it
    decodes to: `proof` is its table of exact values, and the position there.
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
    """One process' share of a commit: a file, the tensors in it, and where these are.

    `literals` are the bytes of its pieces that stand in no frame, by offset; `loose` are
    packs of patches to join.
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
    catalog: Catalog, cache: Path, ticket: ShardPlan, checkpoint: Checkpoint, memory: MemoryBase
) -> Shard:
    """Store the tensors of one process: durable on return, not yet visible.

    `memory` keeps what the next commit is coded against.  The lease of who joins keeps gc away.

    Raises:
        InvalidInputError: the state changed while it was read.
        CorruptionError, MissingObjectError: the base is damaged or missing.
        StorageError: the disk is full, or fails.
    """
    near = isinstance(ticket.spec.settings, NearSpec)
    _, hashes = scan(checkpoint, lambda _: None, stay=near and not ticket.patched)
    known = {} if ticket.base is None else _known(catalog, ticket, checkpoint, hashes)
    (file,) = checkpoint.files
    infos = checkpoint.schema.tensors
    literals = {
        piece.offset: file.source.read(piece.offset, piece.size)
        for piece in file.pieces
        if piece.tensor is None or (infos[piece.tensor].inline and not piece.checksum)
    }

    def share(stored: dict[int, Stored], **more: object) -> Shard:
        return Shard(
            file.format,
            file.source.size,
            file.pieces,
            literals,
            checkpoint.schema,
            checkpoint.step,
            stored,
            **more,  # type: ignore[arg-type]
        )

    if ticket.base is not None and len(known) == len(hashes):
        return share(known)

    def encode(attempt: Attempt) -> Shard:
        encoder = _ShardEncoder(catalog, cache, attempt, ticket, checkpoint, dict(hashes), memory)
        return encoder.encode_shard(share)

    first = Attempt.first(ticket.spec, keyframe=ticket.keyframe, patched=ticket.patched)
    return within_bounds(first, encode)


def _known(
    catalog: Catalog, ticket: ShardPlan, checkpoint: Checkpoint, hashes: dict[int, bytes]
) -> dict[int, Stored]:
    """The tensors that the ticket's base holds as they are, exactly if that is asked for."""
    assert ticket.base is not None
    base = catalog.commit(ticket.base)
    schema, reports = catalog.schema(base.schema), catalog.errors(ticket.base)
    tensors = _base_tensors(catalog, base, schema)
    stored: dict[int, Stored] = {}
    for number, value in hashes.items():
        info = checkpoint.schema.tensors[number]
        there = tensors.get(info.name)
        if there is None or there.exact != value:
            return {}
        known = schema.tensors[there.number]
        if (known.part, known.dtype, known.shape) != (info.part, info.dtype, info.shape):
            return {}
        values, position = there.state.values, there.position
        proof = None if there.state.exact is None else (there.state.exact, position)
        report = reports.get(there.number)
        stored[number] = Stored(
            there.near,
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
    """A stored tensor of the base commit: its number in the schema, its position in the tables of
    its part, and the hashes of its near and exact values.
    """

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
        if state.exact is not None and not _is_there(catalog, state.exact):
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


def _is_there(catalog: Catalog, exact: ObjectId) -> bool:
    return catalog.has_recipe(exact) and not catalog.is_fading(exact)


def _errors(checkpoint: Checkpoint, number: int, report: ErrorReport | None) -> Errors | None:
    """The sums that a known report of a weight stands for."""
    info, tensor = checkpoint.schema.tensors[number], SourceTensor(checkpoint, number)
    if info.role != WEIGHT:
        return None
    slices = range(len(slice_counts(info.words)))
    energy = sum(energy_of(to_float32(tensor.slice(n), float_type(info.dtype))) for n in slices)
    error = 0.0 if report is None else report.weight_rel**2 * energy
    return Errors(error, energy, largest=0.0 if report is None else report.max_abs)


class _ShardEncoder(Encoder):
    """Encodes one shard; its base in memory is of the tensors of its own process."""

    def __init__(
        self,
        catalog: Catalog,
        cache: Path,
        attempt: Attempt,
        ticket: ShardPlan,
        checkpoint: Checkpoint,
        hashes: dict[int, bytes],
        memory: MemoryBase,
    ) -> None:
        base = None if ticket.base is None else catalog.commit(ticket.base)
        if base is not None and "model" in base.parts:
            schema, values = catalog.schema(base.schema), base.parts["model"].values
            names = [schema.tensors[number].name for number in schema.stored("model")]
            if catalog.has_recipe(values):
                hashes_there = catalog.all_values(values, len(names))
                memory.adopt(values, dict(zip(names, hashes_there, strict=True)))
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
        self._known = set()  # its tables are those of all processes together
        self._own = memory
        self._patches = {
            name: PatchWriter(lambda: catalog.store.new_pack("packs"), joined=True)
            for name in PARTS
        }

    def encode_shard(self, share: Callable[..., Shard]) -> Shard:
        """Store the tensors; `share` makes a shard of where they are.

        Raises:
            InvalidInputError, TooFar, TooCoarse: as in `encode`.
        """
        return self._coded(lambda: self._share(share))

    def _share(self, share: Callable[..., Shard]) -> Shard:
        stored: dict[int, Stored] = {}
        loose: list[PackId] = []
        for name, row in self._numbers.items():
            places = self._finish_frames(name, row)
            patches = self._loose(name, row, loose)
            for number, place in zip(row, places, strict=True):
                stored[number] = Stored(
                    self._values[number],
                    self._hashes[number],
                    *place,
                    self._depths[self._twin_of.get(number, number)],
                    patches.get(number),
                    self._errors.get(number),
                )
        model = self._numbers["model"]
        self._own.keep({self._infos[number].name: self._values[number] for number in model})
        return share(
            stored, data_bytes=self._data_bytes, nonfinite=self._nonfinite, loose=tuple(loose)
        )

    def _loose(
        self, name: str, row: list[int], loose: list[PackId]
    ) -> dict[int, tuple[ObjectId, int]]:
        """Write the patches of a part, to be joined: the frame of each tensor that is not exact."""
        lossy = [n for n in row if self._values[n] != self._hashes[n]]
        if not self._patched or not lossy:
            return {}
        writer = self._patches[name]
        frames = [writer.frame(self._twin_of.get(n, n), self._infos[n], None, 0) for n in lossy]
        bundle, info = writer.finish_loose(frames, self._catalog.store.publish)
        loose.append(info.id)
        return {number: (bundle, frame) for frame, number in enumerate(lossy)}
