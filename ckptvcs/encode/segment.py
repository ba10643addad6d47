"""A segment of an archived line: two anchors, and the commits between them.

Point         an anchor
Row           a commit after the first anchor, up to the last: its tensors and its errors
Ends          reads the tensors of both anchors
TensorReader  reads one tensor of a commit, slice by slice, each from that of the commit before
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from ckptvcs.codec.words import Words, double_squares, to_float32
from ckptvcs.decode.base_cache import find_decoded
from ckptvcs.decode.chain import ChainReader, DecodedTable, Link
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.encode.assemble import Place
from ckptvcs.encode.group import Errors
from ckptvcs.encode.near_plan import movement_share
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit, ErrorReport
from ckptvcs.history.recipe import MAX_SHARE
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.ids import ObjectId


@dataclass(frozen=True)
class Point:
    """An anchor: the commit as it is stored now, and in its archived form."""

    name: ObjectId
    near: Commit
    form: Commit


@dataclass(eq=False)
class Row:
    """A commit of a segment: its share of the way, and the hashes and places of its archived form.

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

    def own_error(self, energy: float) -> float:
        """Return the energy of the error of the form that is read now; weights have `energy`."""
        exact = self.source.fidelity.get("model") == "exact"
        return 0.0 if exact else self.commit.error.weight_rel**2 * energy

    def changed(self, parts: Mapping[str, ObjectId]) -> dict[str, ObjectId]:
        """Return the parts that are near now and have other values in the archived form."""
        states = self.commit.parts
        return {
            part: values
            for part, values in parts.items()
            if states[part].exact is not None and values != states[part].values
        }

    def report(self, previous: Row) -> ErrorReport:
        """Return the error of the archived form against the original.

        The errors of both forms are added: their norms, which bounds the sum, or for the lag their
        energies, which is what independent errors add up to.
        """
        sums, near = self.errors, self.commit.error
        own_error = self.own_error(sums.energy)
        total = sums.error + own_error
        if near.lag:
            movement = near.weight_rel**2 * sums.energy / near.lag
        else:
            known = own_error + previous.own_error(sums.energy)
            movement = movement_share(sums.residual, known) * sums.residual
        own = near if own_error else ErrorReport()
        rel = own.weight_rel + (math.sqrt(sums.error / sums.energy) if sums.energy else 0.0)
        lag = total / movement if movement else None
        return ErrorReport(rel, lag or 0.0, lag or 0.0, 1.0, sums.largest + own.max_abs, lag)


class Ends:
    """The two anchors of a segment."""

    def __init__(self, catalog: Catalog, bases: Path, *points: Point) -> None:
        self._catalog, self._points = catalog, points
        self._decoded: dict[ObjectId, DecodedTable | None] = {}
        self._chain = ChainReader(catalog, self._decoded.get)
        schema = catalog.schema(points[0].form.schema)
        self._infos = schema.tensors
        self._positions = {n: at for part in PARTS for at, n in enumerate(schema.stored(part))}
        model = [schema.tensors[number] for number in schema.stored("model")]
        for point in points:
            state = point.form.parts.get("model")
            if state is not None and catalog.store.contains(state.values):
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

    def links(self, number: int, info: TensorInfo, end: int) -> list[Link]:
        """Return the chain of a tensor of the first (0) or last (1) anchor."""
        return self._chain.links(*self.at(number, end), info)

    def slice(self, links: list[Link], info: TensorInfo, index: int) -> Words:
        return self._chain.decode_slice(links, info, index)


class DecodedNow(DecodedTable):
    """Slices of one near table that are decoded now, for the deltas that are based on them.

    It has the tensors in `begun`: each slice is decoded before those that are based on it.
    """

    def __init__(self) -> None:
        self.words: dict[tuple[int, int], Words] = {}
        self.begun: set[int] = set()

    def has(self, tensor: int) -> bool:
        return tensor in self.begun

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        words = self.words.get((tensor, number))
        return words if words is not None and words.itemsize == word else None


class TensorReader:
    """Reads a tensor of a commit slice by slice, each from that of the commit before."""

    def __init__(
        self, now: Callable[[ObjectId], DecodedNow], source: Restorer, number: int
    ) -> None:
        """`now` returns the slices of a near table that are decoded now."""
        self._source, self._info = source, source.schema.tensors[number]
        self._place = source.place(number)
        near = source.commit.parts[self._info.part].values
        self._near = near, self._place[1]
        self._table = now(near)
        self._links = source.chain.links(*self._near, self._info)
        self._table.begun.add(self._near[1])
        is_near = self._place == self._near
        self._exact = [] if is_near else source.chain.links(*self._place, self._info)

    def slice(self, index: int) -> Words:
        chain = self._source.chain
        words = chain.decode_slice(self._links, self._info, index)
        self._table.words[self._near[1], index] = words
        return chain.decode_slice(self._exact, self._info, index) if self._exact else words

    def forget(self, index: int) -> None:
        self._table.words.pop((self._near[1], index), None)

    def end(self) -> None:
        self._table.begun.discard(self._near[1])


def shares_of(steps: list[int | None]) -> list[Fraction]:
    """Return the shares of the way from the first to the last commit, by step if steps increase."""
    known = [step for step in steps if step is not None]
    by_step = len(known) == len(steps) and all(a < b for a, b in pairwise(known))
    marks = known if by_step and known[-1] - known[0] <= MAX_SHARE else list(range(len(steps)))
    return [Fraction(mark - marks[0], marks[-1] - marks[0]) for mark in marks]


def errors_of(words: Words, made_words: Words, before: Words, dtype: str) -> Errors:
    """Return the sums of a slice: `residual` is the distance from the commit before."""
    true, made, previous = (to_float32(w, dtype) for w in (words, made_words, before))
    with np.errstate(over="ignore", invalid="ignore"):
        difference = made - true
        return Errors(
            float(double_squares(difference).sum()),
            float(double_squares(true).sum()),
            float(double_squares(true - previous).sum()),
            largest=float(np.abs(difference).max(initial=0.0)),
        )
