"""The tensors of a commit: their names, forms and errors, against what a checkout restores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptvcs import Repo
from tests.helpers.training import train


@pytest.fixture
def run(tmp_path: Path) -> Repo:
    """Four near commits; the last two have exact patches."""
    repo = Repo.init(tmp_path / "run")
    for state in train(4):
        repo.commit(state, step=state["step"])
    return repo


def test_errors_are_those_of_a_checkout(run: Repo) -> None:
    true = train(4)
    for step in (2, 4):
        for one in run.tensors(step):
            exact = true[step - 1]
            for key in one.name.split(":")[-1].split(".", 1)[:1]:
                assert key in exact
            restored = run.tensor(one.name, at=step)
            assert restored.numel() * restored.element_size() == one.size_bytes
            if one.part != "model":
                continue
            original = exact["model"][one.name.removeprefix("model.")]
            same = torch.equal(restored, original)
            assert same == (one.form == "exact")
            error = float((restored - original).double().norm() / original.double().norm())
            assert one.relative_error == pytest.approx(error, rel=1e-2, abs=1e-9)
    assert {one.form for one in run.tensors(2, only="model")} == {"near", "exact"}
    assert {one.form for one in run.tensors(4)} == {"exact"}


def test_tensors_are_chosen_by_name_and_part(run: Repo) -> None:
    names = [one.name for one in run.tensors(small=True)]
    assert set(names) > {one.name for one in run.tensors()}
    assert {one.name for one in run.tensors(small=True, only="model")} == {
        name for name in names if name.startswith("model.")
    }
    by_glob = [one.name for one in run.tensors("HEAD", "model.*weight", small=True)]
    assert by_glob == [n for n in names if n.startswith("model.") and n.endswith("weight")]
    assert [one.name for one in run.tensors("HEAD", "*.exp_avg", small=True)] == [
        name for name in names if name.endswith(".exp_avg")
    ]
    assert [one.name for one in run.tensors("HEAD", "exp_avg", small=True)] == [
        name for name in names if "exp_avg" in name
    ]
    # A glob may match the end of a name.
    assert [one.name for one in run.tensors("HEAD", "0.we?ght", small=True)] == ["model.0.weight"]
    assert not run.tensors("HEAD", "igh?", small=True)


def test_equal_tensors_have_equal_errors(tmp_path: Path) -> None:
    repo, draw = Repo.init(tmp_path / "twins"), torch.Generator().manual_seed(0)
    for step in range(4):
        weight = torch.randn(40, 40, generator=draw)
        moments = {n: {"exp_avg": weight * 0.1, "exp_avg_sq": weight**2} for n in range(2)}
        optimizer = {"state": moments, "param_groups": [{"params": [0, 1]}]}
        model = {"a.weight": weight, "b.weight": weight.clone()}
        repo.commit({"model": model, "optimizer": optimizer}, step=step)
    a, b = repo.tensors(1, only="model")
    assert a.form == b.form == "near"
    assert a.error == b.error is not None


def test_shared_tensors_have_aliases(repo: Repo) -> None:
    weight = torch.randn(40, 40)
    repo.commit({"model": {"embed.weight": weight, "head.weight": weight}})
    (one,) = repo.tensors("HEAD", "head*")
    assert one.name == "model.embed.weight"
    assert one.aliases == ("model.head.weight",)
