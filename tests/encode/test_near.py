"""Near commits of real optimizers, and of states that are out of the ordinary."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptvcs.errors import ConflictError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId
from tests.helpers.profiles import short
from tests.helpers.states import State, adam_state, moved, weights
from tests.spec_reader import SpecRepository


@pytest.fixture
def near(tmp_path: Path) -> Repo:
    """An empty repository with the default codec, whose commits are near at once."""
    repo = Repo.init(tmp_path / "near")
    repo.configure("keep-exact", "0")
    return repo


class Lion(torch.optim.Optimizer):
    """Sign momentum (Chen et al., 2023)."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(group["lr"] * (slow * m + (1 - slow) * p.grad).sign())
                    m.mul_(fast).add_(p.grad, alpha=1 - fast)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True, betas=(0.9, 0.95)),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lion": lambda p: Lion(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(300, 48), nn.Flatten(), nn.Linear(48 * 4, 200), nn.ReLU(), nn.Linear(200, 48)
    )


def run(
    make: Callable[[Any], torch.optim.Optimizer], commits: int, every: int = 10
) -> Iterator[State]:
    """The states of a run on made-up text whose last hundred tokens never occur."""
    net = model()
    optimizer = make(net.parameters())
    draw = torch.Generator().manual_seed(0)
    for step in range(1, commits * every + 1):
        ids = torch.randint(200, (64, 4), generator=draw)
        loss = nn.functional.mse_loss(
            net(ids), torch.sin(ids.float().mean(1, True) * 0.1).expand(64, 48)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % every == 0:
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            yield copy.deepcopy(state)


def flat(state: Any, *path: str) -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {".".join(path): state}
    if not isinstance(state, dict):
        return {}
    return {
        name: tensor
        for key, value in state.items()
        for name, tensor in flat(value, *path, str(key)).items()
    }


def nmse(true: torch.Tensor, back: torch.Tensor, base: torch.Tensor | None = None) -> float:
    change = true.double() - (0 if base is None else base.double())
    return float((back.double() - true.double()).square().sum() / change.square().sum())


@pytest.mark.parametrize("codec", short(["near", "near:step=4,zone=0.66"], ["near"]))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_near_commits_of_each_optimizer_are_close(name: str, codec: str, near: Repo) -> None:
    before: State | None = None
    for state in run(OPTIMIZERS[name], 4):
        result = near.commit(state, step=state["step"], codec=codec)
        back = near.checkout(state["step"])
        assert result.commit.error.update_nmse < 1
        for key, true in flat(state).items():
            found = flat(back)[key]
            assert found.dtype == true.dtype
            if not true.is_floating_point() or true.numel() < 128:
                assert torch.equal(found, true)
            elif torch.equal(true, found):
                continue
            elif key.startswith("model") and before is not None:
                assert nmse(true, found, flat(before)[key]) <= 1
            else:
                assert nmse(true, found) <= 1
                if key.split(".")[-1] in ("exp_avg_sq", "max_exp_avg_sq", "square_avg"):
                    assert (found[true > 0] > 0).all()
        fresh = model()
        fresh.load_state_dict(back["model"])
        OPTIMIZERS[name](fresh.parameters()).load_state_dict(back["optimizer"])
        before = back
    assert not near.verify().damage
    if name.startswith("adam") and name != "adamax":
        assert result.commit.raw_bytes > 20 * result.commit.data_bytes


def test_embedding_rows_that_never_moved_stay(near: Repo) -> None:
    for state in run(OPTIMIZERS["adam"], 3):
        near.commit(state, step=state["step"])
        back = near.checkout(state["step"])
        moments = back["optimizer"]["state"][0]
        assert not moments["exp_avg_sq"][200:].any()
        assert not moments["exp_avg"][200:].any()
        assert (moments["exp_avg_sq"][:200].sum(1) > 0).all()


def test_the_first_commit_is_close_and_what_is_not_trained_is_exact(near: Repo) -> None:
    trained = weights()
    state = adam_state(trained, 1)
    state["model"]["table"] = torch.randn(500)
    near.commit(state, step=1)
    back = near.checkout(1)
    assert torch.equal(back["model"]["table"], state["model"]["table"])
    for name in trained:
        assert 0 < nmse(trained[name], back["model"][name]) < 1e-5
    alone = {f"other {name}": w for name, w in trained.items()}
    near.commit({"model": alone}, step=2)
    back = near.checkout(2)
    assert all(torch.equal(back["model"][name], w) for name, w in alone.items())


def test_a_new_layer_comes_back_at_once_and_harms_no_other(near: Repo) -> None:
    now = weights()
    for step in range(1, 4):
        near.commit(adam_state(now, step), step=step)
        now = moved(now)
    base = near.checkout(3)["model"]
    now["layer2"] = torch.randn(120, 90)
    near.commit(adam_state(now, 4), step=4)
    back = near.checkout(4)["model"]
    assert nmse(now["layer2"], back["layer2"]) < 1e-3
    for name in ("layer0", "layer1", "layer3"):
        assert nmse(now[name], back[name], base[name]) < 0.6


@pytest.mark.parametrize("codec", ["near", "near:step=4,zone=0.66"])
def test_a_tensor_on_its_own_tiny_learning_rate_does_not_starve(codec: str, near: Repo) -> None:
    now = weights()
    for step in range(1, 5):
        near.commit(adam_state(now, step), step=step, codec=codec)
        last, now = now, moved(now, layer1=1e-6)
    del last
    base = near.checkout(4)["model"]
    near.commit(adam_state(now, 5), step=5, codec=codec)
    back = near.checkout(5)["model"]
    assert nmse(now["layer1"], back["layer1"], base["layer1"]) <= (0.7 if codec == "near" else 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_exact_and_harms_no_other(value: float, near: Repo) -> None:
    now = weights()
    near.commit(adam_state(now, 1), step=1)
    now = moved(now)
    now["layer1"][3, 4] = value
    state = adam_state(now, 2)
    state["optimizer"]["state"][2]["exp_avg_sq"][0, 0] = value
    state["optimizer"]["state"][3]["exp_avg"][0, 0] = value
    near.commit(state, step=2)
    back = near.checkout(2)
    for true, found in (
        (now["layer1"], back["model"]["layer1"]),
        (state["optimizer"]["state"][2]["exp_avg_sq"], back["optimizer"]["state"][2]["exp_avg_sq"]),
        (state["optimizer"]["state"][3]["exp_avg"], back["optimizer"]["state"][3]["exp_avg"]),
    ):
        assert true.numpy().tobytes() == found.numpy().tobytes()
    assert not torch.equal(back["model"]["layer0"], now["layer0"])
    now = moved(now)  # and the run goes on, from a base that is not finite
    near.commit(adam_state(now, 3), step=3)
    assert np.isnan(near.checkout(3)["model"]["layer1"].numpy()).sum() == np.isnan(value)
    assert not near.verify().damage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype, near: Repo) -> None:
    now = weights(dtype)
    for step in range(1, 5):
        near.commit(adam_state(now, step), step=step)
        last, now = now, moved(now)
    near.commit(adam_state(now, 5), step=5)
    back = near.checkout(5)["model"]
    for name in now:
        assert back[name].dtype == dtype
        assert nmse(now[name], back[name], last[name]) < 0.4


@pytest.mark.parametrize("where", ["optimizer", "beside"])
def test_rounded_copies_of_master_weights_cost_nothing(where: str, near: Repo) -> None:
    master = weights()
    sizes = []
    for step in range(1, 4):
        state = adam_state(master, step)
        state["model"] = {n: w.to(torch.bfloat16) for n, w in master.items()}
        if where == "beside":
            state["master"] = copy.deepcopy(master)
        else:
            for number, w in enumerate(master.values()):
                state["optimizer"]["state"][number]["master_param"] = w.clone()
        # Made-up moments have no directions that a bound could be kept by.
        result = near.commit(state, step=step, codec="near:max_update_nmse=1")
        sizes.append(result.commit.data_bytes)
        back = near.checkout(step)
        kept = (
            back["master"]
            if where == "beside"
            else {n: back["optimizer"]["state"][k]["master_param"] for k, n in enumerate(master)}
        )
        for name in master:
            assert torch.equal(kept[name].to(torch.bfloat16), back["model"][name])
        master = moved(master)
    values = sum(w.numel() for w in master.values())
    assert sizes[-1] < 3 * values / 8  # less than three bits for each weight, copy and moments
    spec = SpecRepository(near.folder)
    state_file = spec.file(result.id, "state.pt")
    assert len(state_file) == result.commit.raw_bytes


@pytest.mark.parametrize("codec", ["lossless", "excp-max", "near"])
def test_codecs_follow_each_other(codec: str, near: Repo) -> None:
    now = weights()
    for step in range(1, 8):
        near.commit(adam_state(now, step), step=step, codec="near" if step % 2 else codec)
        back = near.checkout(step)["model"]
        assert all(nmse(w, back[n]) < 0.01 for n, w in now.items())
        now = moved(now)
    assert not near.verify().damage


def test_keyframes_are_near_too(near: Repo) -> None:
    (near.folder / "config.toml").write_text('codec = "near"\nkeyframe-depth = 2\n')
    repo = Repo.open(near.folder)
    now, kinds = weights(), []
    for step in range(1, 8):
        result = repo.commit(adam_state(now, step), step=step)
        kinds.append((result.commit.kind, result.commit.depth))
        back = repo.checkout(step)["model"]
        assert result.commit.error.residual_nmse < 0.5
        assert all(nmse(w, back[n]) < 0.01 for n, w in now.items())
        now = moved(now)
    assert kinds == [("keyframe", 0), ("delta", 1), ("delta", 2)] * 2 + [("keyframe", 0)]


def test_a_fresh_process_decodes_the_same(near: Repo, tmp_path: Path) -> None:
    """From memory, from the chain, and by the reader that is made from the format alone."""
    for state in run(OPTIMIZERS["adam"], 3):
        result = near.commit(state, step=state["step"])
    held = flat(near.checkout("HEAD"))
    again = flat(Repo.open(near.folder).checkout("HEAD"))
    assert held.keys() == again.keys()
    assert all(torch.equal(held[name], again[name]) for name in held)
    near.checkout_files(result.id, tmp_path / "out.pt")
    assert (
        SpecRepository(near.folder).file(result.id, "state.pt")
        == (tmp_path / "out.pt").read_bytes()
    )
    assert torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)["step"] == 30


