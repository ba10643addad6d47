"""Whatever a run does, the error of its near forms stays within the bounds."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.decode.part_reader import PartReader
from ckptvcs.errors import InvalidInputError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.states import adam_state, weights

State = dict[str, Any]

EVENTS = [
    "step",
    "step",
    "big step",
    "spike",
    "warm up",
    "reset layer",
    "reset all",
    "zero",
    "resize",
    "add",
    "remove",
    "half",
    "reset moments",
    "frozen",
]


def happen(event: str, now: dict[str, torch.Tensor], draw: torch.Generator) -> None:
    """What a run can do to its weights between two commits."""

    def noise(value: torch.Tensor, size: float) -> torch.Tensor:
        return torch.randn(value.shape, generator=draw).to(value.dtype) * size

    sizes = {"big step": 0.05, "spike": 1.0, "warm up": 1e-7, "frozen": 0.0, "zero": 1e-3}
    size = sizes.get(event, 1e-3)
    for name, value in now.items():
        now[name] = (value.float() + noise(value.float(), size)).to(value.dtype)
    names = sorted(now)
    picked = names[int(torch.randint(len(names), (1,), generator=draw))]
    if event == "reset layer":
        now[picked] = noise(now[picked], 1.0)
    if event == "reset all":
        for name, value in now.items():
            now[name] = noise(value, 0.02)
    if event == "zero":
        now[picked] = torch.zeros_like(now[picked])
    if event == "resize":
        now[picked] = torch.randn(50, 40, generator=draw)
    if event == "add":
        now[f"new{len(now)}"] = torch.randn(60, 30, generator=draw)
    if event == "remove" and len(now) > 1:
        del now[picked]
    if event == "half":
        kind = torch.float32 if now[picked].dtype == torch.bfloat16 else torch.bfloat16
        now[picked] = now[picked].to(kind)


def relative(true: State, back: State) -> float:
    error = sum(float((true[n].double() - back[n].double()).square().sum()) for n in true)
    size = sum(float(value.double().square().sum()) for value in true.values())
    return float((error / size) ** 0.5) if size else 0.0


@given(
    st.lists(st.sampled_from(EVENTS), min_size=1, max_size=3),
    st.integers(0, 1 << 30),
    st.sampled_from([0.1, 0.01, 1e-4]),
    st.sampled_from([1.0, 0.3, 0.05]),
    st.sampled_from(["near", "near:step=4,zone=0.66"]),
)
def test_bounds_hold_on_any_trajectory(
    events: list[str], seed: int, weight: float, update: float, codec: str
) -> None:
    draw = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        repo = Repo.init(folder, codec=codec)
        repo.configure("max-weight-error", str(weight))
        repo.configure("max-update-nmse", str(update))
        repo.configure("keyframe-depth", "2")
        now = {"a": torch.randn(50, 40) * 0.05, "b": torch.randn(300) + 1, "c": torch.randn(30, 20)}
        for step, event in enumerate(["step", *events]):
            happen(event, now, draw)
            entry = repo.commit(adam_state(now, step), step=step)
            near: Any = PartReader(handle(repo).restorer(entry.id, near=True)).state()
            assert relative(now, near["model"]) <= weight * 1.0001
            assert entry.commit.error.weight_rel <= weight
            assert entry.commit.error.update_nmse <= update
            assert entry.commit.depth <= 2


def test_a_bound_costs_bytes_and_only_where_it_is_needed(tmp_path: Any) -> None:
    sizes = {}
    for bound in ("off", "0.1", "1e-4"):
        repo = Repo.init(tmp_path / bound)
        repo.configure("max-weight-error", bound)
        draw, now = torch.Generator().manual_seed(0), weights()
        for step in range(4):
            happen("step", now, draw)
            sizes[bound] = repo.commit(adam_state(now, step), step=step).stored_bytes
    assert sizes["off"] == pytest.approx(sizes["0.1"], rel=0.01)
    assert sizes["1e-4"] > 1.5 * sizes["0.1"]


def test_what_moved_further_than_its_own_size_is_a_keyframe(tmp_path: Any) -> None:
    repo, now, draw = Repo.init(tmp_path), weights(), torch.Generator().manual_seed(0)
    kinds = []
    for step, event in enumerate(["step", "step", "reset all", "step", "add", "step"]):
        happen(event, now, draw)
        if event == "reset all":
            now = {name: value * 50 for name, value in now.items()}
        kinds.append(repo.commit(adam_state(now, step), step=step).commit.kind)
    assert kinds == ["keyframe", "delta", "keyframe", "delta", "keyframe", "delta"]


def test_excp_keeps_no_bounds(tmp_path: Any) -> None:
    repo = Repo.init(tmp_path, codec="excp")
    repo.commit(adam_state(weights(), 1), step=1)
    repo.configure("max-weight-error", "0.1")
    with pytest.raises(InvalidInputError, match="does not support error bounds"):
        repo.commit(adam_state(weights(), 2), step=2)
