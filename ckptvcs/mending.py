"""Mending refs: generations that are damaged or missing, from where their bytes can be had.

spare      the newest one lies in the cache once more
copy       another repository of the same history has them, and perhaps newer ones that are lost
evidence   else a branch is at the end of a line of commits that comes from the generation below, a
           pin is at the commit that it is named by, HEAD is where it was before
let go     only when told to: a tag is as it was before, older generations are marked as lost

Bytes count where they are sealed and fit: the generation above holds their hash, or they hold that
of the one below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from ckptvcs.errors import CkptError
from ckptvcs.history.canonical import now
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.refs import HEAD, Generation, Refs, follows
from ckptvcs.store.object import Kind, ObjectId, checked_id

_MAX_GAPS = 10_000  # generations that may be missing; more are a name that somebody made up
_ROUNDS = 1000  # commits on the way from what is known of a branch to where it may have been


@dataclass(frozen=True)
class Copy:
    """Another repository, to take from what is damaged here."""

    catalog: Catalog
    refs: Refs


@dataclass
class Mended:
    """The refs that were mended; and of those whose newest generation could be had from nowhere,
    where they are now, as far as can be told.
    """

    refs: list[str] = field(default_factory=list)
    told: dict[str, ObjectId | None] = field(default_factory=dict)


class RefMender:
    """Mends the refs of one repository, while nobody else writes."""

    def __init__(self, catalog: Catalog, refs: Refs, copy: Copy | None) -> None:
        self._catalog, self._refs = catalog, refs
        self._other = copy.refs if copy is not None and self._is_kin(copy.catalog) else None
        self.done = Mended()

    def _is_kin(self, other: Catalog) -> bool:
        """Whether a copy has the same history: a commit in common, of which each is made once."""
        own = self._catalog.store.ids(Kind.COMMIT)
        return not set(own).isdisjoint(other.store.ids(Kind.COMMIT))

    def run(self, *, drop: bool) -> Mended:
        """Mend what can be mended; let go of the rest if told to.

        Raises:
            StorageError: it cannot be written.
        """
        own = {ref: self._last(ref) for ref in self._refs.every()}
        last = {HEAD: 1} | {ref: number for ref, number in own.items() if number}
        if self._other is not None:
            absent = (ref for ref in self._other.every() if not own.get(ref))
            last |= self._whole(self._other, absent) | self._ahead(self._other, own)
        for ref in sorted(last, reverse=True):  # tags, pins, branches, and HEAD, which follows one
            if self._mend(ref, last[ref], drop=drop):
                self.done.refs.append(ref)
        return self.done

    def _last(self, ref: str) -> int:
        """The newest generation that there is, or was."""
        spare = self._refs.spare(ref)
        return max(max(self._refs.numbers(ref), default=0), spare.number if spare else 0)

    @staticmethod
    def _whole(other: Refs, names: Iterable[str]) -> dict[str, int]:
        """The newest generations of those refs of a copy that are undamaged."""
        found = {}
        for ref in names:
            with contextlib.suppress(CkptError):
                other.check(ref)
                found[ref] = max(other.numbers(ref))
        return found

    # -- bytes that can be had -----------------------------------------------------------------

    def _mend(self, ref: str, last: int, *, drop: bool) -> bool:
        """Whether there was something to mend, and it was."""
        changed = self._restore(ref, last)
        if self._sound(ref, last, None) is None and (drop or not ref.startswith("tags/")):
            branch = self._busiest() if ref == HEAD else None
            made = self._refs.mend(ref, partial(self._evidence, ref), now(), branch)
            self.done.told[ref], last, changed = made.commit, made.number, True
        if drop:
            changed |= self._mark_lost(ref, last)
        return changed

    def _sound(self, ref: str, number: int, wanted: str | None) -> Generation | None:
        """A generation that can be read, and has the `wanted` hash."""
        with contextlib.suppress(CkptError, FileNotFoundError):
            move = self._refs.generation(ref, number)
            if wanted is None or move.hash in (None, wanted):
                return move
        return None

    def _downward(self, ref: str, last: int) -> Iterator[tuple[int, str | None, bool]]:
        """The numbers of the generations, newest first, each with the hash that the one above holds
        of it, as it is when it is asked for, and whether it is sound.
        """
        numbers = {last, *self._refs.numbers(ref)}
        if self._other is not None:
            numbers |= {number for number in self._other.numbers(ref) if number <= last}
        if last - len(numbers) < _MAX_GAPS:
            numbers |= set(range(1, last + 1))
        wanted, above = None, last + 1
        for number in sorted(numbers, reverse=True):
            wanted = wanted if number + 1 == above else None
            yield number, wanted, self._sound(ref, number, wanted) is not None
            move = self._sound(ref, number, wanted)
            wanted, above = (move.previous if move else None), number

    def _restore(self, ref: str, last: int) -> bool:
        """Put back the generations whose bytes are elsewhere; whether there were some."""
        found = False
        for number, wanted, sound in self._downward(ref, last):
            data = None if sound else self._find(ref, number, wanted, newest=number == last)
            if data is not None:
                self._refs.restore(ref, number, data)
                found = True
        return found

    def _find(self, ref: str, number: int, wanted: str | None, *, newest: bool) -> bytes | None:
        """The bytes of a generation that fit."""
        below = self._sound(ref, number - 1, None) if number > 1 else None
        for data, is_own in self._candidates(ref, number):
            with contextlib.suppress(CkptError):
                move = self._refs.parse(ref, number, data)
                fits = move.hash == wanted if wanted else (
                    (number > 1 and below is None) or follows(move, below))  # fmt: skip
                if fits and (is_own or not newest or not self._contradicts(move, below)):
                    return data
        return None

    def _candidates(self, ref: str, number: int) -> Iterator[tuple[bytes, bool]]:
        with contextlib.suppress(CkptError, FileNotFoundError):
            yield self._refs.spare_content(ref), True
        if self._other is not None:
            with contextlib.suppress(CkptError, FileNotFoundError):
                yield self._other.content(ref, number), False

    def _contradicts(self, move: Generation, below: Generation | None) -> bool:
        """Whether a branch went on here to another commit than in the copy, which had a life of its
        own then.
        """
        if below is None or move.commit is None or self._catalog.store.contains(move.commit):
            return False
        return self._follower(below) not in (None, below.commit)

    def _ahead(self, other: Refs, last: dict[str, int]) -> dict[str, int]:
        """The branches that ended above where they end here, with the generation at which they did:
        a copy has it, and its commit is here.  The copy alone would not tell: it may have been
        committed to.
        """
        parents, found = self._parents(), {}
        for ref, number in last.items():
            below = self._sound(ref, number, None) if ref.startswith("heads/") else None
            under = set(_line(below.commit, parents)) if below else set()
            while below is not None:
                number += 1
                try:
                    move = other.generation(ref, number)
                except (CkptError, FileNotFoundError):
                    break
                if not follows(move, below):
                    break
                if move.commit in parents.keys() - under:
                    found[ref] = number
                below = move
        return found

    def _mark_lost(self, ref: str, last: int) -> bool:
        found = False
        for number, wanted, sound in self._downward(ref, last):
            if not sound and number != last:
                self._refs.mark_lost(ref, number, wanted, now())
                found = True
        return found

    # -- evidence ------------------------------------------------------------------------------

    def _evidence(self, ref: str, below: Generation | None) -> ObjectId | None:
        """Where a ref is whose newest generation can be had from nowhere."""
        space, _, name = ref.partition("/")
        if space == "heads":
            return self._follower(below)
        if space == "pins":
            with contextlib.suppress(CkptError):
                return checked_id(name)
        return below.commit if below else None

    def _follower(self, below: Generation | None) -> ObjectId | None:
        """The commit that a branch was at, as far as can be told: the end of a line that comes from
        a generation's commit and that no ref leads to; else the last one on the way to the tips of
        others.
        """
        commit = below.commit if below else None
        parents, tips = self._parents(), set(self._tips())
        ends = [name for name in parents.keys() - set(parents.values()) - self._reached(parents)
                if commit in (None, *_line(name, parents))]  # fmt: skip
        if ends:
            return max(ends, key=lambda name: self._catalog.commit(name).time)
        for _ in range(_ROUNDS):
            found = [name for name, parent in parents.items()
                     if parent == commit and name not in tips]  # fmt: skip
            if len(found) != 1:
                break
            commit = found[0]
        return commit

    def _busiest(self) -> str:
        """The branch that was moved last."""
        moves = {}
        for branch in self._refs.names("heads"):
            with contextlib.suppress(CkptError):
                move = self._refs.read(f"heads/{branch}")
                moves[branch] = move.time if move and move.commit else ""
        return max(moves, key=lambda branch: moves[branch], default="main")

    def _tips(self) -> Iterator[ObjectId]:
        """The commits that branches are at which can be read."""
        for branch in self._refs.names("heads"):
            with contextlib.suppress(CkptError):
                move = self._refs.read(f"heads/{branch}")
                if move and move.commit:
                    yield move.commit

    def _reached(self, parents: Mapping[ObjectId, ObjectId | None]) -> set[ObjectId]:
        return {name for tip in self._tips() for name in _line(tip, parents)}

    def _parents(self) -> dict[ObjectId, ObjectId | None]:
        """Every commit that can be read, reached or not, and what it stands on."""
        parents: dict[ObjectId, ObjectId | None] = {}
        for name in self._catalog.store.ids(Kind.COMMIT):
            with contextlib.suppress(CkptError):
                parents[name] = next(iter(self._catalog.commit(name).parents), None)
        return parents


def _line(name: ObjectId | None, parents: Mapping[ObjectId, ObjectId | None]) -> list[ObjectId]:
    """A commit and those below it."""
    found: list[ObjectId] = []
    while name is not None and name in parents:
        found.append(name)
        name = parents[name]
    return found