def test_a_failed_commit_leaves_no_wrong_base(near: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    now = weights()
    near.commit(adam_state(now, 1), step=1)
    with monkeypatch.context() as patch:
        patch.setattr("ckptvcs.encode.encoder.assemble", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            near.commit(adam_state(moved(now), 2), step=2)
    now = moved(now)
    near.commit(adam_state(now, 2), step=2)
    again = Repo.open(near.folder).checkout(2)["model"]
    assert all(torch.equal(w, again[n]) for n, w in near.checkout(2)["model"].items())
    assert not near.verify().damage


def test_tensors_of_several_slices_with_rows_across_them(near: Repo) -> None:
    torch.manual_seed(0)
    now = {"wide": torch.randn(1500, 1000) * 0.02}
    for step in range(1, 4):
        near.commit(adam_state(now, step), step=step)
        back = near.checkout(step)["model"]["wide"]
        assert nmse(now["wide"], back) < 0.01
        now = moved(now)
    assert not Repo.open(near.folder).verify().damage


def test_a_reader_is_not_disturbed_by_a_commit_that_begins(near: Repo) -> None:
    now = weights()
    for step in range(1, 3):
        name = near.commit(adam_state(now, step), step=step).id
        now = moved(now)
    restorer = handle(near).restorer(name)
    number = next(n for n, t in enumerate(restorer.schema.tensors) if t.name == "model.layer0")
    before = restorer.tensor(number).copy()
    near.commit(adam_state(now, 3), step=3)  # the base in memory is that of step 3 now
    assert np.array_equal(restorer.tensor(number), before)


def test_a_cache_that_vanishes_is_done_without(near: Repo, tmp_path: Path) -> None:
    for step in range(1, 3):
        torch.save(adam_state(weights(), step), tmp_path / "m.pt")
        name = near.commit_path(tmp_path / "m.pt", message="x", step=step).id
    restorer = handle(near).restorer(name)
    number = next(n for n, t in enumerate(restorer.schema.tensors) if t.name == "model.layer0")
    before = restorer.tensor(number).copy()
    for path in (near.folder / "cache" / "bases").iterdir():
        path.unlink()
    assert np.array_equal(restorer.tensor(number), before)


def deep(near: Repo) -> Repo:
    """The same repository, opened anew, with a chain of deltas in it."""
    now = weights()
    for step in range(1, 6):
        near.commit(adam_state(now, step), step=step)
        now = moved(now)
    return Repo.open(near.folder)


def reads(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the slices that are read from packs, as they come."""
    lengths: list[int] = []
    read = handle(repo).catalog.store.read_region

    def count(name: ObjectId, offset: int, length: int) -> bytes:
        lengths.append(length)
        return read(name, offset, length)

    monkeypatch.setattr(handle(repo).catalog.store, "read_region", count)
    return lengths


def test_weights_are_decoded_from_their_chain_only_once(
    near: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = deep(near)
    lengths = reads(repo, monkeypatch)
    first = repo.checkout("HEAD")
    cold = len(lengths)
    lengths.clear()
    second = repo.checkout("HEAD")
    assert len(lengths) <= cold - 4 * len(first["model"])  # four deltas less for each weight
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])


@pytest.mark.parametrize("kind", ["state", "file"])
def test_a_damaged_cache_is_noticed_and_done_without(near: Repo, kind: str, tmp_path: Path) -> None:
    repo = deep(near)
    true = repo.checkout("HEAD")["model"]
    (cached,) = (near.folder / "cache" / "bases").iterdir()
    data = bytearray(cached.read_bytes())
    data[len(data) // 2] ^= 1
    data[5] ^= 1
    cached.write_bytes(data)
    repo = Repo.open(near.folder)
    if kind == "state":
        back = repo.checkout("HEAD")["model"]
    else:
        repo.checkout_files(repo.resolve("HEAD"), tmp_path / "back.pt")
        back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    for name, value in true.items():
        assert torch.equal(value, back[name])
    if kind == "state":  # it is gone, and made anew
        assert not cached.exists()
        Repo.open(near.folder).checkout("HEAD")
        assert cached.read_bytes() != bytes(data)


def test_commits_of_two_threads_stand_on_what_they_name(near: Repo) -> None:
    near.commit(adam_state(weights(), 1), step=1)

    def run() -> None:
        now = weights()
        for _ in range(5):
            now = moved(now)
            with contextlib.suppress(ConflictError):
                near.commit(adam_state(now, 1))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not Repo.open(near.folder).verify().damage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 127), (1,), (129,), (7, 23, 3)])
def test_odd_numbers_of_words(near: Repo, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    now = {"w": torch.randn(shape)}
    for step in range(1, 4):
        state = adam_state({"w": now["w"].to(dtype)}, step)
        near.commit(state, step=step)
        back = near.checkout(step)["model"]["w"]
        assert back.dtype == dtype
        assert nmse(state["model"]["w"].float(), back.float()) < 0.01
        now = moved(now)


def test_a_moment_that_is_not_finite_does_not_blur_the_errors(near: Repo) -> None:
    now = weights()
    for step in range(1, 4):
        state = adam_state(now, step)
        state["optimizer"]["state"][0]["exp_avg_sq"].view(-1)[5] = float("inf")
        made = near.commit(state, step=step)
        now = moved(now)
    assert 0 < made.commit.error.fisher_nmse < 1


def test_weights_too_large_to_measure_come_back_all_the_same(near: Repo) -> None:
    now = {name: w * 1e24 for name, w in weights().items()}
    for step in range(1, 3):
        near.commit(adam_state(now, step), step=step)
        back = near.checkout(step)["model"]
        assert all(nmse(w, back[name]) < 0.01 for name, w in now.items())
        now = moved(now, 1e20)


def test_weights_whose_exact_values_are_stored_elsewhere(near: Repo) -> None:
    """The frame that they share is no patch upon the near ones."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 8, generator=draw)
    for step in range(3):
        weight = weight + 0.01 * torch.randn(64, 8, generator=draw)
        moments = {"state": {0: {"kept": weight.clone()}}, "param_groups": [{"params": [0]}]}
        near.commit({"model": {"w": weight}, "optimizer": moments}, step=step)
    reader = Repo.open(near.root)
    assert torch.equal(reader.checkout(2)["model"]["w"], weight)
    assert any((near.folder / "cache" / "bases").iterdir())
    assert not reader.verify().damage
