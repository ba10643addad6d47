"""Archive commits: code some as anchors, and interpolate the commits between them.

    N N N N N N N N N        the near form of each commit, based on the one before
    A       A       A        anchors, based on the anchor before, in closed loop
      -> ->   -> ->          interpolated by step; such a commit has no frames of its own

Quantization steps of an anchor are multiples of the movement since the anchor before.  First
moments are dropped: their effect on a run that goes on is gone after a few steps.  A tensor that is
not coded with loss keeps its frame.  Layout: docs/format.md, "Records" and "Recipe".
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path as FilePath

import numpy as np

from ckptvcs.checkpoint.roles import LOSSY, WEIGHT
from ckptvcs.codec.dtypes import can_be_lossy, float_type
from ckptvcs.codec.frame import slices_of
from ckptvcs.codec.interpolate import interpolate
from ckptvcs.codec.spec import CodecSpec, NearSpec, finer
from ckptvcs.codec.words import Floats, Words, double_squares, octets, to_float32
from ckptvcs.decode.base_cache import BaseWriter, RecentTables, find_decoded
from ckptvcs.decode.chain import ChainReader, DecodedTable
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.encode.assemble import Place, recipe_of
from ckptvcs.encode.encoder import Encoder
from ckptvcs.encode.group import Errors
from ckptvcs.encode.near_plan import movement_share
from ckptvcs.encode.planner import Attempt, TooCoarse, TooFar
from ckptvcs.encode.stored import as_checkpoint
from ckptvcs.errors import CorruptionError
from ckptvcs.gc.archiving import ArchiveRule, Path
from ckptvcs.hashing import hasher
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, ArchivedState, Commit, ErrorReport
from ckptvcs.history.recipe import MAX_SHARE, Between, Recipe, dump_recipe, dump_values
from ckptvcs.history.records import Archived, in_form
from ckptvcs.history.schema import TensorInfo
from ckptvcs.parallel import Progress, ordered_map
from ckptvcs.store.disk import scratch_folder
from ckptvcs.store.ids import Kind, ObjectId, object_id

_TRIES = 5  # attempts to meet the bound on the lag of an anchor

ANCHOR = NearSpec(
    step=2.1,
    rank=0,
    momentum_rank=0,
    moment_step=1e9,
    momentum_step=1e9,
    max_weight_error=0.0,
    max_update_nmse=math.inf,
)
"""The settings of anchors: weights and second moments as near, first moments dropped."""

ARCHIVE_FLAGS = ("archive", "near", "near-2", "sparse", "types")
"""The features that a reader of archived commits must know."""


@dataclass(frozen=True)
class _Point:
    """An anchor: the commit as it is stored now, and in its archived form."""

    name: ObjectId
    near: Commit
    form: Commit


class Archiver:
    """Archives paths of a repository that has no other writer."""

    def __init__(self, catalog: Catalog, rule: ArchiveRule, depth: int, progress: Progress) -> None:
        """Limit chains to `depth`: an anchor that would be deeper is stored without a base."""
        self._catalog, self._rule, self._progress = catalog, rule, progress
        self._depth = depth
        self._line: dict[ObjectId, _Now] = {}

    def run(self, paths: Sequence[Path]) -> list[Archived]:
        """Store the archived forms of paths, ancestors first; return the rows for their record.

        Nothing refers to the new objects until the record is written.

        Raises:
            CorruptionError: a tensor does not decode to its hash.
            StorageError: the disk is full; nothing has changed.
        """
        rows: dict[ObjectId, Archived] = {}
        with scratch_folder("ckpt-archive-") as folder:
            self._bases = folder / "bases"
            self._recent, self._line = RecentTables(folder), dict[ObjectId, _Now]()
            for path in paths:
                rows |= {row.commit: row for row in self._path(path, rows)}
        return [row for row in rows.values() if row.parts]

    def now(self, values: ObjectId) -> _Now:
        """Return the slices of a near table that are decoded now."""
        return self._line.setdefault(values, _Now())

    # -- paths -----------------------------------------------------------------------------------

    def _path(self, path: Path, known: Mapping[ObjectId, Archived]) -> list[Archived]:
        """Archive the rows of one path, segment after segment."""
        start = self._catalog.commit(path.start)
        form = in_form(start, known[path.start]) if path.start in known else start
        anchor = self._open(_Point(path.start, start, form), starts=form is start)
        done: list[Archived] = []
        rest, every = list(path.rows), self._rule.every
        while rest:
            count = min(every, len(rest))
            if count < every and not (path.is_whole or path.end):
                break
            end = None if count == every or path.is_whole else path.end
            anchor, rest = self._segment(anchor, rest[:count], end, rest[count:], done)
        return done

    def _segment(
        self,
        anchor: _Point,
        names: list[ObjectId],
        end: ObjectId | None,
        rest: list[ObjectId],
        done: list[Archived],
    ) -> tuple[_Point, list[ObjectId]]:
        """Archive the next commits, as many as the bound on their lag allows.

        The last one becomes an anchor, unless `end` serves as one.  Return the next anchor, and the
        commits that are left.
        """
        while True:
            point = self._anchor(anchor, names[-1]) if end is None else self._kept(end)
            rows = [] if point is None else self._between(anchor, names, point)
            lags = [row.error.lag or 0.0 for row in rows]
            if point is not None and max(lags) <= self._rule.lag_bound:
                done += rows
                return point, rest
            if len(names) == 1 and end is None:
                return self._kept(names[0]), rest  # it stays near, and the line begins again there
            worst = lags.index(max(lags)) if lags else 0
            keep = max(1, min(worst + 1, len(names) - (end is None)))
            names, rest, end = names[:keep], names[keep:] + rest, None

    def _kept(self, name: ObjectId) -> _Point:
        commit = self._catalog.commit(name)
        return self._open(_Point(name, commit, commit), starts=True)

    def _open(self, point: _Point, *, starts: bool = False) -> _Point:
        """Decode and verify a commit; the deltas of the next ones are based on it.

        If a line `starts` there, the first anchor is too: its weights are decoded once.
        """
        restorer = self._restorer(point.name)
        for part, state in point.near.parts.items():
            row = restorer.schema.stored(part)
            if not row or restorer.fidelity[part] == "dropped":
                continue
            infos = [restorer.schema.tensors[number] for number in row]
            hashes = self._catalog.all_values(state.values, len(row))
            with ExitStack() as stack:
                takers = [stack.enter_context(self._recent.room(state.values, infos, hashes))]
                if starts and part == "model":
                    base = BaseWriter(self._bases, infos)
                    stack.callback(base.abort)
                    takers.append(base.write)
                for position, info in enumerate(infos):
                    for number, words in restorer.chain.slices(state.values, position, info):
                        for put in filter(None, takers):
                            put(position, number, words)
                if len(takers) > 1:
                    base.finish(state.values)
            table = restorer.place(row[0])[0]
            if table != state.values:  # the exact form
                for position, info in enumerate(infos):
                    deque(restorer.chain.slices(table, position, info), 0)
        return point

    def _restorer(self, name: ObjectId) -> Restorer:
        return Restorer(self._catalog, name, decoded=self._table)

    def _table(self, values: ObjectId) -> DecodedTable | None:
        return self._line.get(values) or self._recent.get(values)

    # -- anchors ---------------------------------------------------------------------------------

    def _anchor(self, anchor: _Point, name: ObjectId) -> _Point | None:
        """Encode a commit against the anchor before; None if it has nothing to do with that."""
        commit = self._catalog.commit(name)
        self._open(_Point(name, commit, commit))
        source = self._restorer(name)
        checkpoint = as_checkpoint(source)
        infos = checkpoint.schema.tensors
        numbers = [number for number, info in enumerate(infos) if not info.inline]
        hashes = {number: self._catalog.value(*source.place(number)) for number in numbers}
        is_full = self._depth_of(anchor) >= self._depth
        attempt = Attempt.first(CodecSpec("near", ANCHOR), keyframe=is_full, patched=False)
        for _ in range(_TRIES):
            encoder = Encoder(
                self._catalog,
                self._bases,
                attempt,
                anchor.form,
                checkpoint,
                hashes,
                progress=self._progress,
                joined=True,
            )
            try:
                encoded = encoder.encode()
            except TooFar:
                return None
            except TooCoarse as error:
                attempt = replace(attempt, spec=finer(attempt.spec, error.excess))
                continue
            self._publish(list(encoded.tables.values()), encoded.recipes)
            parts = {part: state.values for part, state in encoded.parts.items()}
            form = Archived(name, parts, encoded.error, encoded.data_bytes)
            return _Point(name, commit, in_form(commit, form))
        return None

    def _depth_of(self, anchor: _Point) -> int:
        """Return the largest depth of the tensors of an anchor."""
        restorer = self._restorer(anchor.name)
        return max(
            (
                self._catalog.depth(state.values, position)
                for part, state in anchor.form.parts.items()
                if restorer.fidelity[part] != "dropped"
                for position in range(len(restorer.schema.stored(part)))
            ),
            default=0,
        )

    def _publish(self, tables: Iterable[bytes], recipes: Iterable[Recipe]) -> None:
        pack = self._catalog.store.new_pack("meta")
        try:
            for table in tables:
                if not self._catalog.store.contains(object_id(Kind.VALUES, table)):
                    pack.add(Kind.VALUES, table)
            for recipe in recipes:
                pack.add(Kind.RECIPE, dump_recipe(recipe))
            if pack.entries:
                self._catalog.store.publish(pack)
        finally:
            pack.abort()
        self._catalog.forget_recipes()

    # -- between anchors -------------------------------------------------------------------------

    def _between(self, first: _Point, names: list[ObjectId], last: _Point) -> list[Archived]:
        """Return the rows of the commits after `first`, up to `last`, which may be one of them."""
        all_names = [first.name, *names, *({last.name} - {*names})]
        commits = [self._catalog.commit(name) for name in all_names]
        places = _places([commit.step for commit in commits])
        rows = [
            _Row(name, commit, share, self._restorer(name))
            for name, commit, share in zip(all_names, commits, places, strict=True)
        ][1:]
        ends = _Ends(self._catalog, self._bases, first, last)
        before = self._restorer(first.name)
        for number, info in enumerate(before.schema.tensors):
            if not info.inline and before.fidelity[info.part] != "dropped":
                self._tensor(number, ends, before, rows)
        found = [
            self._archived(row, first, last, previous)
            for previous, row in pairwise(
                [_Row(first.name, commits[0], Fraction(0), before), *rows]
            )
        ]
        self._line.clear()
        return [row for row in found if row.commit in names]

    def _tensor(self, number: int, ends: _Ends, before: Restorer, rows: list[_Row]) -> None:
        """Find the hash and the place of a tensor in each row; measure the errors of weights."""
        info = before.schema.tensors[number]
        near = {row.name: row.near_place(number) for row in (rows)}
        one, other = (ends.value(number, end) for end in (0, 1))
        can_lose = info.role in LOSSY and can_be_lossy(info.dtype)
        moving: list[_Row] = []
        for row in rows:
            value = self._catalog.value(*near[row.name])
            row.hashes[number], row.places[number] = value, self._catalog.place(*near[row.name])
            if row.share == 1:
                row.hashes[number], row.places[number] = other, ends.place(number, 1)
            elif can_lose and (one in (value, other)):
                row.hashes[number], row.places[number] = one, ends.place(number, 0)
            elif can_lose:
                moving.append(row)
        if info.role == WEIGHT or moving:
            self._decode(number, ends, before, rows, moving)

    def _decode(
        self, number: int, ends: _Ends, before: Restorer, rows: list[_Row], moving: list[_Row]
    ) -> None:
        """Interpolate a tensor in the rows that are `moving`, and measure its errors in all."""
        info = before.schema.tensors[number]
        dtype = float_type(info.dtype)
        chains = [_Chain(self, source, number) for source in (before, *(r.source for r in rows))]
        digests = {row.name: hasher() for row in moving}
        proofs = [hasher() for _ in rows]

        def work(index: int) -> list[tuple[Words, Words | None, Errors]]:
            first, last = (ends.slice(number, info, index, end) for end in (0, 1))
            found, previous = [], None
            for row, chain in zip([None, *rows], chains, strict=True):
                words = chain.slice(index)
                values = to_float32(words, dtype)
                if row is not None and previous is not None:
                    made = last if row.share == 1 else first
                    if row in moving:
                        part, whole = row.share.numerator, row.share.denominator
                        made = interpolate(first, last, part, whole, dtype)
                    elif row.share != 1 and row.hashes[number] != ends.value(number, 0):
                        made = words
                    errors = _errors(values, to_float32(made, dtype), previous)
                    found.append((words, made if row in moving else None, errors))
                previous = values
            for chain in chains:
                chain.forget(index)
            return found

        for found in ordered_map(work, slices_of(info.words), lambda _: info.words):
            for row, proof, (words, made, errors) in zip(rows, proofs, found, strict=True):
                proof.update(octets(words))
                if made is not None:
                    digests[row.name].update(octets(made))
                if info.role == WEIGHT:
                    row.errors.add(errors)
                self._progress(words.nbytes)
        for row, proof in zip(rows, proofs, strict=True):
            if not row.source.has_hash(number, proof):
                raise CorruptionError(f"{info.name} does not decode to its recorded hash")
        for row in moving:
            share = row.share
            row.hashes[number] = digests[row.name].digest()
            row.places[number] = Between(
                ends.at(number, 0), ends.at(number, 1), share.numerator, share.denominator
            )

    def _archived(self, row: _Row, first: _Point, last: _Point, previous: _Row) -> Archived:
        """Return the row of the record for a commit, and store its tables if it is no anchor."""
        error = row.report(previous)
        if row.name == last.name:
            parts = {
                part: state.values
                for part, state in last.form.parts.items()
                if isinstance(state, ArchivedState)
            }
            return Archived(row.name, row.changed(parts), error, last.form.data_bytes)
        parts = {}
        for part, state in row.commit.parts.items():
            numbers = row.source.schema.stored(part)
            if state.exact is None or not row.hashes.keys() >= set(numbers):
                continue
            table = dump_values([row.hashes[number] for number in numbers])
            values = parts[part] = object_id(Kind.VALUES, table)
            if not self._catalog.has_recipe(values, patches=False):
                places = [row.places[number] for number in numbers]
                recipe = recipe_of(self._catalog, values, places, None)
                self._publish([table], [recipe])
        return Archived(row.name, row.changed(parts), error, 0, (first.name, last.name))


@dataclass(eq=False)
class _Row:
    """A commit of a segment: its share of the way, and what is known of its archived form.

    `errors` are those of the archived form against the form that is read now; `residual` there is
    the distance from the commit before.
    """

    name: ObjectId
    commit: Commit
    share: Fraction
    source: Restorer
    hashes: dict[int, bytes] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)
    errors: Errors = field(default_factory=Errors)

    def near_place(self, number: int) -> tuple[ObjectId, int]:
        """Return the hash table of the near form of a tensor, and its position there."""
        _, position = self.source.place(number)
        return self.commit.parts[self.source.schema.tensors[number].part].values, position

    @property
    def own_error(self) -> float:
        """The energy of the error of the form that is read now."""
        exact = self.source.fidelity.get("model") == "exact"
        return 0.0 if exact else self.commit.error.weight_rel**2 * self.errors.energy

    def changed(self, parts: Mapping[str, ObjectId]) -> dict[str, ObjectId]:
        """Return the parts that are near now and have other values in the archived form."""
        states = self.commit.parts
        return {
            part: values
            for part, values in parts.items()
            if states[part].exact is not None and values != states[part].values
        }

    def report(self, previous: _Row) -> ErrorReport:
        """Return the error of the archived form against the original.

        The errors of both forms are added: their norms, which bounds the sum, or for the lag their
        energies, which is what independent errors add up to.
        """
        sums, near = self.errors, self.commit.error
        total = sums.error + self.own_error
        if near.lag:
            movement = near.weight_rel**2 * sums.energy / near.lag
        else:
            known = self.own_error + previous.commit.error.weight_rel**2 * sums.energy
            movement = movement_share(sums.residual, known) * sums.residual
        own = near if self.own_error else ErrorReport()
        rel = own.weight_rel + (math.sqrt(sums.error / sums.energy) if sums.energy else 0.0)
        lag = total / movement if movement else None
        return ErrorReport(rel, lag or 0.0, lag or 0.0, 1.0, sums.largest + own.max_abs, lag)


class _Ends:
    """The two anchors of a segment."""

    def __init__(self, catalog: Catalog, bases: FilePath, *points: _Point) -> None:
        self._catalog, self._points = catalog, points
        self._decoded: dict[ObjectId, DecodedTable | None] = {}
        self._chain = ChainReader(catalog, self._decoded.get)
        schema = catalog.schema(points[0].form.schema)
        self._infos = schema.tensors
        self._positions = {n: at for part in PARTS for at, n in enumerate(schema.stored(part))}
        model = [schema.tensors[number] for number in schema.stored("model")]
        for point in points:
            state = point.form.parts.get("model")
            if state is not None:
                found = find_decoded(catalog, bases, None, state.values, model)
                self._decoded[state.values] = found

    def at(self, number: int, end: int) -> tuple[ObjectId, int]:
        """Return a tensor of the first (0) or last (1) anchor: its hash table and position."""
        part = self._infos[number].part
        return self._points[end].form.parts[part].values, self._positions[number]

    def value(self, number: int, end: int) -> bytes:
        return self._catalog.value(*self.at(number, end))

    def place(self, number: int, end: int) -> Place:
        return self._catalog.place(*self.at(number, end))

    def slice(self, number: int, info: TensorInfo, index: int, end: int) -> Words:
        links = self._chain.links(*self.at(number, end), info)
        return self._chain.decode_slice(links, info, index)


class _Now(DecodedTable):
    """Slices of one near table that are decoded now, for the deltas that are based on them."""

    def __init__(self) -> None:
        self.words: dict[tuple[int, int], Words] = {}

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        words = self.words.get((tensor, number))
        return words if words is not None and words.itemsize == word else None


class _Chain:
    """Reads a tensor of a commit slice by slice, each from that of the commit before."""

    def __init__(self, archiver: Archiver, source: Restorer, number: int) -> None:
        self._source, self._info = source, source.schema.tensors[number]
        self._place = source.place(number)
        near = source.commit.parts[self._info.part].values
        self._near = near, self._place[1]
        self._table = archiver.now(near)
        self._links = source.chain.links(*self._near, self._info)
        is_near = self._place == self._near
        self._exact = [] if is_near else source.chain.links(*self._place, self._info)

    def slice(self, index: int) -> Words:
        chain = self._source.chain
        words = chain.decode_slice(self._links, self._info, index)
        self._table.words[self._near[1], index] = words
        return chain.decode_slice(self._exact, self._info, index) if self._exact else words

    def forget(self, index: int) -> None:
        self._table.words.pop((self._near[1], index), None)


def _places(steps: list[int | None]) -> list[Fraction]:
    """Return the shares of the way from the first to the last commit, by step if steps increase."""
    known = [step for step in steps if step is not None]
    by_step = len(known) == len(steps) and all(a < b for a, b in pairwise(known))
    marks = known if by_step and known[-1] - known[0] <= MAX_SHARE else list(range(len(steps)))
    return [Fraction(mark - marks[0], marks[-1] - marks[0]) for mark in marks]


def _errors(true: Floats, made: Floats, previous: Floats) -> Errors:
    """Return the sums of a slice: `residual` is the distance from the commit before."""
    with np.errstate(over="ignore", invalid="ignore"):
        difference = made - true
        return Errors(
            float(double_squares(difference).sum()),
            float(double_squares(true).sum()),
            float(double_squares(true - previous).sum()),
            largest=float(np.abs(difference).max(initial=0.0)),
        )
