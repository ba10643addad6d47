"""Mending refs: generations that are damaged or missing, from where their bytes can be had.

backup      the newest one lies in the cache once more
copy       another repository of the same history has them, whole refs that are lost, and perhaps
           newer ones; the newest of a ref is believed where nothing here contradicts it
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

from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.format_file import read_id
from ckptvcs.history.refs import HEAD, Generation, Refs, follows
from ckptvcs.history.revision import Revisions
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, checked_id

_MAX_GAPS = 10_000  # generations that may be missing; more are a name that somebody made up
_ROUNDS = 1000  # commits on the way from what is known of a branch to where it may have been


Parents = Mapping[ObjectId, ObjectId | None]


@dataclass(frozen=True)
class Copy:
    """Another repository, to take from what is damaged here; refs if it has the same history."""

    catalog: Catalog
    refs: Refs | None


@dataclass
class Mended:
    """The refs that were mended; and of those whose newest generation no hash vouches for, where
    they are now: at a commit, or (HEAD) on a branch; as a copy has it, or as far as can be told.
    """

    refs: list[str] = field(default_factory=list)
    told: dict[str, str | None] = field(default_factory=dict)


def is_kin(own: Backend, other: Backend) -> bool:
    """Whether two repositories have the same history: by their ids, which may be damaged, or by a
    generation of a ref that both have; what has neither left may be of any.
    """
    ids = read_id(own), read_id(other)
    if None not in ids and ids[0] == ids[1]:
        return True
    ours = _generations(own)
    return not ours.isdisjoint(_generations(other)) or (not ours and ids[0] is None)


def _generations(backend: Backend) -> set[str | None]:
    refs = Refs(backend)
    return {move.hash for ref in refs.every() for move in refs.readable(ref)}


class RefMender:
    """Mends the refs of one repository, while nobody else writes."""

    def __init__(self, catalog: Catalog, refs: Refs, copy: Copy | None) -> None:
        """`copy` has the same history."""
        self._catalog, self._refs = catalog, refs
        self._other = copy.refs if copy is not None else None
        self._known: dict[str, ObjectId | None] = {}  # where each branch is known to have been
        self.done = Mended()

    def run(self, *, drop: bool) -> Mended:
        """Mend what can be mended; let go of the rest if told to.

        Raises:
            StorageError: it cannot be written.
        """
        own = {ref: self._refs.last(ref) for ref in self._refs.every()}
        last = {HEAD: 1} | {ref: number for ref, number in own.items() if number}
        if self._other is not None:
            absent = (ref for ref in self._other.every() if not own.get(ref))
            last |= self._whole(self._other, absent) | self._ahead(self._other, own)
        for ref in own:
            below = next(self._refs.readable(ref), None)
            if ref.startswith("heads/") and below is not None:
                self._known[ref] = below.commit
        restored = {ref for ref, number in last.items() if self._restore(ref, number)}
        for ref in sorted(last, reverse=True):  # tags, pins, branches, and HEAD, which follows one
            if self._make(ref, last[ref], drop=drop) or ref in restored:
                self.done.refs.append(ref)
        return self.done

    def rescue(self) -> None:
        """Lead a branch to lines of commits that a ref led to which is lost, name and all; when all
        else is mended, which else would know of them.
        """
        lost: list[ObjectId] = []
        with contextlib.suppress(CorruptionError):
            lost = Revisions(self._catalog, self._refs).lost_lines()
        for name in lost:
            there, number = set(self._refs.names("heads")), 1
            while f"found-{number}" in there:
                number += 1
            ref = f"heads/found-{number}"
            self._refs.publish(ref, None, commit=name, time=now(), action="repair")
            self.done.refs.append(ref)
            self.done.told[ref] = name

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

    def _make(self, ref: str, last: int, *, drop: bool) -> bool:
        """Make what could not be put back; whether there was something."""
        changed = False
        if self._sound(ref, last, None) is None and (drop or not ref.startswith("tags/")):
            branch = self._main() if ref == HEAD else None
            made = self._refs.repair(ref, partial(self._evidence, ref), now(), branch)
            self.done.told[ref], last, changed = made.branch or made.commit, made.number, True
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
                if number == last and data != self._backup(ref):
                    move = self._refs.generation(ref, number)
                    self.done.told[ref] = move.branch or move.commit
        return found

    def _backup(self, ref: str) -> bytes | None:
        with contextlib.suppress(CkptError, FileNotFoundError):
            return self._refs.backup_content(ref)
        return None

    def _find(self, ref: str, number: int, wanted: str | None, *, newest: bool) -> bytes | None:
        """The bytes of a generation that fit."""
        below = self._sound(ref, number - 1, None) if number > 1 else None
        for data, is_own in self._candidates(ref, number):
            with contextlib.suppress(CkptError):
                move = self._refs.parse(ref, number, data)
                fits = (
                    move.hash == wanted
                    if wanted
                    else ((number > 1 and below is None) or follows(move, below))
                )
                if fits and (is_own or not newest or not self._contradicts(ref, move, below)):
                    return data
        return None

    def _candidates(self, ref: str, number: int) -> Iterator[tuple[bytes, bool]]:
        backup = self._backup(ref)
        if backup is not None:
            yield backup, True
        if self._other is not None:
            with contextlib.suppress(CkptError, FileNotFoundError):
                yield self._other.content(ref, number), False

    def _contradicts(self, ref: str, move: Generation, below: Generation | None) -> bool:
        """Whether a branch went on here to another commit than in the copy, which had a life of its
        own then: to one that no other generation led to.
        """
        if below is None or not ref.startswith("heads/"):
            return False
        parents = self._parents()
        known = set(_line(move.commit, parents))
        loose = Revisions(self._catalog, self._refs).unreachable(parents.keys() - known)
        return any(self._comes_from(name, ref, below.commit, parents) for name in loose)

    def _comes_from(
        self, name: ObjectId, ref: str, commit: ObjectId | None, parents: Parents
    ) -> bool:
        """Whether a commit's way down meets that of a ref before it meets other branches."""
        others = {at for branch, at in self._known.items() if branch != ref}
        met = (one for one in (*_line(name, parents), None) if one == commit or one in others)
        return next(met, None) == commit

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
            return self._follower(ref, below)
        if space == "pins":
            with contextlib.suppress(CkptError):
                return checked_id(name)
        return below.commit if below else None

    def _follower(self, ref: str, below: Generation | None) -> ObjectId | None:
        """The commit that a branch was at, as far as can be told: the end of a line that comes from
        a generation's commit, not by way of another branch, and that no ref leads to; else the last
        one on the way to the tips of others.
        """
        commit = below.commit if below else None
        parents, tips = self._parents(), set(self._tips())
        ends = [
            name
            for name in parents.keys() - set(parents.values()) - self._reached(parents)
            if self._comes_from(name, ref, commit, parents)
        ]
        if ends:
            return max(ends, key=lambda name: self._catalog.commit(name).time)
        for _ in range(_ROUNDS):
            found = [
                name for name, parent in parents.items() if parent == commit and name not in tips
            ]
            if len(found) != 1:
                break
            commit = found[0]
        return commit

    def _main(self) -> str:
        """The branch that is to be followed where nothing says which was: main, or what was moved
        last.
        """
        moves = {}
        for branch in self._refs.names("heads"):
            with contextlib.suppress(CkptError):
                move = self._refs.read(f"heads/{branch}")
                moves[branch] = move.time if move and move.commit else ""
        return max(moves, key=lambda branch: (branch == "main", moves[branch]), default="main")

    def _tips(self) -> Iterator[ObjectId]:
        """The commits that branches are at which can be read."""
        for branch in self._refs.names("heads"):
            with contextlib.suppress(CkptError):
                move = self._refs.read(f"heads/{branch}")
                if move and move.commit:
                    yield move.commit

    def _reached(self, parents: Parents) -> set[ObjectId]:
        return {name for tip in self._tips() for name in _line(tip, parents)}

    def _parents(self) -> dict[ObjectId, ObjectId | None]:
        """Every commit that can be read, reached or not, and what it stands on."""
        parents: dict[ObjectId, ObjectId | None] = {}
        for name in self._catalog.store.ids(Kind.COMMIT):
            with contextlib.suppress(CkptError):
                parents[name] = next(iter(self._catalog.commit(name).parents), None)
        return parents


def _line(name: ObjectId | None, parents: Parents) -> list[ObjectId]:
    """A commit and those below it."""
    found: list[ObjectId] = []
    while name is not None and name in parents:
        found.append(name)
        name = parents[name]
    return found
