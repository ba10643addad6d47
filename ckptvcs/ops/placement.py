"""Decide the branch and the parent of a commit, and whether HEAD follows.

The decision is one pure function of a situation.  `ops/commit.py` reads the situation from the
repository and carries out the decision.

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
"""Yields a commit and its ancestors, newest first, each with its step."""


class Likeness(Enum):
    """How much of a checkpoint a commit already contains."""

    NOTHING = 0
    WEIGHTS = 1
    ALL = 2


@dataclass(frozen=True)
class Situation:
    """The facts that a decision depends on.

    `wanted` is the branch that the user named.  `following` is the branch of HEAD (None if
    detached), and `last_branch` returns the one that HEAD left.  `tip` is the newest version of
    `wanted`, otherwise of `following`.  `parent` is the parent if `tip` holds no commit.
    """

    step: int | None
    wanted: str | None
    following: str | None
    last_branch: Callable[[], str]
    tip: Generation | None
    parent: ObjectId | None
    branches: Collection[str]
    head_stays: bool = False


@dataclass(frozen=True)
class Place:
    """A decision: the step of the commit, its branch with the newest version, and its parent."""

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
    """Return where a commit goes; `likeness` compares the checkpoint with a commit."""
    step, tip = situation.step, situation.tip
    asked = situation.wanted or situation.following
    notes: list[str] = []
    parent = tip.commit if tip is not None and tip.commit is not None else situation.parent
    branch = asked
    if branch is None:
        branch, tip = free_name(situation.last_branch(), situation.branches), None
        notes.append(f"HEAD was at an older commit: started branch '{branch}'")
    alike = likeness(parent)
    last_step = _step_of(parent, line)
    again = step == last_step and alike is not Likeness.NOTHING
    if step is not None and last_step is not None and step <= last_step and not again:
        parent = _below(parent, step, line)
        branch, tip = free_name(branch, situation.branches), None
        alike = likeness(parent)
        origin = f"at step {_step_of(parent, line)}" if parent else "from nothing"
        notes.append(
            f"step {step} is not above step {last_step}: started branch '{branch}' {origin}"
        )
    stays = situation.head_stays and branch != asked
    moves_head = situation.wanted in (None, situation.following)
    return Place(
        step, branch, tip, parent, moves_head and not stays, alike is Likeness.ALL, tuple(notes)
    )


def stem(name: str) -> str:
    """Return the name of a branch without the number that `free_name` adds."""
    return re.sub(r"-[0-9]+\Z", "", name)


def free_name(name: str, branches: Collection[str]) -> str:
    """Return the first of NAME-2, NAME-3, ... that is not the name of a branch."""
    number = 2
    while f"{stem(name)}-{number}" in branches:
        number += 1
    return f"{stem(name)}-{number}"


def _step_of(commit: ObjectId | None, line: Line) -> int | None:
    """Return the step of a commit, or of its nearest ancestor that has a step."""
    return next((step for _, step in line(commit) if step is not None), None)


def _below(commit: ObjectId | None, limit: int, line: Line) -> ObjectId | None:
    """Return the newest ancestor whose step is lower."""
    return next((name for name, step in line(commit) if step is not None and step < limit), None)
