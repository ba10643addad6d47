"""The commits that a log lists, and their order."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

from ckptvcs import InvalidInputError, NotFoundError, Repo

LOSSES = {10: 5.0, 20: 3.0, 30: 4.0, 40: 2.0}


@pytest.fixture
def run(repo: Repo) -> Repo:
    """Steps 10 to 40 on main, 35 on side; one commit without a step and metrics."""
    draw = np.random.default_rng(0)

    def state() -> dict[str, Any]:
        return {"weight": draw.standard_normal(300, np.float32)}

    for step, loss in LOSSES.items():
        repo.commit(state(), step=step, metrics={"loss": loss})
        if step == 30:
            repo.branch("side")
    repo.move_head("side")
    repo.commit(state(), step=35, metrics={"accuracy": 0.5})
    repo.move_head("main")
    repo.commit(state())
    return repo


def steps(run: Repo, *args: Any, **options: Any) -> list[int | None]:
    return [entry.step for entry in run.log(*args, **options)]


def test_a_range_includes_both_ends(run: Repo) -> None:
    assert steps(run) == [None, 40, 30, 20, 10]
    assert steps(run, start=20, stop=30) == [30, 20]
    assert steps(run, start=15) == [None, 40, 30, 20]
    assert steps(run, start="HEAD~2", stop="HEAD~1") == [40, 30]
    assert steps(run, start=20, stop="side") == [35, 30, 20]
    assert steps(run, start=20, branch="side") == [35, 30, 20]
    assert steps(run, 1, start=20, stop=30) == [30]
    with pytest.raises(NotFoundError):
        run.log(start=20, stop="nowhere")
    with pytest.raises(InvalidInputError, match="one branch"):
        run.log(start=20, all_branches=True)


def test_steps_are_chosen_on_all_branches(run: Repo) -> None:
    assert steps(run, steps=(30, 40), all_branches=True) == [35, 40, 30]
    assert steps(run, steps=(None, 20)) == [20, 10]
    assert steps(run, steps=(31, None)) == [40]
    assert not run.log(steps=(11, 12))


def test_a_branch_is_chosen_by_name(run: Repo) -> None:
    assert steps(run, branch="side") == [35, 30, 20, 10]
    assert steps(run, 2, branch="side") == [35, 30]
    for options in ({"revision": "HEAD"}, {"all_branches": True}):
        with pytest.raises(InvalidInputError, match="cannot be combined"):
            run.log(branch="side", **options)
    with pytest.raises(NotFoundError):
        run.log(branch="none")


def test_times_are_included(run: Repo) -> None:
    times = [datetime.fromisoformat(entry.commit.time) for entry in run.log()]
    assert steps(run, since=times[1]) == [None, 40]
    assert steps(run, until=times[2]) == [30, 20, 10]
    assert steps(run, since=times[3].isoformat(), until=times[2]) == [30, 20]
    assert len(run.log(since="1 day ago")) == 5
    assert not run.log(until="1 day ago")
    assert not run.log(since=times[0] + timedelta(seconds=1))


def test_metrics_are_tested(run: Repo) -> None:
    assert steps(run, metrics=["loss<5"]) == [40, 30, 20]
    assert steps(run, metrics=["loss<5", "loss>=3"]) == [30, 20]
    assert steps(run, 1, metrics=["loss>2"]) == [30]
    assert not run.log(metrics=["loss<1"])
    assert steps(run, metrics=["accuracy>0"], all_branches=True) == [35]
    with pytest.raises(NotFoundError, match="accuracy") as error:
        run.log(metrics=["accuracy>0"])
    assert error.value.hint == "use one of loss"


def test_commits_are_sorted(run: Repo) -> None:
    assert steps(run, reverse=True) == [10, 20, 30, 40, None]
    assert steps(run, 2, reverse=True) == [10, 20]
    assert steps(run, sort="loss") == [10, 30, 20, 40, None]
    assert steps(run, 2, sort="loss", reverse=True) == [40, 20]
    assert steps(run, sort="step", all_branches=True) == [40, 35, 30, 20, 10, None]
    assert steps(run, sort="time") == [None, 40, 30, 20, 10]
    sizes = [entry.stored_bytes for entry in run.log(sort="size")]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(NotFoundError, match="has the metric 'speed'"):
        run.log(sort="speed")


def test_an_empty_repository_lists_nothing(repo: Repo) -> None:
    assert repo.log(since="1h", sort="loss", metrics=["loss<3"], steps=(1, 2)) == []


def test_wrong_arguments_are_refused(run: Repo) -> None:
    wrong: list[dict[str, Any]] = [{"limit": "1..3"}, {"steps": "1..3"}, {"steps": 3}]
    for arguments in wrong:
        with pytest.raises(InvalidInputError):
            run.log(**arguments)
    assert run.log(metrics="loss>0") == run.log(metrics=["loss>0"])
