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
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from ckptvcs.checkpoint.roles import LOSSY, WEIGHT
from ckptvcs.codec.dtypes import can_be_lossy, float_type
from ckptvcs.codec.frame import slices_of
from ckptvcs.codec.interpolate import interpolate
from ckptvcs.codec.spec import CodecSpec, NearSpec, finer
from ckptvcs.codec.words import Words, octets
from ckptvcs.decode.base_cache import BaseWriter, RecentTables
from ckptvcs.decode.chain import DecodedTable
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.encode.assemble import recipe_of
from ckptvcs.encode.encoder import Encoder
from ckptvcs.encode.group import Errors
from ckptvcs.encode.planner import Attempt, TooCoarse, TooFar
from ckptvcs.encode.segment import DecodedNow, Ends, Point, Row, TensorReader, errors_of, shares_of
from ckptvcs.encode.stored import as_checkpoint
from ckptvcs.errors import CorruptionError
from ckptvcs.gc.archiving import ArchiveRule, Path
from ckptvcs.hashing import hasher
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import ArchivedState
from ckptvcs.history.recipe import Between, Recipe, dump_recipe, dump_values
from ckptvcs.history.records import Archived, in_form
from ckptvcs.parallel import Progress, ordered_map
from ckptvcs.store.disk import scratch_folder
from ckptvcs.store.ids import Kind, ObjectId, object_id

_TRIES = 5  # attempts to meet the bound on the lag of an anchor

