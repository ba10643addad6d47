"""Dropped commits keep their data until the grace period ends, and undo restores them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ckptvcs.errors import ConflictError, InvalidInputError, NotFoundError
from ckptvcs.gc import sweep
from ckptvcs.gc.retention import Policy
from ckptvcs.history.records import DropRecord
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.comparing import same
from tests.helpers.states import adam_state, moved, weights

pytestmark = pytest.mark.any_backend

STEPS = 6


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    repo, now = Repo.init(tmp_path), weights()
    for step in range(1, STEPS + 1):
        repo.commit(adam_state(now, step), step=step, metrics={"loss": 1 / step})
        now = moved(now)
    return repo


def steps(repo: Repo) -> list[int | None]:
    return [entry.step for entry in repo.log()]


def packed(repo: Repo) -> int:
    return repo.stats().stored_bytes


@pytest.fixture
def week_passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes gc run as if eight days had passed."""
    time = (datetime.now(UTC) + timedelta(days=8)).isoformat()
    return lambda: monkeypatch.setattr("ckptvcs.ops.gc.current_time", lambda: time)


def test_data_of_dropped_commits_stays_and_undo_restores_it(repo: Repo) -> None:
    before = {step: repo.checkout(step) for step in range(1, STEPS + 1)}
    plan = repo.gc(Policy(last=2))
    assert steps(repo) == [6, 5]
    assert len(plan.waiting) == 4
    assert plan.waiting_bytes > 0
    repo.gc()  # nor does a later gc delete it
    assert repo.undo().what == "drop --keep-last 2 of 4 commits"
    assert steps(repo) == [6, 5, 4, 3, 2, 1]
    for step, state in before.items():
        assert same(repo.checkout(step), state)
    assert not repo.verify().damage


def test_gc_deletes_the_data_when_the_grace_period_has_ended(
    repo: Repo, week_passes: Callable[[], None]
) -> None:
    repo.gc(Policy(last=1))
    stored = packed(repo)
    week_passes()
    plan = repo.gc()
    assert not plan.waiting
    assert plan.freed_bytes == stored - packed(repo) > 0
    with pytest.raises(ConflictError, match="gc deleted"):
        repo.undo()
    assert not repo.verify().damage


def test_now_deletes_the_data_of_all_dropped_commits(repo: Repo) -> None:
    repo.gc(Policy(last=3))
    stored = packed(repo)
    plan = repo.gc(now=True)
    assert not plan.waiting
    assert plan.freed_bytes == stored - packed(repo) > 0
    assert not repo.verify().damage


def test_the_grace_period_is_a_setting(repo: Repo) -> None:
    repo.configure("gc-grace", "0s")
    assert not repo.gc(Policy(last=3)).waiting
    with pytest.raises(ConflictError, match="gc deleted"):
        repo.undo()
    for text in ("soon", "7", "-1d", "1e9d", ""):
        with pytest.raises(InvalidInputError, match="invalid time"):
            repo.configure("gc-grace", text)


def test_a_plan_counts_the_bytes_that_wait(repo: Repo) -> None:
    plan = repo.plan_gc(Policy(last=2))
    at_once = repo.plan_gc(Policy(last=2), now=True)
    later = plan.freed_bytes + plan.waiting_bytes  # the record has another time in it
    assert later == pytest.approx(at_once.freed_bytes, abs=20)
    assert not at_once.waiting
    assert {row.name for row in plan.decisions if row.action == "drop"} == set(plan.waiting)


def test_a_dropped_optimizer_waits_too(repo: Repo, week_passes: Callable[[], None]) -> None:
    before = repo.checkout(2)
    repo.gc(Policy(optimizer_last=1))
    repo.undo()
    assert same(repo.checkout(2), before)
    repo.gc(Policy(optimizer_last=1))
    stored = packed(repo)
    week_passes()
    repo.gc()
    assert packed(repo) < stored


