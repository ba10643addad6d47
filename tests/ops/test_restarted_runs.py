"""Which checkpoints of a folder are new, and which branch they go to, when a run begins again."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import Repo
from ckptvcs.checkpoint.grouping import family
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.lines import Lines
from ckptvcs.ops.refs import move_head
from ckptvcs.ops.watch import Watcher, WatchEvent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def near(tmp_path: Path) -> Repo:
    return Repo.init(tmp_path / "repo")


draws = itertools.count()


def save(run: Path, name: str, step: int | None = None) -> None:
    draw = torch.Generator().manual_seed(next(draws))
    state = {"model": {"w": torch.randn(60, 60, generator=draw)}}
    torch.save(state if step is None else state | {"step": step}, run / name)


def look(repo: Repo, run: Path, keep: int | None = None, **options: object) -> list[WatchEvent]:
    watcher = Watcher(
        handle(repo),
        run,
        settle=0,
        keep_local=keep,
        accept_near=True,
        **options,  # type: ignore[arg-type]
    )
    return [event for _ in range(2) for event in watcher.look()]


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


@pytest.mark.parametrize("skew", ["forward", "back", "still"])
def test_clocks_do_not_say_what_is_new(
    near: Repo, run: Path, skew: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = itertools.count(12, {"forward": 1, "back": -1, "still": 0}[skew])
    monkeypatch.setattr(
        "ckptvcs.ops.describe.now", lambda: f"2026-01-01T{next(hours):02}:00:00.000000Z"
    )
    for step in (500, 600, 700):
        save(run, f"step-{step}.pt")
        look(near, run)
    for step in (100, 200):
        save(run, f"step-{step}.pt")
        for path in run.iterdir():
            os.utime(path, ns=(1, 1))
        look(near, run, 2)
    assert names(run) == {"step-100.pt", "step-200.pt"}


def test_a_checkout_does_not_make_an_old_run_new(near: Repo, run: Path) -> None:
    for step in (500, 600, 100, 200):
        save(run, f"step-{step}.pt")
        look(near, run)
    move_head(handle(near), near.resolve("main"), "main")
    look(near, run, 2)
    assert names(run) == {"step-100.pt", "step-200.pt"}
    save(run, "step-300.pt")  # goes where HEAD is, and does not fit there
    look(near, run, 2)
    assert "step-300.pt" in names(run)


def test_a_name_that_is_written_anew_is_new(near: Repo, run: Path) -> None:
    watcher = Watcher(handle(near), run, settle=0, keep_local=2, accept_near=True)
    for step in (100, 200, 300, 100, 200):
        save(run, f"step-{step}.pt")
        for _ in range(2):
            list(watcher.look())
    assert names(run) == {"step-100.pt", "step-200.pt"}
    assert [entry.step for entry in near.log()] == [200, 100]


def test_a_run_that_goes_on_from_the_middle(near: Repo, run: Path) -> None:
    for step in (100, 200, 300, 400):
        save(run, f"step-{step}.pt")
        look(near, run)
    save(run, "step-300.pt")  # from step 200 again
    look(near, run, 3)
    assert names(run) == {"step-100.pt", "step-200.pt", "step-300.pt"}
    assert [entry.step for entry in near.log()] == [300, 200, 100]


def test_a_branch_that_is_asked_for(near: Repo, run: Path) -> None:
    near.commit({"w": torch.ones(9)}, step=1)
    for step in (500, 100, 200):
        save(run, f"step-{step}.pt")
        look(near, run, 2, branch="exp")
    assert names(run) == {"step-100.pt", "step-200.pt"}
    assert [entry.step for entry in near.log()] == [1]


def test_what_is_written_again_and_again_stays(near: Repo, run: Path) -> None:
    for step in (100, 200, 300):
        save(run, f"step-{step}.pt", step)
        save(run, "last.pt", step)
        save(run, "best_model.pt", min(step, 200))
        look(near, run, 1)
    assert names(run) == {"step-300.pt", "last.pt", "best_model.pt"}


def test_other_series_do_not_move_head(near: Repo, run: Path) -> None:
    for step in (100, 200, 300):
        for name in (f"step-{step}-ema.pt", f"step-{step}.pt", f"a-step-{step}.pt"):
            save(run, name)
        look(near, run)
    head = near.head()
    assert head is not None
    assert head.branch == "main"
    found = {}
    for branch in handle(near).refs.names("heads"):
        line = near.log(revision=branch)
        assert [entry.step for entry in line] == [300, 200, 100]
        (found[branch],) = {family(entry.message) for entry in line}
    assert sorted(found) == ["main", "main-2", "main-3"]
    assert set(found.values()) == {"step-#.pt", "step-#-ema.pt", "a-step-#.pt"}


@given(st.lists(st.sampled_from([100, 200, 300, 400]), min_size=1, max_size=7), st.integers(1, 3))
def test_the_last_ones_stay_whatever_their_steps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int
) -> None:
    """Each by a watch of its own, as after a restart."""
    folder = tmp_path_factory.mktemp("lines")
    repo, run = Repo.init(folder / "repo"), folder / "run"
    run.mkdir()
    for step in steps:
        save(run, f"step-{step}.pt")
        look(repo, run, keep)
        assert f"step-{step}.pt" in names(run)
    line = [f"step-{entry.step}.pt" for entry in repo.log()]
    assert set(line[:keep]) <= names(run)
    assert len(names(run)) <= keep


def test_shards_that_come_one_after_another_are_waited_for(near: Repo, run: Path) -> None:
    watcher = Watcher(handle(near), run, settle=0.3)
    for rank in range(4):
        save(run, f"step9-rank{rank}.pt")
        assert not list(watcher.look())
        assert watcher.waiting
        time.sleep(0.1)
    time.sleep(0.3)
    (event,) = watcher.look()
    assert (event.name, event.step) == ("step9-rank*.pt", 9)
    assert not watcher.waiting
    assert not list(watcher.look())
    with (run / "step10-rank0.pt").open("wb"):  # is being written
        save(run, "step10-rank1.pt")
        time.sleep(0.4)
        assert not list(watcher.look())
        time.sleep(0.4)
        assert not list(watcher.look())
    assert len(near.log(all_branches=True)) == 1


def test_commits_by_age(near: Repo) -> None:
    made = [near.commit({"w": torch.full((900,), float(n))}, step=n).id for n in (5, 6, 1, 2)]
    assert Lines(handle(near), None).by_age(reversed(made)) == made
    assert Lines(handle(near), "main").by_age(made) == [made[2], made[3], made[0], made[1]]
    assert Lines(handle(near), None).by_age([]) == []


def test_the_callback_keeps_what_the_present_run_writes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from ckptvcs.integrations.transformers import CkptCallback

    out, place = tmp_path / "out", tmp_path / "repo"

    def saved(callback: CkptCallback, step: int) -> None:
        folder = out / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        save(folder, "pytorch_model.bin")
        state = SimpleNamespace(
            is_world_process_zero=True, global_step=step, log_history=[], best_model_checkpoint=None
        )
        callback.on_save(SimpleNamespace(output_dir=str(out)), state, None)

    first = CkptCallback(place, keep_local=3, accept_near=True)
    for step in (2, 4, 6):
        saved(first, step)
    again = CkptCallback(place, keep_local=2, accept_near=True)
    for step in (2, 4, 6, 8):
        saved(again, step)
        assert f"checkpoint-{step}" in names(out)
    assert names(out) == {"checkpoint-6", "checkpoint-8"}
