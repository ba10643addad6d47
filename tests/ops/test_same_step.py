"""A step that is there already: what is of the same run stays on its line, what is not does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs import Repo
from ckptvcs.ops.history_reader import handle
from tests.helpers.training import train

pytestmark = pytest.mark.any_backend

Change = Callable[[dict[str, Any]], object]


def _move_weights(state: dict[str, Any]) -> None:
    state["model"]["0.weight"][0] += 1


def _move_moments(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["exp_avg"][0] += 1


def _leave_moments(state: dict[str, Any]) -> None:
    del state["optimizer"]


def _write_besides(state: dict[str, Any]) -> None:
    state["last"] = "a/b/last.pt"


@pytest.mark.parametrize(
    ("change", "branch", "shares"),
    [
        (_write_besides, "main", True),
        (_move_moments, "main", False),
        (_leave_moments, "main", False),
        (_move_weights, "main-2", False),
    ],
)
@pytest.mark.parametrize("codec", ["near", "lossless"])
def test_another_file_of_a_step(
    tmp_path: Path, codec: str, change: Change, branch: str, shares: bool
) -> None:
    repo = Repo.init(tmp_path / "repo", codec=codec)
    states = train(4)
    paths = []
    for number, state in enumerate([*states[:2], copy.deepcopy(states[1]), states[3]]):
        if number == 2:
            change(state)
        paths.append(tmp_path / f"{number}.pt")
        torch.save(state, paths[-1])
    made = [repo.commit_path(path, message="") for path in paths]
    assert [one.commit.step for one in made] == [1, 2, 2, 4]
    assert [one.branch for one in made] == ["main", "main", branch, branch]
    assert (made[2].commit.parts == made[1].commit.parts) == shares
    if shares:
        assert made[2].commit.data_bytes == made[2].commit.patch_bytes == 0
        assert made[2].commit.error == made[1].commit.error
        assert handle(repo).history.errors(made[2].id) == handle(repo).history.errors(made[1].id)
    for one, path in zip(made[2:], paths[2:], strict=True):
        repo.checkout_files(one.id, tmp_path / "again.pt", force=True)
        assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()
    assert not repo.verify().damage


def test_text_is_no_step_of_a_run(repo: Repo, tmp_path: Path) -> None:
    for text, branch in (("a", "main"), ("b", "main-2")):
        (tmp_path / "a.txt").write_text(text)
        assert repo.commit_path(tmp_path / "a.txt", message="", step=1).branch == branch
