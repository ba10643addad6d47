"""Where a commit goes, as a table: no repository is needed to decide."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptvcs.history.refs import Generation
from ckptvcs.ops.placement import Likeness, Place, Situation, decide, free_name
from ckptvcs.store.ids import ObjectId

NOTHING, WEIGHTS, ALL = Likeness

# A line of commits, newest first; c3 has no step of its own, so that it counts as step 20.
STEPS = {"c4": 30, "c3": None, "c2": 20, "c1": 10}


def line(name: ObjectId | None) -> Iterator[tuple[ObjectId, int | None]]:
    names = list(STEPS)
    for found in names[names.index(name) :] if name else []:
        yield ObjectId(found), STEPS[found]


def at(commit: str | None) -> Generation:
    """The newest version of a branch."""
    name = None if commit is None else ObjectId(commit)
    return Generation(7, "hash", "before", name, None, "2026-01-01T00:00:00Z", "commit")


def placed(
    step: int | None,
    *,
    tip: str | None = "c4",
    wanted: str | None = None,
    head: str | None = "main",
    parent: str | None = None,
    like: Likeness = NOTHING,
    branches: tuple[str, ...] = ("main",),
    head_stays: bool = False,
) -> Place:
    situation = Situation(
        step,
        wanted,
        head,
        lambda: "main",
        None if tip is None else at(tip),
        ObjectId(parent) if parent else None,
        branches,
        head_stays,
    )
    return decide(situation, line, lambda _: like)


@pytest.mark.parametrize(
    ("step", "like", "branch", "parent"),
    [
        (31, NOTHING, "main", "c4"),  # the next step
        (None, NOTHING, "main", "c4"),  # no step: behind what is there
        (30, WEIGHTS, "main", "c4"),  # the same step, the same weights: saved again
        (30, ALL, "main", "c4"),
        (30, NOTHING, "main-2", "c2"),  # the same step, other weights: another run
        (25, ALL, "main-2", "c2"),  # an earlier step is another run, whatever it holds
        (15, NOTHING, "main-2", "c1"),
        (10, NOTHING, "main-2", None),  # from before the first step
        (0, NOTHING, "main-2", None),
    ],
)
def test_steps_choose_branch_and_parent(
    step: int | None, like: Likeness, branch: str, parent: str | None
) -> None:
    place = placed(step, like=like)
    assert (place.step, place.branch, place.parent) == (step, branch, parent)
    assert place.tip == (at("c4") if branch == "main" else None)
    assert bool(place.notes) == (branch != "main")
    assert place.unchanged == (like is ALL)
    assert place.moves_head


def test_a_commit_without_a_step_has_that_of_the_one_before_it() -> None:
    assert placed(21, tip="c3").branch == "main"
    assert placed(20, tip="c3").branch == "main-2"


def test_the_first_commit_of_a_repository() -> None:
    for tip in (None, None):
        place = placed(5, tip=tip)
        assert (place.branch, place.parent, place.notes) == ("main", None, ())


@pytest.mark.parametrize(
    ("wanted", "head", "moves"),
    [(None, "main", True), ("side", "main", False), ("main", "main", True), ("side", None, False)],
)
def test_head_follows_its_own_branch_only(wanted: str | None, head: str, moves: bool) -> None:
    assert placed(40, wanted=wanted, head=head).moves_head == moves


def test_a_new_branch_goes_on_from_where_head_is() -> None:
    place = placed(40, wanted="side", tip=None, parent="c2")
    assert (place.branch, place.tip, place.parent) == ("side", None, "c2")


def test_at_an_older_commit_a_branch_is_started() -> None:
    place = placed(25, head=None, tip=None, parent="c2", branches=("main", "main-2"))
    assert (place.branch, place.parent, place.moves_head) == ("main-3", "c2", True)
    assert "older commit" in place.notes[0]


def test_where_head_is_to_stay_it_does_not_follow_to_a_new_branch() -> None:
    assert placed(40, head_stays=True).moves_head
    assert not placed(10, head_stays=True).moves_head


@pytest.mark.parametrize(
    ("name", "branches", "free"),
    [
        ("main", (), "main-2"),
        ("main", ("main", "main-2"), "main-3"),
        ("main-2", ("main", "main-2"), "main-3"),
        ("run-7b", (), "run-7b-2"),
    ],
)
def test_free_names_count_up(name: str, branches: tuple[str, ...], free: str) -> None:
    assert free_name(name, branches) == free
