"""The reflog of a branch, and undo: its moves, and the drops of its commits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import takewhile

from ckptvcs.errors import ConflictError, CorruptionError, MissingObjectError, NotFoundError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.reachability import can_unarchive, is_whole
from ckptvcs.history.records import DIRECT, LEFT_OUT, DropRecord, load_drop_record
from ckptvcs.history.refs import HEAD, Generation, Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.text import counted

_UNDO = "undo "  # followed by the number of the version that was undone
DROPPED = "drop"
"""The action of a branch that goes back because its newest commits are dropped."""


@dataclass(frozen=True)
class ReflogEvent:
    """A move of a branch, or a drop or fade of its commits.

    Attributes:
        time: The time, ISO 8601 in UTC.
        action: The name of the operation.
        commit: The commit of the branch after a move.
        step: The training step of that commit, if known.
        available: Whether the commit still exists, even if it was dropped.
        count: The number of dropped or faded commits; 0 for a move.
    """

    time: str
    action: str
    commit: ObjectId | None
    step: int | None
    available: bool
    count: int = 0


@dataclass(frozen=True)
class Undone:
    """The result of an undo.

    Attributes:
        what: The reverted operation.
        branch: The name of the branch.
        commit: The commit of the branch after the undo; None if it has none.
        abandoned: The commit that no ref reaches any more because of the undo; None if a ref does.
    """

    what: str
    branch: str
    commit: ObjectId | None
    abandoned: ObjectId | None = None


def _after(record: DropRecord, branch: str, moves: Iterable[Generation]) -> int:
    """Return the number of the last move before a record, by time if the record has none."""
    earlier = (move.number for move in moves if move.time < record.time)
    number = dict(record.after).get(branch)
    return max(earlier, default=0) if number is None else number


def take_back(
    catalog: Catalog, refs: Refs, branch: str, old: Generation | None, name: ObjectId
) -> bool:
    """Undo the move of a branch from `old` if gc deleted its commit; return whether it did.

    A writer that does not renew its lease for long counts as dead.  gc may then delete its objects
    just before the writer moves the branch.
    """
    catalog.reload()
    with contextlib.suppress(MissingObjectError):
        if is_whole(catalog, {name: catalog.commit(name)}, catalog.dropped()):
            return False
    ref, number = f"heads/{branch}", (old.number if old else 0) + 1
    refs.publish(
        ref,
        refs.generation(ref, number),
        commit=old.commit if old else None,
        time=now(),
        action=f"{_UNDO}{number}",
    )
    return True


class Past:
    """The reflog of one repository."""

    def __init__(self, catalog: Catalog, refs: Refs) -> None:
        self._catalog, self._refs = catalog, refs
        self._revisions = Revisions(catalog, refs)

    def _branch(self, name: str | None) -> str:
        branch = name or self._refs.current_branch()
        if branch is None:
            raise NotFoundError("HEAD is detached", hint="pass a branch name")
        if self._refs.read(f"heads/{branch}") is None:
            raise NotFoundError(f"branch '{branch}' has no commits yet")
        return branch

    def events(self, branch: str | None = None) -> list[ReflogEvent]:
        """Return the moves of a branch (default: HEAD's) and drops of its commits, newest first.

        Raises:
            NotFoundError: the branch does not exist or has no commits.
        """
        name = self._branch(branch)
        moves = self._refs.reflog(f"heads/{name}")
        reached = self._revisions.ids()
        events = [((move.number, ""), self._event(move, reached)) for move in moves]
        line = self._ever(moves)
        for _, record in self._records():
            count = len(line.intersection(record.commits))
            if count and record.rule != LEFT_OUT:
                action = f"{record.what} {record.rule}".strip()
                place = (_after(record, name, moves), record.time)
                events.append((place, ReflogEvent(record.time, action, None, None, True, count)))
        return [event for _, event in sorted(events, key=lambda row: row[0], reverse=True)]

    def _event(self, move: Generation, reached: Set[ObjectId]) -> ReflogEvent:
        is_stored = move.commit is not None and self._catalog.store.contains(move.commit)
        step = self._catalog.commit(move.commit).step if move.commit and is_stored else None
        exists = move.commit is None or (is_stored and self._can_return_to(move.commit, reached))
        return ReflogEvent(move.time, move.action, move.commit, step, exists)

    def _can_return_to(self, name: ObjectId, reached: Set[ObjectId]) -> bool:
        try:
            self._revisions.require(name, reached)
        except NotFoundError:
            return name in self._catalog.dropped().commits
        return True

    def _ever(self, moves: list[Generation]) -> set[ObjectId]:
        """Return the stored commits that were ever on a branch, and all that it pointed to."""
        commits: set[ObjectId] = set()
        for move in moves:
            name = move.commit
            while name is not None and name not in commits and self._catalog.store.contains(name):
                commits.add(name)
                name = self._catalog.commit(name).parent
        return commits | {move.commit for move in moves if move.commit is not None}

    def _records(self) -> list[tuple[ObjectId, DropRecord]]:
        store = self._catalog.store
        names = store.ids(Kind.RECORD)
        return [(name, load_drop_record(store.get(name, Kind.RECORD))) for name in names]

    def undo(self, time: str) -> Undone:
        """Undo the last move of HEAD's branch or the last drop of its commits, whichever is newer.

        Raises:
            NotFoundError: no move or drop is left to undo.
            ConflictError: gc deleted the commits, or another writer moved the branch.
        """
        name = self._branch(None)
        ref = f"heads/{name}"
        moves = {move.number: move for move in self._refs.reflog(ref)}
        newest = moves[max(moves)]
        last = self._standing(moves, newest.number)
        drop = self._last_drop(name, moves, last or 0)
        if drop:
            return self._restore(name, *drop, time)
        if last is None or last == 1:
            raise NotFoundError(f"nothing to undo on branch '{name}'", hint=self._way_back(name))
        below = moves[self._standing(moves, last - 1) or 1]
        before = below.commit
        if below.is_lost or moves[last].is_lost:
            raise ConflictError(
                "the previous commit of the branch is lost", hint="see 'ckpt reflog'"
            )
        if before is not None:
            try:
                self._revisions.require(before)
            except NotFoundError as error:
                raise ConflictError(error.message, hint=error.hint) from error
        taken = moves[last]
        self._refs.publish(ref, newest, commit=before, time=time, action=f"{_UNDO}{last}")
        at = f" of {taken.commit[:8]}" if taken.commit else ""
        is_reached = taken.commit is None or taken.commit in self._revisions.ids()
        return Undone(f"{taken.action}{at}", name, before, None if is_reached else taken.commit)

    def _way_back(self, branch: str) -> str | None:
        """Return how to leave a branch for the one that HEAD followed before it began, if any."""
        followed = [head.branch for head in self._refs.readable(HEAD)][::-1]  # oldest first
        before = takewhile(lambda name: name != branch, followed)
        old = next((name for name in [*before][::-1] if name), None)
        if old is None or self._revisions.branch(old) is None:
            return None
        return (
            f"run 'ckpt checkout {old}' to continue on branch '{old}', "
            f"then 'ckpt branch --delete {branch}' to delete this one"
        )

    @staticmethod
    def _standing(moves: dict[int, Generation], number: int) -> int | None:
        """Return the number of the move that is in effect, skipping undone ones."""
        while number and number in moves and moves[number].action.startswith(_UNDO):
            undone = moves[number].action[len(_UNDO) :]
            if not undone.isdecimal() or not 0 < int(undone[:17]) < number:
                raise CorruptionError("a ref undoes a move that is not older")
            number = int(undone[:17]) - 1
        return number if number in moves else None

    def _last_drop(
        self, branch: str, moves: Mapping[int, Generation], last: int
    ) -> tuple[ObjectId, DropRecord] | None:
        """Return the newest drop after the move `last` that no undo reverts.

        A drop whose data is gone counts only on its own branch, and after all other drops.
        """
        line = self._ever(list(moves.values()))
        records = {**self._catalog.drops(), **self._catalog.archives()}
        drops = [pair for pair in records.items() if pair[1].rule not in (LEFT_OUT, DIRECT)]
        rows = [
            (_after(record, branch, moves.values()), record.time, name, record)
            for name, record in drops
        ]
        took_back = last in moves and moves[last].action == DROPPED
        rows = sorted(row for row in rows if row[0] >= last - took_back)
        newest_first = [(name, record) for _, _, name, record in reversed(rows)]
        whole = (pair for pair in newest_first if self._is_stored(*pair))
        own = (pair for pair in newest_first if line.intersection(pair[1].commits))
        return next(whole, None) or next(own, None)

    def _is_stored(self, name: ObjectId, drop: DropRecord) -> bool:
        """Return whether the data of dropped commits is still complete."""
        if drop.what == "archive":
            return can_unarchive(self._catalog, drop)
        if not all(map(self._catalog.store.contains, drop.commits)):
            return False
        commits = {commit: self._catalog.commit(commit) for commit in drop.commits}
        return is_whole(self._catalog, commits, self._catalog.dropped(name))

    def _restore(self, branch: str, name: ObjectId, drop: DropRecord, time: str) -> Undone:
        if not self._is_stored(name, drop):
            raise ConflictError(
                f"gc deleted the commits that '{drop.rule}' dropped", hint="see 'ckpt reflog'"
            )
        after = self._refs.branches()
        record = DropRecord("undo", drop.commits, drop.parts, drop.rule, time, (name,), after)
        self._catalog.record([record])
        for moved, number in drop.after:
            self._put_back(moved, number, drop, time)
        tip = self._refs.target(f"heads/{branch}")
        what = "archive" if drop.what == "archive" else f"drop {drop.rule}"
        return Undone(f"{what} of {counted(len(drop.commits), 'commit')}", branch, tip)

    def _put_back(self, branch: str, number: int, drop: DropRecord, time: str) -> None:
        """Undo the move by which a drop took a branch back, unless the branch has moved since.

        `number` is that of the version before it.
        """
        ref = f"heads/{branch}"
        moves = {move.number: move for move in self._refs.reflog(ref)}
        move, old = moves.get(number + 1), moves.get(number)
        if move is None or old is None or move.action != DROPPED or old.commit not in drop.commits:
            return
        if self._standing(moves, max(moves)) == number + 1:
            action = f"{_UNDO}{number + 1}"
            self._refs.publish(ref, moves[max(moves)], commit=old.commit, time=time, action=action)
