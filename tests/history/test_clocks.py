"""Clocks that go backwards, or are those of two machines: order comes from what stands on what."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from ckptvcs.errors import NotFoundError
from ckptvcs.gc.retention import Policy
from ckptvcs.ops import describe, gc, refs, repository
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import move_head
from ckptvcs.repo import Repo

pytestmark = pytest.mark.any_backend

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = 86400
Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the clock, in days from the start; it goes on a little with every look at it."""
    days = [0.0]

    def now() -> str:
        days[0] += 1e-6
        return (START + timedelta(days=days[0])).isoformat()

    for module in (describe, gc, refs, repository):
        monkeypatch.setattr(module, "current_time" if module is gc else "now", now)

    def put(day: float) -> None:
        days[0] = day

    put(0)
    return put


def run(repo: Repo, clock: Clock, *days: float, first: int = 1) -> None:
    for step, day in enumerate(days, first):
        clock(day)
        repo.commit({"w": torch.full((50,), float(step))}, step=step)


def steps(repo: Repo, *, everything: bool = False) -> list[int | None]:
    return [entry.step for entry in repo.log(all_branches=everything)]


def test_undo_takes_back_what_came_last(repo: Repo, clock: Clock) -> None:
    run(repo, clock, 10, 11, 12)
    clock(-5)
    repo.gc(Policy(last=1), sweep=False)
    assert steps(repo) == [3]
    assert "drop" in repo.undo().what
    assert steps(repo) == [3, 2, 1]
    repo.gc(Policy(last=1), sweep=False)
    run(repo, clock, -9, first=4)
    assert [event.action.split()[0] for event in repo.reflog()][:4] == [
        "commit",
        "drop",
        "undo",
        "drop",
    ]
    assert "commit" in repo.undo().what
    assert "drop" in repo.undo().what
    assert steps(repo) == [3, 2, 1]
    clock(-20)
    assert "commit" in repo.undo().what
    assert "commit" in repo.undo().what
    with pytest.raises(NotFoundError):
        repo.undo()
    assert [event.action.split()[0] for event in repo.reflog()][:2] == ["undo", "undo"]


def test_the_reflog_is_in_order(repo: Repo, clock: Clock) -> None:
    run(repo, clock, 3, 1, 2, 0)
    assert [event.step for event in repo.reflog()] == [4, 3, 2, 1]
    assert steps(repo) == [4, 3, 2, 1]
    assert steps(repo, everything=True) == [4, 3, 2, 1]


def test_the_log_of_branches_shows_no_commit_below_its_parent(repo: Repo, clock: Clock) -> None:
    run(repo, clock, 5, 1, 7)
    move_head(handle(repo), repo.resolve(2), None)
    run(repo, clock, 0, 9, first=10)
    found = steps(repo, everything=True)
    assert sorted(found, key=str) == [1, 10, 11, 2, 3]
    assert found.index(1) > found.index(2) > found.index(10) > found.index(11)
    assert found.index(2) > found.index(3)


@pytest.mark.parametrize(
    ("days", "kept"),
    [
        ((0, 10, 20, 29, 30), [5, 4]),
        ((0, 10, 20, -9000, 30), [5]),  # as old as the one before it, at most
        ((0, 29, -9000, -9000, -9000), [5, 4, 3, 2]),
        ((0, 9000, 1, 2, 30), [5]),  # as old as the next newer one
        ((0, 9000, 9001, 9002, 9003), [5, 4, 3, 2]),
        ((9000, 10, 20, 29, -5), [5, 4]),
    ],
)
def test_keep_within(repo: Repo, clock: Clock, days: tuple[float, ...], kept: list[int]) -> None:
    run(repo, clock, *days)
    clock(30)
    repo.gc(Policy(within=3 * DAY), now=True)
    assert steps(repo) == kept
    assert repo.verify().damage == []


def test_a_drop_of_an_older_program_goes_by_its_time(repo: Repo, clock: Clock) -> None:
    run(repo, clock, 1, 2)
    clock(3)
    plan = repo.plan_gc(Policy(last=1), now=True)
    (drop,) = plan.drops
    handle(repo).catalog.record([type(drop)("drop", drop.commits, (), drop.rule, drop.time)])
    assert steps(repo) == [2]
    assert "drop" in repo.undo().what
    assert steps(repo) == [2, 1]


def test_two_machines(repo: Repo, clock: Clock, tmp_path: Path) -> None:
    run(repo, clock, 0, 1)
    other = Repo.open(repo.folder)
    run(other, clock, -3, first=3)  # a clock days behind
    clock(2)
    repo.commit({"w": torch.ones(3)}, step=4)
    clock(-2)
    other.gc(Policy(last=2), sweep=False)
    assert steps(other) == [4, 3]
    clock(2)
    assert "drop" in repo.undo().what
    assert steps(Repo.open(repo.folder)) == [4, 3, 2, 1]
