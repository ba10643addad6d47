"""Repositories with short histories of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.gc.retention import Policy


class Weights:
    """Weights of a random structure, some of them equal, which move a little at each step."""

    def __init__(self, seed: int, groups: list[int], ties: list[int]) -> None:
        """`groups`: how many tensors stay equal to each other; `ties`: share memory, too."""
        self._rng = np.random.default_rng(seed)
        self._rows = [
            (self._rng.standard_normal(int(self._rng.integers(300, 3000)), np.float32), count)
            for count in groups
        ]
        self._ties = ties

    def step(self) -> dict[str, Any]:
        self._rows = [
            (now + 0.01 * self._rng.standard_normal(now.size, np.float32), count)
            for now, count in self._rows
        ]
        model: dict[str, Any] = {}
        for row, (now, count) in enumerate(self._rows):
            for twin in range(count):
                tied = twin in self._ties
                model[f"layer{row}.bias{twin}"] = now if tied else now.copy()
        return {"model": model, "noise": self._rng.standard_normal(64, np.float32)}


def plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return np.asarray(state) if hasattr(state, "shape") else state


def rekeyed(root: Path, codec: str = "near") -> Repo:
    """A repository of files with equal tensors, whose newest commits were coded anew."""
    repo, run = Repo.init(root, codec=codec), Weights(1, [3, 2, 1], [])
    repo.configure("keep-exact", "0")
    torch = pytest.importorskip("torch")
    for step in range(1, 6):
        model = {name: torch.from_numpy(w) for name, w in run.step()["model"].items()}
        torch.save({"model": model}, root / "model.pt")
        repo.commit_path(root / "model.pt", message="", step=step)
    repo.gc(Policy(last=2), now=True)
    repo.gc(rekey=True)
    return repo


def commits(repo: Repo, seed: int, count: int, codec: str, first: int = 1) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(6000, np.float32)
    for step in range(first, first + count):
        weight = weight + 0.01 * rng.standard_normal(6000, np.float32)
        moments = {
            0: {
                "exp_avg": rng.standard_normal(6000, np.float32),
                "exp_avg_sq": rng.random(6000, np.float32),
            }
        }
        optimizer = {"state": moments, "param_groups": [{"params": [0]}]}
        repo.commit({"model": {"w": weight}, "optimizer": optimizer}, step=step, codec=codec)
