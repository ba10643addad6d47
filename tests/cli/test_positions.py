"""Commands say where HEAD is, which branches are ahead of it, and how to get back to them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptvcs import Repo
from tests.helpers.command_line import Ckpt


@pytest.fixture
def older(ckpt: Ckpt, history: Path) -> Path:
    """The five commits, with HEAD at the second."""
    ckpt("checkout", 2)
    return history


def test_a_detached_head_is_told_with_the_branches_ahead_of_it(ckpt: Ckpt, older: Path) -> None:
    ckpt("branch", "side", 3)
    ckpt("branch", "below", 1)
    assert Repo.open(older).newer() == {"main": 3, "side": 1}
    ahead = "main is 3 commits ahead, side is 1 commit ahead"
    assert f"at {Repo.open(older).resolve(2)[:8]} (step 2)\n  {ahead}\n" in ckpt("status").out
    for options in ([], ["-n", 1], ["--graph"]):
        assert ckpt("log", *options).err.splitlines()[0] == f"note: HEAD is detached; {ahead}"
    assert ckpt("log", "main").err == ""
    ckpt("checkout", "main")
    assert ckpt("log").err == ""


@pytest.mark.parametrize("revision", ["main", "main-2", "HEAD", "4"])
def test_the_newest_commit_of_a_branch_names_it(ckpt: Ckpt, older: Path, revision: str) -> None:
    shutil.copy(older / "model.pt", older / "other.pt")
    ckpt("commit", "other.pt", "--step", 9)
    branch = {"main": "main", "main-2": "main-2", "HEAD": "main-2"}.get(revision)
    assert ckpt("show", revision, "--json").json["branch"] == branch
    if branch is not None:
        assert ckpt("log", revision, "-n", 1, "--json").json[0]["branch"] == branch


def test_undo_says_how_to_leave_a_branch_that_began_by_accident(ckpt: Ckpt, older: Path) -> None:
    ckpt("commit", "model.pt", "--step", 9)
    failed = ckpt("undo", code=3)
    assert failed.err.splitlines()[0] == "error: nothing to undo on branch 'main-2'"
    hint = failed.err.splitlines()[1]
    commands = [part.split() for part in hint.split("'") if part.startswith("ckpt ")]
    assert len(commands) == 2
    for _, *words in commands:
        ckpt(*words)
    assert [row["name"] for row in ckpt("branch", "--json").json] == ["main"]
    assert ckpt("status", "--json").json["branch"] == "main"
    assert (older / "model.pt").is_file()


def test_undo_does_not_send_away_from_the_first_branch(ckpt: Ckpt, older: Path) -> None:
    ckpt("checkout", "-b", "side")
    ckpt("checkout", "main")
    for _ in range(4):
        ckpt("undo")
    assert ckpt("undo", code=3).err == "error: nothing to undo on branch 'main'\n"


def test_undo_of_the_only_branch_gives_no_hint(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    ckpt("commit", "a.pt")
    assert ckpt("undo", code=3).err == "error: nothing to undo on branch 'main'\n"


@pytest.mark.parametrize("form", ["exact", "near"])
def test_status_compares_the_file_of_a_state(ckpt: Ckpt, tmp_path: Path, form: str) -> None:
    with Repo.init(tmp_path, codec="near" if form == "near" else "lossless") as repo:
        repo.configure("keep-exact", "0" if form == "near" else "1")
        for step in (1, 2):
            weights = np.random.default_rng(step).standard_normal(4000, np.float32)
            moments = {"exp_avg": weights * 1e-3, "exp_avg_sq": weights**2, "step": step}
            repo.commit({"model": {"w": weights}, "optimizer": {"state": {0: moments}}}, step=step)
        assert repo.show().exact is (form == "exact")
    assert "no file to compare" in ckpt("status").out
    ckpt("checkout", 2)
    same = "near form of the commit" if form == "near" else "no changes: the files match HEAD"
    assert same in ckpt("status").out
    shutil.rmtree(tmp_path / ".ckpt" / "cache")  # with the notes of what checkouts wrote
    assert same in ckpt("status").out
    state = bytearray((tmp_path / "state.pt").read_bytes())
    for changed in (state[:-1], bytes([state[0] ^ 1]) + state[1:]):
        (tmp_path / "state.pt").write_bytes(changed)
        assert "changed: state.pt" in ckpt("status").out


def test_no_ratio_rounds_to_nothing(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    (tmp_path / "few.txt").write_bytes(b"12345")
    assert "(<0.1x)" in ckpt("commit", "few.txt").out
    assert "0.0x" not in ckpt("log").out + ckpt("show").out + ckpt("stats").out


@pytest.mark.parametrize("codec", ["near", "lossless"])
@pytest.mark.parametrize("command", [["commit", "run/step-1.pt"], ["import", "run"]])
def test_values_that_are_not_finite_are_told(
    ckpt: Ckpt, tmp_path: Path, codec: str, command: list[str]
) -> None:
    ckpt("init", "--codec", codec)
    weights = torch.ones(100, 100)
    weights[0, :2] = float("inf")
    (tmp_path / "run").mkdir()
    torch.save({"model": {"w": weights}}, tmp_path / "run" / "step-1.pt")
    assert "2 values are NaN or infinite" in ckpt(*command).err
    assert ckpt("log").out.splitlines()[1].endswith("NaN")


def test_watch_tells_values_that_are_not_finite(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    (tmp_path / "run").mkdir()
    torch.save({"model": {"w": torch.full((50, 50), float("nan"))}}, tmp_path / "run" / "1.pt")
    done = ckpt("watch", "run", "--once", "--settle", 0)
    assert "2500 values are NaN or infinite" in done.err
