"""The next step of an optimizer as it is measured; what lossy coding must never do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.checkpoint.optimizer_state import MOMENTS, Rule, rule_of
from ckptvcs.codec.words import from_float32
from ckptvcs.encode.measure import difference, measure_step
from ckptvcs.encode.near import is_implausible
from ckptvcs.encode.updates import orthogonal, steps_of, takes_matrices
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo

Make = Callable[[list[torch.nn.Parameter]], Any]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, 1.0, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 1.0, betas=(0.9, 0.95)),
    "AdamW": lambda p: torch.optim.AdamW(p, 1.0, weight_decay=0),
    "amsgrad": lambda p: torch.optim.Adam(p, 1.0, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 1.0),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1.0),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, 1.0, centered=True, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_that_of_the_optimizer(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2000, generator=draw))
    optimizer = OPTIMIZERS[name]([weight])
    scale = torch.rand(2000, generator=draw) + 0.1
    for _ in range(400):
        weight.grad = scale * torch.randn(2000, generator=draw)
        optimizer.step()
    held = optimizer.state[weight]
    moments = {k: v.numpy().copy() for k, v in held.items() if k in MOMENTS and v.dim()}
    rule = rule_of(optimizer.param_groups[0], held)
    gradient = scale * torch.randn(2000, generator=draw)
    before = weight.detach().clone()
    weight.grad = gradient.clone()
    optimizer.step()
    true = (before - weight.detach()).numpy()
    (step,) = steps_of(rule, moments)
    found = step(rule, moments, gradient.numpy())
    if name == "SGD":  # nothing divides: the gradient is the same for both
        found = 0.9 * found + gradient.numpy()
    assert np.corrcoef(true, found)[0, 1] > 0.999


def test_the_step_of_muon_is_that_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(40, 60))
    optimizer: Any = torch.optim.Muon(
        [weight], lr=1.0, momentum=0.9, weight_decay=0, nesterov=False
    )
    weight.grad = torch.randn(40, 60, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    rule = rule_of(optimizer.param_groups[0], optimizer.state[weight])
    assert rule.kind == "muon"
    buffer = optimizer.state[weight]["momentum_buffer"].numpy()
    assert takes_matrices(rule, {"momentum_buffer": buffer})
    found = orthogonal(buffer.reshape(-1), 60, 0)
    assert found is not None
    true = -weight.detach().numpy()
    assert np.corrcoef(true.reshape(-1), found.reshape(-1))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("keys", "group", "kind"),
    [
        ({"exp_avg", "exp_avg_sq", "step"}, {"betas": (0.9, 0.99)}, "adam"),
        ({"exp_avg", "exp_avg_sq", "exp_avg_lr"}, {"betas": (0.9, 0.99)}, ""),
        ({"exp_avg"}, {"betas": (0.9, 0.99)}, "lion"),
        ({"exp_avg"}, {}, ""),
        ({"momentum_buffer"}, {"momentum": 0.95, "ns_steps": 5}, "muon"),
        ({"momentum_buffer"}, {"momentum": 0.9, "dampening": 0}, "sgd"),
        ({"momentum_buffer"}, {}, ""),
    ],
)
def test_an_optimizer_is_known_by_its_groups_and_states(
    keys: set[str], group: dict[str, Any], kind: str
) -> None:
    assert rule_of(group, keys).kind == kind


def test_of_an_unknown_optimizer_the_worst_step_counts() -> None:
    draw = np.random.default_rng(0)
    true = draw.standard_normal(4000).astype(np.float32)
    near = np.where(np.abs(true) > 1, true, 0).astype(np.float32)
    errors = {
        kind: measure_step(Rule(kind=kind), {"exp_avg": true}, {"exp_avg": near}, 4000)
        for kind in ("sgd", "lion", "")
    }
    nmse = {kind: e.update_error / e.update_energy for kind, e in errors.items()}
    assert nmse["sgd"] < 0.25 < 0.6 < nmse["lion"]
    assert nmse[""] == max(nmse.values())


def test_a_step_that_is_no_number_is_beyond_any_bound() -> None:
    true, near = np.ones(4, np.float32), np.array([1, 1, 1, np.nan], np.float32)
    assert difference(true, near, 4).update_error > 1e5 * 4
    assert difference(near, true, 4).update_error == 0  # where the original is no better
    far = np.array([1, 3, 1, 1], np.float32)
    assert difference(near, far, 4).update_error == 4


@given(st.integers(0, 1 << 30), st.sampled_from([-1, 0, 1]), st.floats(0, 2))
def test_no_form_leaves_the_sign_or_loses_squares(seed: int, sign: int, noise: float) -> None:
    draw = np.random.default_rng(seed)
    true = draw.standard_normal(200).astype(np.float32)
    true = np.abs(true) * sign if sign else true
    near = (true + noise * draw.standard_normal(200)).astype(np.float32)
    wrong = (sign > 0 and (near < 0).any()) or (sign < 0 and (near > 0).any())
    assert is_implausible(true, near, squared=False) == wrong
    squares = np.square(true)
    lost = np.where(squares > 0.5, 0, squares).astype(np.float32)
    assert is_implausible(squares, lost, squared=True) == bool((squares > 0.5).any())
    assert not is_implausible(squares, squares * 2, squared=True)


@pytest.mark.parametrize("form", ["centered", "plain"])
def test_a_centred_rmsprop_goes_on_without_nan(form: str, tmp_path: Path) -> None:
    """Its root is of a difference of two moments."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(96, 128, generator=draw))

    def make() -> Any:
        return torch.optim.RMSprop([weight], 1e-3, centered=form == "centered")

    optimizer, repo = make(), Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    drift = torch.randn(96, 128, generator=draw)
    for step in range(1, 5):
        for _ in range(20):
            weight.grad = drift + 0.1 * torch.randn(96, 128, generator=draw)
            optimizer.step()
        repo.commit(
            {"model": {"w": weight.detach()}, "optimizer": optimizer.state_dict()}, step=step
        )
    again = make()
    again.load_state_dict(repo.checkout(4)["optimizer"])
    weight.grad = drift.clone()
    again.step()
    assert weight.isfinite().all()


