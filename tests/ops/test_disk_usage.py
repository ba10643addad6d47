"""Every byte on disk is counted once, and belongs to what wrote it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ckptvcs import InvalidInputError, Policy, Repo
from ckptvcs.ops.disk_usage import GROUPS
from ckptvcs.ops.layers import layer_of
from tests.helpers.training import train

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def run(tmp_path: Path) -> Repo:
    """Six near commits, a tag, and a branch."""
    repo = Repo.init(tmp_path / "run")
    states = train(7)
    for state in states[:6]:
        repo.commit(state, step=state["step"])
    repo.tag("first", 1)
    repo.branch("side", 3)
    repo.move_head("side")
    repo.commit(states[6], step=7)
    repo.move_head("main")
    return repo


def assert_sums_agree(repo: Repo) -> None:
    stats = repo.stats()
    for by in GROUPS:
        found = repo.disk_usage(by=by)
        assert found.size_bytes == stats.stored_bytes + stats.cache_bytes
        assert sum(row.size_bytes for row in found.rows) == found.size_bytes
        assert all(sum(row.kinds.values()) == row.size_bytes > 0 for row in found.rows)
        for kind, expected in (("patch", stats.patch_bytes), ("cache", stats.cache_bytes)):
            assert sum(row.kinds.get(kind, 0) for row in found.rows) == expected


def test_sums_are_those_of_stats(run: Repo) -> None:
    assert_sums_agree(run)
    run.gc(Policy(last=2))
    assert_sums_agree(run)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/store")))
def test_sums_are_those_of_stats_in_old_repositories(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name / "store", tmp_path / ".ckpt")
    repo = Repo.open(tmp_path)
    assert_sums_agree(repo)
    assert not any("unused" in row.kinds for row in repo.disk_usage().rows)


def test_a_commit_owns_what_it_added(run: Repo) -> None:
    usage = run.disk_usage(by="commit")
    commits = {row.step: row for row in usage.rows if row.commit is not None}
    assert [*commits] == [7, 6, 5, 4, 3, 2, 1]
    for entry in run.log(all_branches=True):
        row = commits[entry.step]
        assert row.size_bytes - row.kinds.get("patch", 0) == entry.stored_bytes
    assert "keyframe" in commits[1].kinds
    assert "delta" not in commits[1].kinds
    assert commits[6].kinds["delta"] > 0
    assert commits[6].kinds["patch"] == run.show(6).commit.patch_bytes
    assert "patch" not in commits[2].kinds
    alone = run.disk_usage([6, "side"], by="commit")
    assert [row.size_bytes for row in alone.rows] == [commits[step].size_bytes for step in (7, 6)]


def test_bytes_have_parts_layers_and_tensors(run: Repo) -> None:
    parts = {row.name for row in run.disk_usage(by="part").rows}
    assert {"model", "optimizer", "rest", "structure", "refs"} <= parts
    layers = {row.name: row for row in run.disk_usage(by="layer").rows}
    tensors = {row.name: row for row in run.disk_usage(by="tensor").rows}
    moments = [tensors[f"optimizer.state.{n}.exp_avg"].kinds["exp_avg"] for n in (0, 1)]
    assert layers["model.0"].kinds["exp_avg"] == sum(moments)
    assert tensors["model.0.weight"].kinds["keyframe"] > 1000
    with pytest.raises(InvalidInputError, match="unknown group"):
        run.disk_usage(by="colour")


def test_lost_objects_are_unused(run: Repo) -> None:
    run.delete_branch("side")
    kinds = {row.name for row in run.disk_usage().rows}
    assert "unused" in kinds
    assert_sums_agree(run)
    run.gc()
    assert "unused" not in {row.name for row in run.disk_usage().rows}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.attn.q.weight", "model.layers.3"),
        ("gpt_neox.layers.11.mlp.bias", "gpt_neox.layers.11"),
        ("model.0.weight", "model.0"),
        ("model.embed.weight", "model.embed"),
        ("model.experts.2.layers.7.weight", "model.experts.2"),
        ("weight", "weight"),
        ("a/model.safetensors:h.5.ln.weight", "a/model.safetensors:h.5"),
        ("state.5", "state"),
    ],
)
def test_the_layer_ends_with_the_first_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer
