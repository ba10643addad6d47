"""No chain runs away: the lag of near weights does not grow, however long and however they move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo
from tests.helpers.states import adam_state

LENGTH = 200
Weights = dict[str, torch.Tensor]
Move = Callable[[int, Weights, torch.Generator], None]


def noise(like: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=draw)


def walk(scale: Callable[[int], float]) -> Move:
    """Each movement has half of its predecessor in it, as those of short intervals have."""
    before: Weights = {}

    def move(step: int, now: Weights, draw: torch.Generator) -> None:
        for name in now:
            last = before.get(name, torch.zeros_like(now[name]))
            before[name] = 0.5 * last + noise(now[name], draw)
            now[name] = now[name] + 1e-3 * scale(step) * before[name]

    return move


def frozen(step: int, now: Weights, draw: torch.Generator) -> None:
    for name in [name for name in now if step < LENGTH // 2 or name != "b"]:
        now[name] = now[name] + 1e-3 * noise(now[name], draw)


def sparse(step: int, now: Weights, draw: torch.Generator) -> None:
    for name in now:
        rows = torch.rand(now[name].shape[0], 1, generator=draw) < (0.05 if name == "a" else 1)
        now[name] = now[name] + 1e-3 * rows * noise(now[name], draw)


def anew(step: int, now: Weights, draw: torch.Generator) -> None:
    for name in now:
        now[name] = now[name] + 1e-3 * noise(now[name], draw)
    if step % 60 == 0:
        now["c"] = 0.05 * noise(now["c"], draw)


def signs(step: int, now: Weights, draw: torch.Generator) -> None:
    """The steps of a sign optimizer, such as Lion, have one size."""
    for name in now:
        now[name] = now[name] + 1e-3 * noise(now[name], draw).sign()


MOVES: dict[str, Callable[[], Move]] = {
    "steady": lambda: walk(lambda step: 1),
    "faster": lambda: walk(lambda step: 0.1 + step / 20),
    "to a stop": lambda: walk(lambda step: max(0, LENGTH - 5 - step) / LENGTH),
    "a jump in the learning rate": lambda: walk(lambda step: 0.01 if step > LENGTH // 2 else 1),
    "a frozen layer": lambda: frozen,
    "sparse rows": lambda: sparse,
    "a layer initialised again": lambda: anew,
    "signs": lambda: signs,
}
CASES = [(move, codec) for move in MOVES for codec in ("near", "near:step=4", "near:step=1")]
CASES += [("steady", "excp"), ("steady", "excp-max"), ("faster", "excp-max")]


def difference(one: Weights, other: Weights) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("move", "codec"), CASES)
def test_the_lag_does_not_grow(move: str, codec: str, tmp_path: Path) -> None:
    repo, draw = Repo.init(tmp_path, codec=codec), torch.Generator().manual_seed(0)
    repo.configure("keep-exact", "0")
    repo.configure("keyframe-depth", str(LENGTH))
    shapes = {"a": (60, 40), "b": (50, 48), "c": (48, 50)}
    now = {name: 0.05 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    act, lags, recorded = MOVES[move](), [], []
    for step in range(LENGTH):
        before = {name: value.clone() for name, value in now.items()}
        act(step, now, draw)
        entry = repo.commit(adam_state(now, step), step=step)
        moved = difference(now, before)
        if step and moved:
            error = difference(repo.checkout(entry.id)["model"], now)
            lags.append(error / moved)
            recorded.append(entry.commit.error.lag or 0.0)
    assert max(lags[-10:]) <= 1.2 * median(lags)
    assert median(recorded) == pytest.approx(median(lags), rel=0.1)
    if codec.startswith("near"):
        assert recorded == pytest.approx(lags, rel=0.15)


def test_without_a_sample_the_movement_is_estimated(tmp_path: Path) -> None:
    repo, draw = Repo.init(tmp_path), torch.Generator().manual_seed(0)
    repo.configure("keep-exact", "0")
    now = {"a": 0.05 * torch.randn(200, 100, generator=draw)}
    for step in range(4):
        now = {"a": now["a"] + 1e-3 * noise(now["a"], draw)}
        repo = Repo.open(tmp_path)
        for path in (tmp_path / ".ckpt" / "cache").glob("errors/*"):
            path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
        entry = repo.commit(adam_state(now, step), step=step)
    assert entry.commit.error.lag == pytest.approx(0.33, rel=0.2)


def test_a_bound_on_the_lag(tmp_path: Path) -> None:
    repo, draw = Repo.init(tmp_path), torch.Generator().manual_seed(0)
    now = {"a": 0.05 * torch.randn(100, 80, generator=draw)}
    for step, bound in enumerate(("auto", "auto", "0.1", "0.01", "off")):
        repo.configure("max-lag", bound)
        now = {"a": now["a"] + 1e-3 * noise(now["a"], draw)}
        lag = repo.commit(adam_state(now, step), step=step).commit.error.lag
        assert (lag is None) == (step == 0)
        if bound not in ("auto", "off"):
            assert lag is not None
            assert lag <= float(bound)
    assert lag == pytest.approx(0.33, rel=0.2)


def test_a_codec_that_ran_away_is_gone(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'small' was removed"):
        Repo.init(tmp_path, codec="small").commit({"w": torch.ones(200)})
    old = Repo.init(tmp_path / "old")
    config = tmp_path / "old" / ".ckpt" / "config.toml"
    config.write_text(config.read_text().replace('"near"', '"small:gamma=0"'))
    assert old.log() == []
    with pytest.raises(InvalidInputError, match="'small' was removed") as caught:
        old.commit({"w": torch.ones(200)})
    assert caught.value.hint == "use near"
    assert old.commit({"w": torch.ones(200)}, codec="near").step is None