# -- first commits ---------------------------------------------------------------------------------


def weights(seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {"model": {f"{n}.weight": torch.randn(80, 90, generator=draw) for n in range(3)}}


def test_siblings_committed_one_after_another_are_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    for seed in range(4):
        repo.commit(weights(seed), step=seed)
    for seed in range(4):
        back = repo.checkout(seed)
        assert all(torch.equal(back["model"][k], w) for k, w in weights(seed)["model"].items())
    said = [record.message for record in caplog.records]
    assert sum("nothing to do with those of the parent" in line for line in said) == 3
    assert sum("shows that they are in training" in line for line in said) == 4


def test_an_unrelated_checkpoint_in_training_has_a_step_of_its_own(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    for seed in range(2):
        state = weights(seed)
        moments = {
            n: {"exp_avg": 1e-3 * w, "exp_avg_sq": 1e-6 * w.square()}
            for n, w in enumerate(state["model"].values())
        }
        group = {"params": [*moments], "betas": (0.9, 0.999)}
        repo.commit({**state, "optimizer": {"state": moments, "param_groups": [group]}}, step=seed)
    first, second = (entry.commit for entry in repo.log()[::-1])
    assert second.kind == "keyframe"
    assert 0 < second.error.weight_rel < 2 * first.error.weight_rel < 0.005


def test_float64_keeps_the_bits_of_what_does_not_move(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    first = draw.standard_normal((64, 80))
    second = first.copy()
    second[:32] += 1e-3 * draw.standard_normal((32, 80))
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    for step, values in enumerate((first, second), 1):
        repo.commit({"model": {"w": torch.from_numpy(values)}}, step=step)
    back = repo.checkout(2)["model"]["w"].numpy()
    assert back[32:].tobytes() == second[32:].tobytes()
    assert 0 < np.abs(back[:32] - second[:32]).max() < 3e-3
    assert from_float32(back.reshape(-1).astype(np.float32), "F64").dtype == np.uint64
    repo.close()


def test_a_copy_of_a_tensor_has_its_error(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 80, generator=draw)
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    for step in range(1, 3):
        weight = weight + 1e-3 * torch.randn(64, 80, generator=draw)
        entry = repo.commit({"model": {"a": weight, "b": weight.clone()}}, step=step)
    first, second = handle(repo).history.errors(entry.id).values()
    assert first == second
    assert first.weight_rel == pytest.approx(entry.commit.error.weight_rel, rel=1e-2)


def test_complex_and_real_moments_of_one_parameter_are_coded_apart(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    for step in range(1, 4):
        weight = torch.randn(64, 64, dtype=torch.cfloat, generator=draw)
        state = {0: {"exp_avg": 0.1 * weight, "exp_avg_sq": weight.abs() ** 2}}
        optimizer = {"state": state, "param_groups": [{"params": [0], "betas": (0.9, 0.99)}]}
        repo.commit({"model": {"w": weight}, "optimizer": optimizer}, step=step)
    back = repo.checkout(2)["optimizer"]["state"][0]
    assert back["exp_avg"].dtype == torch.cfloat
    assert (back["exp_avg_sq"] > 0).all()
    assert not repo.verify().damage


def test_float64_numbers_below_those_of_float32_are_exact(tmp_path: Path) -> None:
    tiny = 1e-50 * torch.randn(64, 64, dtype=torch.float64)
    state = {0: {"momentum_buffer": tiny}}
    optimizer = {"state": state, "param_groups": [{"params": [0], "momentum": 0.9}]}
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    repo.commit(
        {"model": {"w": torch.randn(64, 64, dtype=torch.float64)}, "optimizer": optimizer}, step=1
    )
    assert torch.equal(repo.checkout(1)["optimizer"]["state"][0]["momentum_buffer"], tiny)


def test_a_new_head_on_weights_that_stay_makes_no_first_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo, body = Repo.init(tmp_path), torch.randn(400, 400)
    for step in range(1, 3):
        repo.commit(
            {"model": {"body.weight": body, "head.weight": torch.randn(80, 400)}}, step=step
        )
    assert not any("nothing to do" in record.message for record in caplog.records)
