"""Tensors on a device: coded there, moved as codes; and the same operations on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ckptvcs.checkpoint import state as states
from ckptvcs.checkpoint import torch_writer
from ckptvcs.codec.kernels import on_torch, reference
from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_lowrank import factors_of, put_components
from ckptvcs.integrations.distributed import CkptReader, CkptWriter
from ckptvcs.repo import Repo, client
from tests.helpers.profiles import short

DEVICES = [
    "cpu",  # taken for a device of its own
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    monkeypatch.setattr(states, "is_on_device", lambda tensor: tensor.device.type == name)
    return name


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is moved as it is."""
    sizes: list[int] = []
    move = torch_writer.DeviceBytes.__getitem__

    def count(self: torch_writer.DeviceBytes, part: slice) -> memoryview:
        data = move(self, part)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(torch_writer.DeviceBytes, "__getitem__", count)
    return sizes


def trajectory(where: str, dtype: torch.dtype = torch.float32, steps: int = 4) -> list[Any]:
    """States of a made-up run; a matrix of more than one slice, one of one, a vector."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (2100, 600), "b": (300, 500), "c": (700,)}
    weights = {name: torch.randn(shape, generator=draw) * 0.05 for name, shape in shapes.items()}
    out = []
    for step in range(1, steps + 1):
        moments = {}
        for index, weight in enumerate(weights.values()):
            spread = torch.randn(weight.shape[0], generator=draw).exp() * 1e-7
            second = (
                spread.view(-1, *[1] * (weight.ndim - 1))
                * (torch.randn(weight.shape, generator=draw) * 0.3).exp()
            )
            thin = [torch.randn(size, 3, generator=draw) for size in weight.shape]
            first = thin[0] @ thin[1].T if len(thin) == 2 else thin[0][:, 0]
            moments[index] = {
                "step": torch.tensor(float(step)),
                "exp_avg": (first * second.sqrt() * 0.2).to(where, dtype),
                "exp_avg_sq": second.to(where, dtype),
            }
            weight += torch.randn(weight.shape, generator=draw) * 5e-4
        out.append(
            {
                "model": {name: w.to(where, dtype, copy=True) for name, w in weights.items()},
                "optimizer": {
                    "state": moments,
                    "param_groups": [
                        {
                            "betas": (0.9, 0.999),
                            "eps": 1e-8,
                            "params": [0, 1, 2],
                            "param_names": list(shapes),
                        }
                    ],
                },
                "step": step,
            }
        )
    return out


def leaves(state: Any) -> list[torch.Tensor]:
    moments = state["optimizer"]["state"].values()
    return [*state["model"].values(), *(m[k] for m in moments for k in ("exp_avg", "exp_avg_sq"))]


@pytest.mark.parametrize("dtype", short([torch.float32, torch.bfloat16], [torch.float32]))
def test_codes_leave_the_device_and_nothing_else(
    tmp_path: Path, where: str, moved: list[int], dtype: torch.dtype
) -> None:
    far, near = Repo.init(tmp_path / "far"), Repo.init(tmp_path / "near")
    for repo in (far, near):
        repo.configure("keep-exact", "0")  # what is to be exact leaves the device
    for state in trajectory(where, dtype):
        moved.clear()
        there = far.commit(state, step=state["step"])
        if state["step"] > 1:  # a vector has no directions; structure is looked for at the end
            assert sum(moved) <= 1 << 17
        here = near.commit(
            {
                "model": {n: t.cpu().clone() for n, t in state["model"].items()},
                "optimizer": {
                    **state["optimizer"],
                    "state": {
                        k: {n: t.cpu().clone() for n, t in m.items()}
                        for k, m in state["optimizer"]["state"].items()
                    },
                },
                "step": state["step"],
            },
            step=state["step"],
        )
        if state["step"] == 1 or where == "cuda":
            continue
        assert there.commit.depth == here.commit.depth
        for name in ("residual_nmse", "fisher_nmse", "update_nmse", "weight_rel"):
            one, two = getattr(there.commit.error, name), getattr(here.commit.error, name)
            assert one == pytest.approx(two, rel=0.05, abs=1e-6), name
        assert there.stored_bytes == pytest.approx(here.stored_bytes, rel=0.05)
    report = far.verify()
    assert not report.damage
    back = far.checkout("HEAD")
    for restored, true in zip(leaves(back), leaves(state), strict=True):
        error = (restored.float() - true.cpu().float()).square().sum()
        assert error <= true.float().square().sum()


def test_what_is_uncommon_is_moved(tmp_path: Path, where: str) -> None:
    repo = Repo.init(tmp_path)
    for state in trajectory(where, steps=3):
        state["optimizer"]["state"][0]["exp_avg_sq"][7] = 0  # a row that never moved
        state["optimizer"]["state"][0]["exp_avg"][7] = 0
        state["model"]["b"][3, 3] = float("nan")
        repo.commit(state, step=state["step"])
    back = repo.checkout("HEAD")
    assert not back["optimizer"]["state"][0]["exp_avg_sq"][7].any()
    for restored, true in zip((back["model"]["b"],), (state["model"]["b"].cpu(),), strict=True):
        assert torch.equal(restored.view(torch.int32), true.view(torch.int32))


def test_a_lossless_commit_is_exact(tmp_path: Path, where: str) -> None:
    repo = Repo.init(tmp_path)
    for state in trajectory(where, steps=2):
        result = repo.commit(state, step=state["step"], codec="lossless")
        assert result.commit.exact
    for restored, true in zip(leaves(repo.checkout("HEAD")), leaves(state), strict=True):
        assert torch.equal(restored, true.cpu())


def test_twins_that_are_exact_are_called_so(tmp_path: Path, where: str) -> None:
    weight = torch.randn(70, 300).to(where, torch.bfloat16)
    made = Repo.init(tmp_path).commit({"model": {"a": weight, "b": weight.clone()}}, step=1)
    assert made.commit.exact


def test_the_same_state_is_known_again(tmp_path: Path, where: str) -> None:
    repo = Repo.init(tmp_path)
    first, second = trajectory(where, steps=2)
    repo.commit(first, step=1)
    known = repo.commit(second, step=2)
    again = repo.commit(second, step=2)
    assert again.stored_bytes < known.stored_bytes / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_copy_is_made_in_memory_that_the_device_writes_to(tmp_path: Path) -> None:
    with Repo.init(tmp_path) as repo:
        for state in trajectory("cuda", steps=3):
            future = repo.commit_async(state, step=state["step"])
            true = [leaf.cpu() for leaf in leaves(state)]
            for leaf in leaves(state):
                leaf.zero_()
            assert future.result().exact
            for restored, one in zip(leaves(repo.checkout("HEAD")), true, strict=True):
                assert torch.equal(restored, one)
        staging = client(repo).stage()
        assert staging.pinned
        client(repo).release(staging)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", ["2", "0"])  # without exact forms tensors stay on the device
def test_shards_of_several_processes(tmp_path: Path, where: str, kept: str) -> None:
    Repo.init(tmp_path).configure("keep-exact", kept)
    writer = CkptWriter(tmp_path)
    for state in trajectory(where, steps=3):
        save(state, checkpoint_id=f"step-{state['step']}", storage_writer=writer, no_dist=True)
    assert writer.entry is not None
    assert writer.entry.commit.depth == 2
    back = trajectory(where, steps=1)[0]
    load(back, storage_reader=CkptReader(tmp_path), no_dist=True)
    for restored, true in zip(leaves(back), leaves(state), strict=True):
        error = (restored.float() - true.float()).square().sum()
        assert torch.equal(restored, true) if kept == "2" else error <= true.square().sum()
    assert not Repo.open(tmp_path).verify().damage


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_a_fingerprint_tells_bytes_apart(size: int, seed: int) -> None:
    data = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8))
    mark = on_torch.fingerprint(data)
    assert on_torch.fingerprint(data.clone()) == mark
    changed = data.clone()
    changed[seed % size] ^= 1 + seed % 255
    assert on_torch.fingerprint(changed) != mark
    assert on_torch.fingerprint(torch.cat((data, data[:1]))) != mark
    if size >= 8 and not torch.equal(data[:4], data[4:8]):
        swapped = torch.cat((data[4:8], data[:4], data[8:]))
        assert on_torch.fingerprint(swapped) != mark


@given(st.integers(1, 4000), st.integers(1, 70), st.integers(0, 2**32))
def test_operations_do_what_the_loops_do(count: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = Rows(min(columns, count), seed % min(columns, count))
    height = rows.count(count)
    base = np.rint(random.standard_normal(count) * 500).astype(np.float32) / np.float32(4096)
    values = (base + random.standard_normal(count) * 0.01).astype(np.float32)
    second = np.exp(random.standard_normal(count)).astype(np.float32)
    factors = np.exp(random.standard_normal(height) * 0.3).astype(np.float32)
    amounts = random.integers(1, 90, 256).astype(np.float32)
    how = (
        np.float32(4096),
        np.float32(40),
        np.float32(0.5),
        amounts,
        factors,
        rows.columns,
        rows.start,
    )
    numpy_loops: Any = reference
    _, bitmap, codes, sums, largest = numpy_loops.code_residuals(values, base, second, *how)
    x, b, v = (torch.from_numpy(array) for array in (values, base, second))
    found = on_torch.DeviceResiduals(x, b, v, "F32").code(*how)
    assert found[0].tobytes() == bitmap.tobytes()
    assert np.array_equal(found[1], codes)
    assert found[3] <= largest
    assert np.allclose(found[2], sums, rtol=1e-4)
    logs = on_torch.log_sums(v, rows)
    assert logs is not None
    for one, two in zip(
        logs, numpy_loops.log_sums(second, rows.columns, rows.start, height), strict=False
    ):
        assert np.allclose(one, two, rtol=1e-4, atol=1e-3)
    near = on_torch.product(factors, amounts[: rows.columns], rows, v)
    made = np.empty(count, np.float32)
    if rows.columns <= 256:
        numpy_loops.product(factors, amounts[: rows.columns], rows.start, made)
        assert near.numpy().tobytes() == made.tobytes()


def test_directions_of_a_matrix_on_a_device() -> None:
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(90, 2, generator=draw) @ torch.randn(2, 50, generator=draw)
    rows = Rows(50)
    payload = put_components(on_torch.DeviceMatrix.of(matrix.reshape(-1), rows), rows, 2, 0.05)
    assert payload is not None
    left, right, _, scale = factors_of(payload, matrix.numel())
    assert np.allclose((left @ right) * scale, matrix.numpy(), atol=0.2)