def test_a_rekey_keeps_the_bases_of_commits_that_wait(
    repo: Repo, week_passes: Callable[[], None]
) -> None:
    before = {step: repo.checkout(step) for step in range(1, STEPS + 1)}
    repo.gc(Policy(every=3), rekey=True)
    repo.undo()
    for step, state in before.items():
        assert same(repo.checkout(step), state)
    plan = repo.gc(Policy(every=3), rekey=True)
    tables = [handle(repo).catalog.commit(name).parts["model"].values for name in plan.waiting]
    week_passes()
    repo.gc()  # the drop asked for the rekey
    assert not any(map(handle(repo).catalog.has_recipe, tables))
    for step in (3, 6):
        assert same(repo.checkout(step), before[step])
    assert not repo.verify().damage


def test_a_drop_without_a_valid_time_waits(repo: Repo) -> None:
    for step, time in ((1, "yesterday"), (2, "2020-01-01T00:00:00"), (3, "9999-01-01T00:00:00Z")):
        record = DropRecord("drop", (repo.resolve(step),), (), "--keep-last 3", time)
        handle(repo).catalog.record([record])
    assert len(repo.gc().waiting) == 3
    assert not repo.gc(now=True).waiting


def test_single_commits_are_dropped_and_restored(repo: Repo) -> None:
    before = {step: repo.checkout(step) for step in range(1, STEPS + 1)}
    plan = repo.drop(2, "4..5")
    assert steps(repo) == [6, 3, 1]
    assert sorted(repo.entry(name).step or 0 for name in plan.waiting) == [2, 4, 5]
    with pytest.raises(NotFoundError, match="was dropped"):
        repo.checkout(4)
    assert repo.undo().what == "drop by name of 3 commits"
    for step, state in before.items():
        assert same(repo.checkout(step), state)


def test_what_depended_on_a_dropped_commit_is_rekeyed(
    repo: Repo, week_passes: Callable[[], None]
) -> None:
    before = {step: repo.checkout(step) for step in range(1, STEPS + 1)}
    table = handle(repo).catalog.commit(repo.resolve(1)).parts["model"].values
    repo.drop(1)
    assert handle(repo).catalog.has_recipe(table)
    week_passes()
    repo.gc()
    assert not handle(repo).catalog.has_recipe(table)
    repo.drop(3, now=True)
    for step in (2, 4, 5, 6):
        assert same(repo.checkout(step), before[step])
    assert not repo.verify().damage


def test_a_commit_that_a_ref_or_a_rule_keeps_is_not_dropped(repo: Repo) -> None:
    repo.configure("keep-best", "loss:max")  # step 1
    repo.tag("v1", 2)
    repo.pin(3)
    for step, keeper in ((1, "best loss"), (2, "tag v1"), (3, "pin")):
        with pytest.raises(ConflictError, match=keeper):
            repo.drop(step)
    assert steps(repo) == [6, 5, 4, 3, 2, 1]
    repo.drop(5)
    assert steps(repo) == [6, 4, 3, 2, 1]
    with pytest.raises(NotFoundError, match="contains no commits"):
        repo.drop("7..9")


def test_a_drop_whose_data_is_gone_waits_no_longer(repo: Repo) -> None:
    repo.gc(Policy(last=3), now=True)
    assert not repo.gc().waiting
    repo.gc(Policy(last=2))
    assert len(repo.gc().waiting) == 1
    assert not repo.verify().damage


def test_a_branch_goes_back_when_its_newest_commits_are_dropped(repo: Repo) -> None:
    before = {step: repo.checkout(step) for step in range(1, STEPS + 1)}
    tip, side = repo.resolve(6), repo.branch("side", 4)
    repo.drop(4, 5, 6)
    assert steps(repo) == [3, 2, 1]
    assert {branch.step for branch in repo.branches()} == {3}
    assert len(repo.gc().waiting) == 3  # though no ref leads to them any more
    assert not repo.verify().damage
    assert repo.undo().commit == tip
    assert {branch.name: branch.commit for branch in repo.branches()} == {"main": tip, "side": side}
    for step, state in before.items():
        assert same(repo.checkout(step), state)
    assert not repo.verify().damage