ANCHOR = NearSpec(
    step=2.4,
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


class Archiver:
    """Archives paths of a repository that has no other writer."""

    def __init__(self, catalog: Catalog, rule: ArchiveRule, depth: int, progress: Progress) -> None:
        """Limit chains to `depth`: an anchor that would be deeper is stored without a base."""
        self._catalog, self._rule, self._progress = catalog, rule, progress
        self._depth = depth
        self._line: dict[ObjectId, DecodedNow] = {}

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
            self._recent, self._line = RecentTables(folder), dict[ObjectId, DecodedNow]()
            for path in paths:
                rows |= {row.commit: row for row in self._path(path, rows)}
        return [row for row in rows.values() if row.parts]

    def _now(self, values: ObjectId) -> DecodedNow:
        """Return the slices of a near table that are decoded now."""
        return self._line.setdefault(values, DecodedNow())

    # -- paths -----------------------------------------------------------------------------------

    def _path(self, path: Path, known: Mapping[ObjectId, Archived]) -> list[Archived]:
        """Archive the rows of one path, segment after segment."""
        start = self._catalog.commit(path.start)
        form = in_form(start, known[path.start]) if path.start in known else start
        anchor = self._open(Point(path.start, start, form), starts=form is start)
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
        anchor: Point,
        names: list[ObjectId],
        end: ObjectId | None,
        rest: list[ObjectId],
        done: list[Archived],
    ) -> tuple[Point, list[ObjectId]]:
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

    def _kept(self, name: ObjectId) -> Point:
        commit = self._catalog.commit(name)
        return self._open(Point(name, commit, commit), starts=True)

    def _open(self, point: Point, *, starts: bool = False) -> Point:
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
                put = stack.enter_context(self._recent.room(state.values, infos, hashes))
                base = BaseWriter(self._bases, infos) if starts and part == "model" else None
                if base is not None:
                    stack.callback(base.abort)
                for position, info in enumerate(infos):
                    for number, words in restorer.chain.slices(state.values, position, info):
                        if put is not None:
                            put(position, number, words)
                        if base is not None:
                            base.write(position, number, words)
                if base is not None:
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

    def _anchor(self, anchor: Point, name: ObjectId) -> Point | None:
        """Encode a commit against the anchor before; None if it has nothing to do with that."""
        commit = self._catalog.commit(name)
        self._open(Point(name, commit, commit))
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
            return Point(name, commit, in_form(commit, form))
        return None

    def _depth_of(self, anchor: Point) -> int:
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

    def _between(self, first: Point, names: list[ObjectId], last: Point) -> list[Archived]:
        """Return the rows of the commits after `first`, up to `last`, which may be one of them."""
        all_names = [first.name, *names, *({last.name} - {*names})]
        commits = [self._catalog.commit(name) for name in all_names]
        places = shares_of([commit.step for commit in commits])
        rows = [
            Row(name, commit, share, self._restorer(name))
            for name, commit, share in zip(all_names, commits, places, strict=True)
        ][1:]
        ends = Ends(self._catalog, self._bases, first, last)
        before = self._restorer(first.name)
        for number, info in enumerate(before.schema.tensors):
            if not info.inline and before.fidelity[info.part] != "dropped":
                self._tensor(number, ends, before, rows)
        found = [
            self._archived(row, first, last, previous)
            for previous, row in pairwise([Row(first.name, commits[0], Fraction(0), before), *rows])
        ]
        self._line.clear()
        return [row for row in found if row.commit in names]

    def _tensor(self, number: int, ends: Ends, before: Restorer, rows: list[Row]) -> None:
        """Find the hash and the place of a tensor in each row; measure the errors of weights."""
        info = before.schema.tensors[number]
        near = {row.name: row.near_place(number) for row in rows}
        one, other = (ends.value(number, end) for end in (0, 1))
        can_lose = info.role in LOSSY and can_be_lossy(info.dtype)
        moving: list[Row] = []
        for row in rows:
            value = self._catalog.value(*near[row.name])
            row.hashes[number], row.places[number] = value, self._catalog.place(*near[row.name])
            if row.share == 1:
                row.hashes[number], row.places[number] = other, ends.place(number, 1)
            elif can_lose and one in (value, other):
                row.hashes[number], row.places[number] = one, ends.place(number, 0)
            elif can_lose:
                moving.append(row)
        if info.role == WEIGHT or moving:
            self._decode(number, ends, before, rows, moving)

    def _decode(
        self, number: int, ends: Ends, before: Restorer, rows: list[Row], moving: list[Row]
    ) -> None:
        """Interpolate a tensor in the rows that are `moving`, and measure its errors in all."""
        info = before.schema.tensors[number]
        dtype = float_type(info.dtype)
        chains = [
            TensorReader(self._now, source, number)
            for source in (before, *(r.source for r in rows))
        ]
        at_ends, start = [ends.links(number, info, end) for end in (0, 1)], ends.value(number, 0)
        is_weight = info.role == WEIGHT
        digests = {row.name: hasher() for row in moving}
        proofs = [hasher() for _ in rows]

        def work(index: int) -> list[tuple[Words, Words | None, Errors]]:
            first, last = (ends.slice(links, info, index) for links in at_ends)
            found, previous = [], chains[0].slice(index)
            for row, chain in zip(rows, chains[1:], strict=True):
                words = chain.slice(index)
                made = last if row.share == 1 else first
                if row in moving:
                    made = interpolate(
                        first, last, row.share.numerator, row.share.denominator, dtype
                    )
                elif row.share != 1 and row.hashes[number] != start:
                    made = words
                errors = errors_of(words, made, previous, dtype) if is_weight else Errors()
                found.append((words, made if row in moving else None, errors))
                previous = words
            for chain in chains:
                chain.forget(index)
            return found

        for found in ordered_map(work, slices_of(info.words), lambda _: info.words):
            for row, proof, (words, made, errors) in zip(rows, proofs, found, strict=True):
                proof.update(octets(words))
                if made is not None:
                    digests[row.name].update(octets(made))
                row.errors.add(errors)
                self._progress(words.nbytes)
        for chain in chains:
            chain.end()
        for row, proof in zip(rows, proofs, strict=True):
            if not row.source.has_hash(number, proof):
                raise CorruptionError(f"{info.name} does not decode to its recorded hash")
        for row in moving:
            share = row.share
            row.hashes[number] = digests[row.name].digest()
            row.places[number] = Between(
                ends.at(number, 0), ends.at(number, 1), share.numerator, share.denominator
            )

    def _archived(self, row: Row, first: Point, last: Point, previous: Row) -> Archived:
        """Return the row of the record for a commit; store the tables of an interpolated one."""
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
