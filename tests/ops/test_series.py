"""Statistics of tensors along a history, against those of torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ckptvcs import InvalidInputError, NotFoundError, Repo
from ckptvcs.ops.series import STATISTICS
from tests.helpers.training import train


@pytest.fixture
def run(repo: Repo) -> Repo:
    for state in train(4):
        repo.commit(state, step=10 * state["step"])
    return repo


def test_statistics_are_those_of_torch(run: Repo) -> None:
    states = train(4)
    rows = list(run.statistics("0.weight", STATISTICS))
    assert [entry.step for entry, _ in rows] == [10, 20, 30, 40]
    for (_, values), state in zip(rows, states, strict=True):
        true = state["model"]["0.weight"].double()
        assert values["model.0.weight"] == pytest.approx(
            {
                "norm": float(true.norm()),
                "mean": float(true.mean()),
                "std": float(true.std(correction=0)),
                "min": float(true.min()),
                "max": float(true.max()),
                "absmax": float(true.abs().max()),
                "rms": float(true.norm()) / math.sqrt(true.numel()),
                "zeros": 0,
                "not_finite": 0,
            }
        )


def test_a_glob_chooses_several_tensors_and_a_range_some_commits(run: Repo) -> None:
    rows = list(run.statistics("model.*.weight", ["max"], start=20, stop=30))
    assert [entry.step for entry, _ in rows] == [20, 30]
    weights = [f"model.{n}.weight" for n in (0, 2, 3, 4)]
    assert all([*values] == weights for _, values in rows)
    assert all([*one] == ["max"] for _, values in rows for one in values.values())
    assert len(list(run.statistics("*", every=40))) == 1


def test_commits_without_the_tensor_are_left_out(repo: Repo) -> None:
    values: list[dict[str, Any]] = [
        {"a": torch.tensor([1.0, math.nan, -math.inf])},
        {"b": torch.zeros(300)},
        {"a": torch.full((300,), math.nan)},
    ]
    for step, state in enumerate(values):
        repo.commit(state, step=step)
    rows = list(repo.statistics("a", ["norm", "not_finite", "absmax", "rms"]))
    assert [(entry.step, values["a"]) for entry, values in rows] == [
        (0, {"norm": 1, "not_finite": 2, "absmax": 1, "rms": 1}),
        (2, {"norm": None, "not_finite": 300, "absmax": None, "rms": None}),
    ]


def test_a_shared_tensor_is_measured_once(repo: Repo) -> None:
    weight = torch.randn(40, 40)
    repo.commit({"embed.weight": weight, "head.weight": weight})
    ((_, values),) = repo.statistics("*.weight")
    assert [*values] == ["embed.weight"]


def test_unknown_names_are_refused(run: Repo) -> None:
    with pytest.raises(InvalidInputError, match="unknown statistic 'sum'"):
        run.statistics("0.weight", ["sum"])
    for name in ("1.weight", "layer*"):
        with pytest.raises(NotFoundError):
            run.statistics(name)
    with pytest.raises(InvalidInputError, match="ambiguous"):
        run.statistics("weight")