def test_what_was_dropped_at_the_end_of_a_branch_is_deleted_after_the_grace_period(
    repo: Repo, week_passes: Callable[[], None]
) -> None:
    before, stored = repo.checkout(5), packed(repo)
    repo.drop(6)
    week_passes()
    assert not repo.gc().waiting
    assert packed(repo) < stored
    with pytest.raises(ConflictError, match="gc deleted"):
        repo.undo()
    repo.gc()
    assert Repo.open(repo.root).gc(now=True).freed_bytes <= 0
    assert same(repo.checkout(5), before)
    assert not repo.verify().damage


def test_training_goes_on_after_the_newest_commit_was_dropped(repo: Repo) -> None:
    repo.drop(6)
    repo.commit(adam_state(weights(), 6), step=6)
    assert steps(repo) == [6, 5, 4, 3, 2, 1]
    assert repo.undo().what.startswith("commit")
    assert steps(repo) == [5, 4, 3, 2, 1]
    assert repo.undo().what == "drop by name of 1 commit"
    assert steps(repo) == [6, 5, 4, 3, 2, 1]


def test_a_branch_that_moved_since_the_drop_stays_where_it_is(repo: Repo) -> None:
    repo.branch("side", 6)
    repo.drop(6)
    repo.move_head("side")
    made = repo.commit(adam_state(weights(), 7), step=7)
    repo.move_head("main")
    repo.undo()
    assert {branch.name: branch.step for branch in repo.branches()} == {"main": 6, "side": 7}
    assert repo.entry(made.id).commit.parent == repo.resolve(5)


def test_a_branch_keeps_a_commit_and_head_its_own(repo: Repo) -> None:
    with pytest.raises(ConflictError, match="every commit of branch 'main'"):
        repo.drop("..")
    repo.move_head(repo.resolve(4))
    with pytest.raises(ConflictError, match="HEAD keeps it"):
        repo.drop(4)
    assert steps(repo) == [4, 3, 2, 1]


def test_the_data_of_one_drop_is_deleted_and_that_of_others_waits(repo: Repo) -> None:
    catalog = handle(repo).catalog
    two, four = (catalog.commit(repo.resolve(step)).parts["model"].values for step in (2, 4))
    repo.drop(2)
    plan = repo.drop(4, now=True)
    assert [repo.entry(name).step for name in plan.waiting] == [2]
    assert plan.freed_bytes > 0
    catalog = handle(repo).catalog
    assert catalog.has_recipe(two)
    assert not catalog.has_recipe(four)
    assert not repo.verify().damage


def test_a_drop_on_another_branch_is_undone(repo: Repo) -> None:
    repo.branch("side", 5)
    repo.move_head("side")
    repo.commit(adam_state(weights(), 7), step=7)
    repo.commit(adam_state(weights(), 8), step=8)
    repo.move_head("main")
    repo.drop("side~1")
    assert repo.undo().what == "drop by name of 1 commit"
    assert [entry.step for entry in repo.log(branch="side")][:2] == [8, 7]
    assert steps(repo)[0] == 6


def test_an_earlier_drop_is_undone_if_the_data_of_the_last_one_is_gone(repo: Repo) -> None:
    repo.drop(2)
    repo.drop(4, now=True)
    repo.undo()
    assert steps(repo) == [6, 5, 3, 2, 1]
    with pytest.raises(ConflictError, match="gc deleted"):
        repo.undo()


def test_the_data_of_one_drop_goes_and_commits_that_undo_left_stay(repo: Repo) -> None:
    tip = repo.resolve(6)
    repo.undo()
    repo.drop(3, now=True)
    repo.branch("kept", tip)
    assert [entry.step for entry in repo.log(branch="kept")] == [6, 5, 4, 2, 1]
    assert not repo.verify().damage


def test_an_interrupted_drop_says_that_it_dropped(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "plan_merges", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            repo.drop(2, 3, now=True)
    assert caught.value.__notes__ == ["dropped 2 commits"]
    repo.gc(now=True)
    assert not repo.verify().damage
