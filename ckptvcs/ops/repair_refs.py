"""Repair refs: restore or infer versions that are damaged or missing.

backup     the cache holds a copy of the newest version
copy       another repository of the same history has versions, whole lost refs, and perhaps newer
           versions; its newest version is used unless something here contradicts it
infer      otherwise a branch is at the end of the history that starts at its last readable
           version, a pin is at the commit in its name, and HEAD is where it was before
drop       only if asked to: a tag is where it was before, older versions are marked as lost

Bytes are used only if their check is valid and they fit their neighbours: the next version holds
their hash, or they hold the hash of the previous one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count

from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.format_file import read_id
from ckptvcs.history.refs import HEAD, Generation, Refs, follows
from ckptvcs.history.revision import Revisions
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, checked_id

_MAX_GAPS = 10_000  # missing versions; a larger gap means a forged version number
_ROUNDS = 1000  # commits that may follow the last readable version of a branch


Parents = Mapping[ObjectId, ObjectId | None]


@dataclass(frozen=True)
class Copy:
    """Another repository to copy from; `refs` is None if its history is another one."""

    catalog: Catalog
    refs: Refs | None


def share_history(own: Backend, other: Backend) -> bool:
    """Return whether two repositories have the same id, or a version of a ref in common.

    A repository without a readable id and ref is accepted.
    """
    ids = read_id(own), read_id(other)
    if None not in ids and ids[0] == ids[1]:
        return True
    ours = _version_hashes(own)
    return not ours.isdisjoint(_version_hashes(other)) or (not ours and ids[0] is None)


def _version_hashes(backend: Backend) -> set[str | None]:
    refs = Refs(backend)
    return {move.hash for ref in refs.every() for move in refs.readable(ref)}


class RefRepairer:
    """Repairs the refs of one repository; no other process may write meanwhile.

    `refs` are the repaired refs.  `inferred` are those whose newest version no hash proves, with
    their commit or (HEAD) branch, which come from a copy or from the commits.
    """

    def __init__(self, catalog: Catalog, refs: Refs, copy: Copy | None) -> None:
        """`copy` has the same history."""
        self._catalog, self._refs = catalog, refs
        self._other = copy.refs if copy is not None else None
        self._readable: dict[str, ObjectId | None] = {}  # last readable position of branches
        self.refs: list[str] = []
        self.inferred: dict[str, str | None] = {}

    def run(self, *, drop: bool) -> None:
        """Repair the refs; with `drop`, also those that can only be set back."""
        newest = {ref: self._refs.last(ref) for ref in self._refs.every()}
        last = {HEAD: 1} | {ref: number for ref, number in newest.items() if number}
        if self._other is not None:
            absent = (ref for ref in self._other.every() if not newest.get(ref))
            last |= self._whole(self._other, absent) | self._ahead(self._other, newest)
        for ref in newest:
            below = next(self._refs.readable(ref), None)
            if ref.startswith("heads/") and below is not None:
                self._readable[ref] = below.commit
        restored = {ref for ref, number in last.items() if self._restore(ref, number)}
        for ref in sorted(last, reverse=True):  # tags, pins, branches, and HEAD, which follows one
            if self._infer(ref, last[ref], drop=drop) or ref in restored:
                self.refs.append(ref)

    def rescue(self) -> None:
        """Start a branch at each history whose ref is lost, name and all.

        Call this after all other repairs, which may restore the ref.
        """
        lost: list[ObjectId] = []
        with contextlib.suppress(CorruptionError):
            lost = Revisions(self._catalog, self._refs).lost_lines()
        for name in lost:
            branches = set(self._refs.names("heads"))
            number = next(n for n in count(1) if f"found-{n}" not in branches)
            ref = f"heads/found-{number}"
            self._refs.publish(ref, None, commit=name, time=now(), action="repair")
            self.refs.append(ref)
            self.inferred[ref] = name

    @staticmethod
    def _whole(other: Refs, names: Iterable[str]) -> dict[str, int]:
        """Return the newest version of each of these refs that is undamaged in a copy."""
        found = {}
        for ref in names:
            with contextlib.suppress(CkptError):
                other.check(ref)
                found[ref] = max(other.numbers(ref))
        return found

    # -- restore -------------------------------------------------------------------------------

    def _infer(self, ref: str, last: int, *, drop: bool) -> bool:
        """Infer the newest version if it could not be restored; return whether that was done."""
        changed = False
        if self._sound(ref, last, None) is None and (drop or not ref.startswith("tags/")):
            branch = self._default_branch() if ref == HEAD else None
            version = self._refs.repair(ref, partial(self._evidence, ref), now(), branch)
            self.inferred[ref], last, changed = (
                version.branch or version.commit,
                version.number,
                True,
            )
        if drop:
            changed |= self._mark_lost(ref, last)
        return changed

    def _sound(self, ref: str, number: int, wanted: str | None) -> Generation | None:
        """Return a version if it can be read and has the `wanted` hash, otherwise None."""
        with contextlib.suppress(CkptError, FileNotFoundError):
            move = self._refs.generation(ref, number)
            if wanted is None or move.hash in (None, wanted):
                return move
        return None

    def _downward(self, ref: str, last: int) -> Iterator[tuple[int, str | None, bool]]:
        """Yield the versions, newest first: number, expected hash, whether the version is valid.

        The next version holds the expected hash; it is read again after the caller changed it.
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
        """Restore the versions whose bytes exist elsewhere; return whether there were any."""
        found = False
        for number, wanted, sound in self._downward(ref, last):
            data = None if sound else self._find(ref, number, wanted, newest=number == last)
            if data is not None:
                self._refs.restore(ref, number, data)
                found = True
                if number == last and data != self._backup(ref):
                    move = self._refs.generation(ref, number)
                    self.inferred[ref] = move.branch or move.commit
        return found

    def _backup(self, ref: str) -> bytes | None:
        with contextlib.suppress(CkptError, FileNotFoundError):
            return self._refs.backup_content(ref)
        return None

    def _find(self, ref: str, number: int, wanted: str | None, *, newest: bool) -> bytes | None:
        """Return the bytes of a version that fit its neighbours, otherwise None."""
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
        """Return whether a branch continued here at another commit than in the copy.

        Then the copy was committed to independently.  The sign is a commit here that follows the
        branch and that no other version of a ref reaches.
        """
        if below is None or not ref.startswith("heads/"):
            return False
        parents = self._parents()
        reached = set(_line(move.commit, parents))
        unreachable = Revisions(self._catalog, self._refs).unreachable(parents.keys() - reached)
        return any(self._comes_from(name, ref, below.commit, parents) for name in unreachable)

    def _comes_from(
        self, name: ObjectId, ref: str, commit: ObjectId | None, parents: Parents
    ) -> bool:
        """Return whether a commit descends from `commit`, and not by way of another branch."""
        others = {at for branch, at in self._readable.items() if branch != ref}
        ancestors = (*_line(name, parents), None)
        return next((a for a in ancestors if a == commit or a in others), None) == commit

    def _ahead(self, other: Refs, last: dict[str, int]) -> dict[str, int]:
        """Return newer versions of branches that a copy has and whose commits are here.

        A commit here shows that the version was made here.  The copy alone does not: it may have
        been committed to.
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

    # -- infer ---------------------------------------------------------------------------------

    def _evidence(self, ref: str, below: Generation | None) -> ObjectId | None:
        """Return the commit of a ref whose newest version is lost."""
        space, _, name = ref.partition("/")
        if space == "heads":
            return self._follower(ref, below)
        if space == "pins":
            with contextlib.suppress(CkptError):
                return checked_id(name)
        return below.commit if below else None

    def _follower(self, ref: str, below: Generation | None) -> ObjectId | None:
        """Return the commit that a branch was probably at.

        That is the newest unreachable commit without children that descends from the version
        `below`, and not by way of another branch.  Otherwise it is the last commit that follows
        `below` on the way to the tips of other branches.
        """
        commit = below.commit if below else None
        parents, tips = self._parents(), self._tips()
        ends = [
            name
            for name in parents.keys() - set(parents.values()) - self._reached(parents)
            if self._comes_from(name, ref, commit, parents)
        ]
        if ends:
            return max(ends, key=lambda name: self._catalog.commit(name).time)
        for _ in range(_ROUNDS):
            children = [
                name for name, parent in parents.items() if parent == commit and name not in tips
            ]
            if len(children) != 1:
                break
            commit = children[0]
        return commit

    def _default_branch(self) -> str:
        """Return the branch for a HEAD that is lost: main, otherwise the one that moved last."""
        moves = {}
        for branch in self._refs.names("heads"):
            with contextlib.suppress(CkptError):
                move = self._refs.read(f"heads/{branch}")
                moves[branch] = move.time if move and move.commit else ""
        return max(moves, key=lambda branch: (branch == "main", moves[branch]), default="main")

    def _tips(self) -> set[ObjectId]:
        """Return the commits of the readable branches."""
        return self._refs.readable_targets(f"heads/{name}" for name in self._refs.names("heads"))

    def _reached(self, parents: Parents) -> set[ObjectId]:
        return {name for tip in self._tips() for name in _line(tip, parents)}

    def _parents(self) -> dict[ObjectId, ObjectId | None]:
        """Return the parent of every readable commit, reachable or not."""
        parents: dict[ObjectId, ObjectId | None] = {}
        for name in self._catalog.store.ids(Kind.COMMIT):
            with contextlib.suppress(CkptError):
                parents[name] = self._catalog.commit(name).parent
        return parents


def _line(name: ObjectId | None, parents: Parents) -> list[ObjectId]:
    """Return a commit and its ancestors."""
    ancestors: list[ObjectId] = []
    while name is not None and name in parents:
        ancestors.append(name)
        name = parents[name]
    return ancestors
