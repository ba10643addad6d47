"""Encoder: the tensors of a checkpoint -> frames in packs, tables of values, recipes.

    scan     hash every file and every tensor in one pass over the bytes
    reuse    what is unchanged since the base, or stands twice in the checkpoint, costs nothing
    code     the others, slice by slice: bytes into the pack of their part, decoded words into
             the materialised base, errors into sums

Nothing is held that grows with the checkpoint but a hash and a place for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptvcs.bases import BaseTensor, BaseWriter, HeldBase, HeldWriter, materialised
from ckptvcs.chain import ChainReader, Materialised
from ckptvcs.checkpoint.checkpoint import Checkpoint
from ckptvcs.checkpoint.roles import FIRST, MOMENTS, SECOND, WEIGHT, Rule
from ckptvcs.codec import loops
from ckptvcs.codec.frame import slice_counts
from ckptvcs.codec.spec import CodecSpec, ExcpSpec, NearSpec
from ckptvcs.codec.words import to_float32
from ckptvcs.coding import excp
from ckptvcs.coding.device import DeviceCoder
from ckptvcs.coding.exact import ExactCoder
from ckptvcs.coding.group import CodedGroup, Coder, Errors, Group, Target
from ckptvcs.coding.near import NearCoder, NearPlan, Scale, measure_scale
from ckptvcs.coding.report import report, report_tensors
from ckptvcs.dtypes import WEIGHT_DTYPES
from ckptvcs.frames import Draft, PartWriter
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit, ErrorReport, PartState
from ckptvcs.history.recipe import Recipe, dump_values
from ckptvcs.history.schema import TensorInfo
from ckptvcs.parallel import ordered_map
from ckptvcs.source import Progress, SourceTensor, find_masters, stays
from ckptvcs.store.object import Kind, ObjectId, object_id


@dataclass(frozen=True)
class Encoded:
    """A checkpoint whose tensors are stored durably, not yet named by any commit."""

    parts: dict[str, PartState]
    tables: dict[str, bytes]
    recipes: list[Recipe]
    depth: int
    data_bytes: int
    error: ErrorReport
    errors: dict[int, ErrorReport]


@dataclass
class _BasePart:
    """One part of the base commit: where each tensor, by name, stands in its values."""

    values: ObjectId
    hashes: list[bytes]
    positions: dict[str, tuple[int, TensorInfo]]


_Place = tuple[ObjectId | None, int]  # bundle (None: the one being written), frame


@dataclass
class _Work:
    """Tensors that a coder is at: a draft for each member, and how many slices are to come."""

    coder: Coder
    bases: dict[int, BaseTensor]
    drafts: list[Draft]
    slices: int


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
        held: HeldBase | None = None,
    ) -> None:
        """`hashes` are those that `scan` returned for the tensors of `checkpoint`; `held` keeps
        the base of the next commit in memory, which else goes into the cache.
        """
        loops.prepare(checkpoint.size_bytes)
        self._materials: dict[ObjectId, Materialised | None] = {}
        self._catalog, self._chain = catalog, ChainReader(catalog, self._materials.get)
        self._cache, self._held, self._spec = cache, held, spec
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
        near = isinstance(spec.settings, NearSpec)
        self._stay = {n for n in hashes if near and stays(checkpoint, n)}
        self._values = dict(hashes)
        self._places: dict[int, _Place] = {}
        self._twins: dict[tuple[bytes, str, str, str], int] = {}
        self._copies: dict[int, list[int]] = {}
        self._errors: dict[int, Errors] = {}
        self._depth = 0
        self._writers = {
            name: PartWriter(lambda: catalog.store.new_pack("packs")) for name in PARTS
        }
        self._masters = find_masters(checkpoint) if near else {}
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
            held = self._held if name == "model" else None
            self._materials[state.values] = materialised(
                self._cache, held, state.values, infos, hashes, change=True
            )
            parts[name] = _BasePart(state.values, hashes, positions)
        return parts

    def encode(self) -> Encoded:
        """Store the tensors of the checkpoint: durable when this returns, visible to nobody.

        Raises:
            InvalidInputError: the checkpoint changed since it was scanned.
        """
        infos = [self._infos[number] for number in self._numbers["model"]]
        self._base_writer: BaseWriter | HeldWriter
        if self._held is None:
            self._base_writer = BaseWriter(self._cache, [info.size_bytes for info in infos])
        else:
            self._base_writer = self._held.writer(infos)
        try:
            jobs = (
                (work, number)
                for work in map(self._begin, self._coders())
                for number in range(work.slices)
            )
            for work, number, coded in ordered_map(_code, jobs):
                self._put(work, number, coded)
                del coded  # not to be held while the next one is waited for
            return self._finish()
        finally:
            self._base_writer.abort()
            for writer in self._writers.values():
                writer.abort()

    def _table(self, row: list[int]) -> bytes:
        """The table of the values that were asked for."""
        return dump_values([self._hashes[number] for number in row])

    # -- what belongs together -----------------------------------------------------------------

    def _groups(self) -> list[list[int]]:
        """Stored tensors: a weight with its moments; moments of an unknown weight; others alone.

        Groups come in the order of their first tensor in the files.
        """
        groups: dict[object, list[int]] = {}
        for number, info in enumerate(self._infos):
            if info.inline:
                continue
            key: object = self._masters.get(number, number)
            if info.role in MOMENTS:
                # Moments of one parameter have all of their names but the last step in common.
                weight = info.pair
                alone = weight is None or self._infos[weight].inline
                key = (info.name.rpartition(".")[0], info.words)
                if weight is not None and not alone:
                    key = self._masters.get(weight, weight)
            groups.setdefault(key, []).append(number)
        return list(groups.values())

    def _base_of(self, number: int) -> tuple[_BasePart, int] | None:
        """Where the base has a tensor of the same name, type and shape."""
        info = self._infos[number]
        part = self._base_parts.get(info.part)
        position, known = part.positions.get(info.name, (0, None)) if part else (0, None)
        if part is None or known is None or (known.dtype, known.shape) != (info.dtype, info.shape):
            return None
        return part, position

    def _base_tensor(self, number: int) -> BaseTensor | None:
        """What a tensor can be coded against, not yet proven."""
        found = self._base_of(number)
        if found is None:
            return None
        return BaseTensor(self._chain, found[0].values, found[1], self._infos[number])

    def _left(self, group: list[int]) -> list[int]:
        """The tensors of a group that are not stored yet."""
        left = []
        for number in group:
            if self._infos[number].part in self._known:
                self._progress(self._infos[number].size_bytes)
            elif not self._reuse(number):
                left.append(number)
        return left

    # -- reuse ---------------------------------------------------------------------------------

    def _reuse(self, number: int) -> bool:
        """Take over a frame that holds this tensor's value, or will."""
        info, value = self._infos[number], self._hashes[number]
        # Not across parts, which are dropped one by one; nor roles, which are coded apart.
        twin = self._twins.setdefault((value, info.dtype, info.part, info.role), number)
        if twin != number:
            self._copies.setdefault(twin, []).append(number)
            if twin in self._places:
                self._skip(number)
            else:
                self._progress(info.size_bytes)
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
        if info.part == "model":
            source = SourceTensor(self._checkpoint, number)
            errors = Errors()
            for index in range(len(slice_counts(info.words))):
                words = source.slice(index)
                self._base_writer.write(self._position[number], index, words, fresh=False)
                if info.role == WEIGHT:
                    errors.add(Errors(energy=_energy(to_float32(words, info.dtype))))
            if info.role == WEIGHT:
                self._errors[number] = errors
        self._progress(info.size_bytes)

    # -- who codes what ------------------------------------------------------------------------

    def _target(self, number: int) -> Target:
        info = self._infos[number]
        source = SourceTensor(self._checkpoint, number)
        return Target(number, source, info.dtype, info.shape, info.role)

    def _coders(self) -> Iterator[tuple[Coder, dict[int, BaseTensor]]]:
        """Coders for all that is not stored yet, with the bases of their members."""
        settings = self._spec.settings
        rows = [(group, self._left(group)) for group in self._groups()]
        if isinstance(settings, NearSpec):
            yield from self._near_coders([left for _, left in rows if left], settings)
            return
        for group, left in rows:
            if left and isinstance(settings, ExcpSpec) and not self._keyframe:
                found = self._excp_coder(left, group, settings)
                if found is not None:
                    yield found
                    left = [n for n in left if all(n != m.number for m in found[0].members)]
            for number in left:
                yield self._exact_coder(number)

    def _exact_coder(self, number: int) -> tuple[Coder, dict[int, BaseTensor]]:
        base = None if self._keyframe else self._base_tensor(number)
        if base is not None:
            base.prove()
        return ExactCoder(self._target(number), base), {} if base is None else {number: base}

    def _near_coders(
        self, rows: list[list[int]], spec: NearSpec
    ) -> Iterator[tuple[Coder, dict[int, BaseTensor]]]:
        groups: list[Group] = []
        for left in rows:
            lossy = [n for n in left if self._infos[n].role in MOMENTS | {WEIGHT}
                     and self._infos[n].dtype in WEIGHT_DTYPES]  # fmt: skip
            if lossy:
                groups.append(self._near_group(lossy))
            for number in left:
                if number not in lossy:
                    yield self._exact_coder(number)
        weights = [group for group in groups if group.weight is not None]
        scales = dict(zip(map(id, weights), ordered_map(_scale, weights), strict=True))
        plan = NearPlan.of(spec, scales.values())
        for group in groups:
            base = group.base if isinstance(group.base, BaseTensor) else None
            bases = {} if group.weight is None or base is None else {group.weight.number: base}
            here = NearCoder(group, plan, scales.get(id(group)), keyframe=self._keyframe)
            there = not self._keyframe and DeviceCoder.can(group)
            yield DeviceCoder(here, group) if there else here, {} if self._keyframe else bases

    def _near_group(self, lossy: list[int]) -> Group:
        copies = tuple(self._target(n) for n in lossy if self._masters.get(n) in lossy)
        own = [number for number in lossy if self._masters.get(number) not in lossy]
        targets = {self._infos[number].role: self._target(number) for number in own}
        weight = targets.pop(WEIGHT, None)
        second = next((targets[role] for role in targets if role in SECOND), None)
        first = next(
            (target for role, target in targets.items() if role in FIRST
             and (second is None or (FIRST[role], target.dtype) == (second.role, second.dtype))),
            None,
        )  # fmt: skip
        others = tuple(t for t in targets.values() if t is not first and t is not second)
        base = None if weight is None else self._base_tensor(weight.number)
        moments = [number for number in lossy if self._infos[number].role != WEIGHT]
        rules = self._checkpoint.rules
        rule = next((rules[number] for number in moments if number in rules), Rule())
        words = self._infos[lossy[0]].words
        return Group(words, weight, base, first, second, others, copies, rule)

    def _excp_coder(
        self, left: list[int], group: list[int], spec: ExcpSpec
    ) -> tuple[Coder, dict[int, BaseTensor]] | None:
        """ExCP for a weight and its moments; None where all has to be coded exactly."""
        roles = {self._infos[number].role: number for number in left}
        weight = roles.get(WEIGHT)
        base = None if weight is None else self._base_tensor(weight)
        paired = any(self._infos[number].role == WEIGHT for number in group)
        if paired and base is None:
            return None  # the weight is new or did not move: its moments have no mask
        if any(self._infos[number].dtype not in WEIGHT_DTYPES for number in left):
            return None
        if base is not None:
            base.prove()
        # A first moment without its second, or the other way round, belongs to an optimizer
        # whose rules ExCP does not know.
        pair = roles.get("exp_avg"), roles.get("exp_avg_sq")
        first, second = pair if None not in pair else (None, None)
        if weight is None and first is None:
            return None
        tensors = Group(
            self._infos[left[0]].words,
            None if weight is None else self._target(weight), base,
            None if first is None else self._target(first),
            None if second is None else self._target(second),
        )  # fmt: skip
        fitted = excp.plan(tensors, spec)
        if fitted is None:
            return None
        bases = {} if weight is None or base is None else {weight: base}
        return excp.ExcpCoder(tensors, fitted), bases

    # -- coding --------------------------------------------------------------------------------

    def _begin(self, found: tuple[Coder, dict[int, BaseTensor]]) -> _Work:
        coder, bases = found
        drafts: list[Draft] = []
        for index, target in enumerate(coder.members):
            base = bases.get(target.number)
            draft = self._writers[self._infos[target.number].part].begin(
                base, steady=SourceTensor(self._checkpoint, target.number).steady
            )
            if index in coder.companions:
                draft.companion = drafts[coder.companions[index]].number
            self._places[target.number] = (None, draft.number)
            drafts.append(draft)
        words = self._infos[coder.members[0].number].words
        work = _Work(coder, bases, drafts, len(slice_counts(words)))
        if not work.slices:
            self._end(work)
        return work

    def _put(self, work: _Work, index: int, coded: CodedGroup) -> None:
        for target, draft, part, errors in zip(
            work.coder.members, work.drafts, coded.slices, coded.errors, strict=True
        ):
            info = self._infos[target.number]
            self._writers[info.part].append(draft, part)
            if info.part == "model":
                for number in (target.number, *self._copies.get(target.number, ())):
                    self._base_writer.write(
                        self._position[number], index, part.decoded,
                        fresh=part.decoded is not part.source,
                    )  # fmt: skip
            self._errors.setdefault(target.number, Errors()).add(errors)
            self._progress(part.decoded.nbytes)
        if index + 1 == work.slices:
            self._end(work)

    def _end(self, work: _Work) -> None:
        for target, draft in zip(work.coder.members, work.drafts, strict=True):
            self._values[target.number] = draft.digest.digest()
            if draft.exact and target.number in self._stay:
                self._hashes[target.number] = self._values[target.number]
            read = draft.source or (draft.digest if draft.exact else None)
            if read is not None and read.digest() != self._hashes[target.number]:
                raise SourceTensor(self._checkpoint, target.number).changed()
            if draft.stands_on_base and draft.base is not None:
                self._depth = max(self._depth, draft.base.depth + 1)

    # -- the end -------------------------------------------------------------------------------

    def _finish(self) -> Encoded:
        self._checkpoint.check_unchanged()
        for twin, copies in self._copies.items():
            for number in copies:
                if twin in self._places:  # else its part is stored already, with all its tensors
                    self._places[number] = self._places[twin]
                self._values[number] = self._values[twin]
                if number in self._stay:
                    self._hashes[number] = self._hashes[twin]
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
        lossy = self._spec.settings is not None
        return Encoded(
            parts, tables, recipes, self._depth, data_bytes, report(self._errors, self._infos),
            report_tensors(self._errors, self._infos) if lossy else {},
        )  # fmt: skip

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


def _code(job: tuple[_Work, int]) -> tuple[_Work, int, CodedGroup]:
    work, number = job
    return work, number, work.coder.code(number)


def _energy(values: NDArray[np.float32]) -> float:
    total = float(np.square(values, dtype=np.float64).sum())
    return total if np.isfinite(total) else 0.0


def _scale(group: Group) -> Scale:
    if isinstance(group.base, BaseTensor):
        group.base.prove()
    return measure_scale(group)
