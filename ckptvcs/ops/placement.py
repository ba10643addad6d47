"""Where a commit goes: its branch, its parent, and whether HEAD follows.

The decision is one pure function of a situation; `ops/commit.py` reads the situation from the
repository and carries the decision out.

    a step above the last one          goes on top of it
    the last step, the same weights    goes on top of it: the same run, saved again
    any other step                     starts a branch at the newest commit whose step is lower
    HEAD at an older commit            starts a branch there
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from ckptvcs.history.refs import Generation
from ckptvcs.store.ids import ObjectId

Line = Callable[[ObjectId | None], Iterable[tuple[ObjectId, int | None]]]
"""The commits from one on down to the first, each with its step."""


class Likeness(Enum):
    """What a commit shares with what is to be committed."""

    NOTHING = 0
    WEIGHTS = 1
    ALL = 2


@dataclass(frozen=True)
class Head:
    """The branch that HEAD follows, None at an older commit; `last_branch` finds the one before."""

    branch: str | None
    last_branch: Callable[[], str] = lambda: "main"


@dataclass(frozen=True)
class Situation:
    """What a decision depends on.

    `wanted` is the branch that the user named.  `tip` is the newest version of that branch, else of
    the branch that HEAD is at.  `parent` is the commit to go on from if `tip` holds none.
    """

    step: int | None
    wanted: str | None
    head: Head
    tip: Generation | None
    parent: ObjectId | None
    branches: Collection[str]
    head_stays: bool = False


@dataclass(frozen=True)
class Place:
    """Where a commit goes: its step, the branch and its newest version, and the parent."""

    step: int | None
    branch: str
    tip: Generation | None
    parent: ObjectId | None
    moves_head: bool
    unchanged: bool
    notes: tuple[str, ...]


def decide(
    situation: Situation, line: Line, likeness: Callable[[ObjectId | None], Likeness]
) -> Place:
    """Return where a commit goes; `likeness` compares it with a commit of the history."""
    head, step, tip = situation.head, situation.step, situation.tip
    asked = situation.wanted or head.branch
    notes: list[str] = []
    parent = tip.commit if tip is not None and tip.commit is not None else situation.parent
    branch = asked
    if branch is None:
        branch, tip = free_name(head.last_branch(), situation.branches), None
        notes.append(f"HEAD was at an older commit: started branch '{branch}'")
    alike = likeness(parent)
    above = _step_of(parent, line)
    again = step == above and alike is not Likeness.NOTHING
    if step is not None and above is not None and step <= above and not again:
        parent = _below(parent, step, line)
        branch, tip = free_name(branch, situation.branches), None
        alike = likeness(parent)
        origin = f"at step {_step_of(parent, line)}" if parent else "from nothing"
        notes.append(f"step {step} is not above step {above}: started branch '{branch}' {origin}")
    stays = situation.head_stays and branch != asked
    moves_head = situation.wanted is None or head.branch == situation.wanted
    return Place(
        step, branch, tip, parent, moves_head and not stays, alike is Likeness.ALL, tuple(notes)
    )


def free_name(name: str, branches: Collection[str]) -> str:
    """Return NAME-2, NAME-3 ...: the first that is no branch."""
    stem = re.sub(r"-[0-9]+\Z", "", name)
    number = 2
    while f"{stem}-{number}" in branches:
        number += 1
    return f"{stem}-{number}"


def _step_of(commit: ObjectId | None, line: Line) -> int | None:
    """The step of a commit, or of its nearest ancestor that has one."""
    return next((step for _, step in line(commit) if step is not None), None)


def _below(commit: ObjectId | None, limit: int, line: Line) -> ObjectId | None:
    """The newest commit on a line whose step is lower."""
    return next((name for name, step in line(commit) if step is not None and step < limit), None)
