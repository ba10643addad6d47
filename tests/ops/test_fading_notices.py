"""A commit says how long it stays exact, and which commits become near because of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptvcs.gc.retention import Policy
from ckptvcs.repo import Repo
from tests.helpers.states import adam_state, moved, weights

Notices = tuple[tuple[tuple[int | None, int], ...], tuple[str, ...]]


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo.init(tmp_path)


def commit(repo: Repo, tmp_path: Path, step: int, *, bad: bool = False) -> Notices:
    torch.manual_seed(step)
    state = adam_state(moved(weights(), 1e-3 * step), step)
    if bad:
        state["model"]["layer0"][0, :3] = float("nan")
    path = tmp_path / f"{step}.pt"
    torch.save(state, path)
    result = repo.commit_path(path, message="", metrics={"loss": float(step)})
    return tuple((row.commit.step, row.freed_bytes) for row in result.faded), result.notes


def lasting(repo: Repo) -> dict[int | None, bool]:
    return {entry.step: entry.exact_lasts for entry in repo.log() if entry.exact}


def test_a_commit_names_the_commits_that_become_near(repo: Repo, tmp_path: Path) -> None:
    for step in (1, 2):
        faded, _ = commit(repo, tmp_path, step)
        assert faded == ()
    patch = repo.log()[-1].exact_bytes
    assert patch > 0
    faded, _ = commit(repo, tmp_path, 3)
    assert faded == ((1, patch),)
    assert [entry.exact_bytes > 0 for entry in repo.log()] == [True, True, False]


def test_gc_names_the_commits_that_become_near(repo: Repo, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(repo, tmp_path, step)
    repo.configure("keep-exact", "1")
    sizes = {entry.id: entry.exact_bytes for entry in repo.log()}
    plan = repo.gc(Policy())
    assert [(row.id, row.freed_bytes) for row in plan.faded] == [
        (repo.resolve(2), sizes[repo.resolve(2)])
    ]


def test_what_keeps_a_commit_exact_for_good(repo: Repo, tmp_path: Path) -> None:
    commit(repo, tmp_path, 1)
    commit(repo, tmp_path, 2)
    assert lasting(repo) == {2: False, 1: False}
    repo.tag("v1", 1)
    repo.pin(2)
    assert lasting(repo) == {2: True, 1: True}
    repo.pin(2, pinned=False)
    repo.configure("tag-fidelity", "weights")
    assert lasting(repo) == {2: False, 1: False}
    repo.configure("keep-best", "loss:max")
    assert lasting(repo) == {2: True, 1: False}


def test_a_lossless_commit_stays_exact(repo: Repo, tmp_path: Path) -> None:
    repo.configure("codec", "lossless")
    commit(repo, tmp_path, 1)
    (entry,) = repo.log()
    assert (entry.exact, entry.exact_lasts, entry.exact_bytes) == (True, True, 0)


def test_unreadable_settings_promise_nothing(repo: Repo, tmp_path: Path) -> None:
    commit(repo, tmp_path, 1)
    repo.tag("v1", 1)
    (repo.folder / "config.toml").write_text("codec =")
    (entry,) = Repo.open(repo.folder).log()
    assert entry.exact
    assert not entry.exact_lasts


def test_values_that_are_not_finite_are_counted(repo: Repo, tmp_path: Path) -> None:
    assert commit(repo, tmp_path, 1)[1] == ()
    for step in (2, 3):  # each time: nobody may have seen the first note
        _, notes = commit(repo, tmp_path, step, bad=True)
        assert "3 values are NaN or infinite in the weights and moments" in notes
