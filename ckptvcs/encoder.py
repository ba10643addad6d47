"""Encoder: the tensors of a checkpoint -> frames in packs, tables of values, recipes.

    scan     hash every file and every tensor in one pass over the bytes
    reuse    what is unchanged since the base, or stands twice in the checkpoint, costs nothing
    code     the others, slice by slice: bytes into the pack of their part, decoded words into
             the materialised base, errors into sums

Nothing is held that grows with the checkpoint but a hash and a place for each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from blake3 import blake3

from ckptvcs import coding
from ckptvcs.bases import Bases, BaseTensor, BaseWriter
from ckptvcs.chain import ChainReader
from ckptvcs.checkpoint.checkpoint import Checkpoint
from ckptvcs.checkpoint.layout import BLOCK_BYTES, FileSource, changed_while_read
from ckptvcs.checkpoint.roles import MOMENTS, WEIGHT
from ckptvcs.codec.frame import SLICE_WORDS, slice_counts
from ckptvcs.codec.spec import CodecSpec
from ckptvcs.codec.words import Words, octets, to_float32, word_type
from ckptvcs.dtypes import WEIGHT_DTYPES
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit, ErrorReport, PartState
from ckptvcs.history.recipe import Frame, Recipe, dump_bundle, dump_values, slice_hash  # fmt: skip
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.object import Kind, ObjectId, object_id
from ckptvcs.store.pack import PackInfo, PackWriter

Progress = Callable[[int], None]
"""Called with a number of bytes that have been dealt with."""


@dataclass(frozen=True)
class Encoded:
    """A checkpoint whose tensors are stored durably, not yet named by any commit."""

    parts: dict[str, PartState]
    tables: dict[str, bytes]
    recipes: list[Recipe]
    depth: int
    data_bytes: int
    error: ErrorReport


@dataclass
class _ErrorSums:
    error: float = 0.0
    weight: float = 0.0
    residual: float = 0.0

    def add(self, part: coding.SliceErrors) -> None:
        self.error += part.error
        self.weight += part.weight
        self.residual += part.residual

    def report(self) -> ErrorReport:
        return ErrorReport(
            float(np.sqrt(self.error / self.weight)) if self.weight else 0.0,
            self.error / self.residual if self.residual else 0.0,
        )


class _SourceTensor:
    """A tensor of the checkpoint, read slice by slice."""

    def __init__(self, checkpoint: Checkpoint, number: int) -> None:
        file, self._offset = checkpoint.places[number]
        self._source = checkpoint.files[file].source
        self.info = checkpoint.schema.tensors[number]

    def slice(self, number: int) -> Words:
        word = self.info.type.word
        count = slice_counts(self.info.words)[number]
        data = self._source.read(self._offset + number * SLICE_WORDS * word, count * word)
        return np.frombuffer(data, word_type(word))

    def changed(self) -> Exception:
        path = self._source.path if isinstance(self._source, FileSource) else Path(self.info.name)
        return changed_while_read(path)


@dataclass
class _Draft:
    """A frame that is being written."""

    number: int
    base: BaseTensor | None
    companion: int | None = None
    stands_on_base: bool = False
    slices: list[tuple[int, int, bytes]] = field(default_factory=list)
    digest: blake3 = field(default_factory=lambda: blake3(max_threads=1))
    source: blake3 = field(default_factory=lambda: blake3(max_threads=1))


class _PartWriter:
    """The frames of one part on their way into a pack of their own."""

    def __init__(self, new_pack: Callable[[], PackWriter]) -> None:
        self._new_pack = new_pack
        self._pack: PackWriter | None = None
        self._at = 0
        self.drafts: list[_Draft] = []

    def begin(self, base: BaseTensor | None) -> _Draft:
        draft = _Draft(len(self.drafts), base)
        self.drafts.append(draft)
        return draft

    def append(self, draft: _Draft, coded: coding.CodedSlice) -> None:
        if self._pack is None:
            self._pack = self._new_pack()
        self._pack.append_region(coded.data)
        draft.slices.append((self._at, len(coded.data), slice_hash(coded.data)))
        self._at += len(coded.data)
        draft.digest.update(octets(coded.decoded))
        if coded.decoded is not coded.source:
            draft.source.update(octets(coded.source))

    def _frame(self, draft: _Draft) -> Frame:
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


@dataclass
class _BasePart:
    """One part of the base commit: where each tensor, by name, stands in its values."""

    values: ObjectId
    hashes: list[bytes]
    positions: dict[str, tuple[int, TensorInfo]]
    bases: Bases


_Place = tuple[ObjectId | None, int]  # bundle (None: the one being written), frame


class Encoder:
    """Encodes one checkpoint against a base commit; used once."""

    def __init__(
        self,
        catalog: Catalog,
        cache: Path,
        spec: CodecSpec,
        base: Commit | None,
        checkpoint: Checkpoint,
        hashes: dict[int, bytes],
        *,
        keyframe: bool,
        progress: Progress,
    ) -> None:
        """`hashes` are those that `scan` returned for the tensors of `checkpoint`."""
        self._catalog, self._chain = catalog, ChainReader(catalog)
        self._cache, self._spec = cache, spec
        self._keyframe, self._progress = keyframe, progress
        self._base_parts = {} if base is None else self._load_base(base)
        self._checkpoint, self._hashes = checkpoint, hashes
        self._infos = checkpoint.schema.tensors
        self._numbers = {name: checkpoint.schema.stored(name) for name in PARTS}
        self._position = {
            number: position
            for row in self._numbers.values()
            for position, number in enumerate(row)
        }
        self._values = dict(hashes)
        self._places: dict[int, _Place] = {}
        self._twins: dict[tuple[bytes, str], int] = {}
        self._sums = _ErrorSums()
        self._depth = 0
        self._writers = {
            name: _PartWriter(lambda: catalog.store.new_pack("packs")) for name in PARTS
        }
        self._known = {
            name for name, row in self._numbers.items()
            if catalog.has_recipe(object_id(Kind.VALUES, self._table(row)))
        }  # fmt: skip

    def _load_base(self, base: Commit) -> dict[str, _BasePart]:
        schema = self._catalog.schema(base.schema)
        parts = {}
        for name, state in base.parts.items():
            infos = [schema.tensors[number] for number in schema.stored(name)]
            hashes = self._catalog.values(state.values)
            positions = {info.name: (position, info) for position, info in enumerate(infos)}
            bases = Bases(self._chain, self._cache, state.values, infos, hashes)
            parts[name] = _BasePart(state.values, hashes, positions, bases)
        return parts

    def encode(self) -> Encoded:
        """Store the tensors of the checkpoint: durable when this returns, visible to nobody.

        Raises:
            InvalidInputError: the checkpoint changed since it was scanned.
        """
        sizes = [self._infos[number].size_bytes for number in self._numbers["model"]]
        self._base_writer = BaseWriter(self._cache, sizes)
        try:
            for group in self._groups():
                self._encode_group(group)
            return self._finish()
        finally:
            self._base_writer.abort()
            for writer in self._writers.values():
                writer.abort()

    def _table(self, row: list[int]) -> bytes:
        """The table of the values that were asked for."""
        return dump_values([self._hashes[number] for number in row])

    # -- what belongs together -----------------------------------------------------------------

    def _groups(self) -> Iterable[list[int]]:
        """Stored tensors: a weight with its moments; moments of an unknown weight; others alone.

        Groups come in the order of their first tensor in the files.
        """
        groups: dict[object, list[int]] = {}
        for number, info in enumerate(self._infos):
            if info.inline:
                continue
            key: object = number
            if info.role in MOMENTS:
                # Moments of one parameter have all of their names but the last step in common.
                weight = info.pair
                alone = weight is None or self._infos[weight].inline
                key = info.name.rpartition(".")[0] if alone else weight
            groups.setdefault(key, []).append(number)
        return groups.values()

    def _base_of(self, number: int) -> tuple[_BasePart, int] | None:
        """Where the base has a tensor of the same name, type and shape."""
        info = self._infos[number]
        part = self._base_parts.get(info.part)
        position, known = part.positions.get(info.name, (0, None)) if part else (0, None)
        if part is None or known is None or (known.dtype, known.shape) != (info.dtype, info.shape):
            return None
        return part, position

    def _encode_group(self, group: list[int]) -> None:
        for number in group:
            if self._infos[number].part in self._known:
                self._progress(self._infos[number].size_bytes)
        left = [number for number in group if self._infos[number].part not in self._known]
        left = [number for number in left if not self._reuse(number)]
        if left and self._spec.excp is not None and not self._keyframe:
            left = self._encode_excp(left, group)
        for number in left:
            self._encode_lossless(number)

    # -- reuse ---------------------------------------------------------------------------------

    def _reuse(self, number: int) -> bool:
        """Take over a frame that holds this tensor's exact value already."""
        info, value = self._infos[number], self._hashes[number]
        twin = self._twins.setdefault((value, info.dtype), number)
        place = self._places.get(twin)
        # A frame of another part cannot be used: parts are dropped one by one.
        same_part = self._infos[twin].part == info.part
        if twin != number and same_part and place is not None and self._values[twin] == value:
            self._places[number] = place
            self._skip(number)
            return True
        found = self._base_of(number)
        if found is None:
            return False
        part, position = found
        if part.hashes[position] != value:
            return False
        bundle, frame = self._catalog.recipe(part.values).place(position)
        depth = self._chain.depth(part.values, position)
        if self._keyframe and depth:
            return False
        self._places[number] = (bundle, frame)
        self._depth = max(self._depth, depth)
        self._skip(number)
        return True

    def _skip(self, number: int) -> None:
        """Account for a tensor that needs no coding: no error, and it is a base of what follows."""
        info = self._infos[number]
        source = _SourceTensor(self._checkpoint, number)
        for index in range(len(slice_counts(info.words))):
            words = source.slice(index)
            if info.part == "model":
                self._base_writer.write(self._position[number], index, words)
            self._count_exact(info, words)
        self._progress(info.size_bytes)

    def _count_exact(self, info: TensorInfo, words: Words) -> None:
        """An exact weight has no error, but counts in the norm that errors are set against."""
        if info.role == WEIGHT and self._spec.excp is not None:
            total = float(np.square(to_float32(words, info.dtype), dtype=np.float64).sum())
            self._sums.add(coding.SliceErrors(0.0, total if np.isfinite(total) else 0.0, 0.0))

    # -- coding --------------------------------------------------------------------------------

    def _begin(self, number: int, base: BaseTensor | None) -> _Draft:
        draft = self._writers[self._infos[number].part].begin(base)
        self._places[number] = (None, draft.number)
        return draft

    def _put(self, number: int, draft: _Draft, index: int, coded: coding.CodedSlice) -> None:
        info = self._infos[number]
        self._writers[info.part].append(draft, coded)
        if info.part == "model":
            self._base_writer.write(self._position[number], index, coded.decoded)
        self._progress(coded.source.nbytes)

    def _end(self, number: int, draft: _Draft, *, near: bool = False) -> None:
        self._values[number] = draft.digest.digest()
        read = draft.source.digest() if near else self._values[number]
        if read != self._hashes[number]:
            raise _SourceTensor(self._checkpoint, number).changed()
        if draft.stands_on_base and draft.base is not None:
            self._depth = max(self._depth, draft.base.depth + 1)

    def _encode_lossless(self, number: int) -> None:
        info = self._infos[number]
        found = None if self._keyframe else self._base_of(number)
        base = found[0].bases.tensor(found[1]) if found else None
        draft = self._begin(number, base)
        source = _SourceTensor(self._checkpoint, number)
        coded = coding.code_lossless(source, base, info.type, info.words)
        for index, (part, stands_on_base) in enumerate(coded):
            draft.stands_on_base |= stands_on_base
            self._count_exact(info, part.source)
            self._put(number, draft, index, part)
        self._end(number, draft)

    def _encode_excp(self, left: list[int], group: list[int]) -> list[int]:
        """Code a weight and its moments by ExCP; what has to be coded exactly instead."""
        roles = {self._infos[number].role: number for number in left}
        weight = roles.get(WEIGHT)
        found = None if weight is None else self._base_of(weight)
        paired = any(self._infos[number].role == WEIGHT for number in group)
        if paired and (weight is None or found is None):
            return left  # the weight is new or did not move: its moments have no mask
        if any(self._infos[number].dtype not in WEIGHT_DTYPES for number in left):
            return left
        base = None if found is None else found[0].bases.tensor(found[1])
        coded = [] if weight is None else [weight]
        # A first moment without its second, or the other way round, belongs to an optimizer
        # whose rules ExCP does not know.
        shapes = {self._infos[number].shape for number in left}
        if roles.keys() >= MOMENTS and len(shapes) == 1:
            coded += [roles["exp_avg"], roles["exp_avg_sq"]]
        targets = {
            self._infos[number].role: coding.Target(
                _SourceTensor(self._checkpoint, number), self._infos[number].dtype
            )
            for number in coded
        }
        plan = None
        if coded:
            assert self._spec.excp is not None
            words = self._infos[coded[0]].words
            tensors = coding.Group(
                words, targets.get(WEIGHT), base, targets.get("exp_avg"), targets.get("exp_avg_sq")
            )
            plan = coding.plan_excp(tensors, self._spec.excp)
        if plan is None:
            return left
        drafts = [self._begin(number, base if number == weight else None) for number in coded]
        drafts[0].stands_on_base = weight is not None
        if len(drafts) > 1:
            drafts[-1].companion = drafts[-2].number
        for index, part in enumerate(coding.code_excp(tensors, plan)):
            self._sums.add(part.errors)
            for number, draft, coded_slice in zip(coded, drafts, part.slices, strict=True):
                self._put(number, draft, index, coded_slice)
        for number, draft in zip(coded, drafts, strict=True):
            self._end(number, draft, near=True)
        return [number for number in left if number not in coded]

    # -- the end -------------------------------------------------------------------------------

    def _finish(self) -> Encoded:
        self._checkpoint.check_unchanged()
        parts: dict[str, PartState] = {}
        tables: dict[str, bytes] = {}
        recipes: list[Recipe] = []
        data_bytes = 0
        for name, row in self._numbers.items():
            if not row:
                continue
            table, exact = dump_values([self._values[number] for number in row]), self._table(row)
            values = object_id(Kind.VALUES, table)
            tables[name] = table
            parts[name] = PartState(
                values, None if table == exact else object_id(Kind.VALUES, exact)
            )
            if name in self._known:
                depths = (self._chain.depth(values, position) for position in range(len(row)))
                self._depth = max(self._depth, *depths)
            # Values that can be decoded already keep their recipe: a second one could stand on
            # frames that stand on the first.
            if not self._catalog.has_recipe(values):
                bundle, size = self._writers[name].finish(self._catalog.store.publish)
                data_bytes += size
                recipes.append(self._recipe(values, row, bundle))
        if "model" in parts and "model" not in self._known:
            self._base_writer.finish(parts["model"].values)
        return Encoded(parts, tables, recipes, self._depth, data_bytes, self._sums.report())

    def _recipe(self, values: ObjectId, row: list[int], bundle: ObjectId | None) -> Recipe:
        bundles: dict[ObjectId, int] = {}
        owners, frames = [], []
        for number in row:
            owner, frame = self._places[number]
            owner = owner or bundle
            assert owner is not None
            owners.append(bundles.setdefault(owner, len(bundles)))
            frames.append(frame)
        generation = max((r.generation + 1 for _, r in self._catalog.recipes(values)), default=0)
        return Recipe(values, generation, tuple(bundles), tuple(owners), tuple(frames))


def scan(checkpoint: Checkpoint, progress: Progress) -> tuple[list[str], dict[int, bytes]]:
    """Hash every file (hex) and every stored tensor (by number) in one pass over the bytes."""
    file_hashes, hashes = [], {}
    for file in checkpoint.files:
        digest = blake3(max_threads=1)
        for piece in file.pieces:
            stored = piece.tensor is not None and not piece.checksum
            tensor = blake3(max_threads=1)
            for at in range(piece.offset, piece.offset + piece.size, BLOCK_BYTES):
                length = min(BLOCK_BYTES, piece.offset + piece.size - at)
                block = file.source.read(at, length)
                digest.update(block)
                if stored:
                    tensor.update(block)
            if stored and piece.tensor is not None:
                hashes[piece.tensor] = tensor.digest()
            progress(0)
        file_hashes.append(digest.hexdigest())
    for number in range(len(checkpoint.schema.tensors)):
        hashes.setdefault(number, blake3(b"").digest())
    return file_hashes, hashes
