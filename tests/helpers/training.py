"""Small real training runs, whose checkpoints the tests commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def make_model() -> nn.Module:
    """A few layers, one of them frozen, with batch norm's buffers."""
    model = nn.Sequential(
        nn.Linear(24, 160), nn.ReLU(), nn.Linear(160, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)
    )
    model[4].requires_grad_(False)
    return model


def train(
    steps: int, every: int = 1, *, seed: int = 0, beta2: float = 0.999
) -> list[dict[str, Any]]:
    """The states of a run: model, optimizer, step, random state; every `every` steps."""
    torch.manual_seed(seed)
    model = make_model()
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=1e-2, betas=(0.9, beta2))
    states = []
    for step in range(1, steps + 1):
        x = torch.randn(32, 24)
        loss = (model(x) - x[:, :8].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            states.append(
                {
                    "model": {k: v.clone() for k, v in model.state_dict().items()},
                    "optimizer": _copy(optimizer.state_dict()),
                    "step": step,
                    "rng": torch.get_rng_state(),
                }
            )
    return states


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def train_on(path: Path) -> None:
    """Move every weight and moment of a saved state a little, and its step by one."""
    state = torch.load(path, weights_only=True)
    for value in state["model"].values():
        if value.is_floating_point():
            value += torch.randn_like(value) * 0.01
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] *= 1.01
        moments["exp_avg_sq"] *= 1.01
    torch.save(state | {"step": state["step"] + 1}, path)


def save_run(folder: Path, states: list[dict[str, Any]]) -> list[Path]:
    """Write states with torch.save, all under the same name in folders of their own."""
    paths = []
    for state in states:
        path = folder / f"at-{state['step']}" / "model.pt"
        path.parent.mkdir(parents=True)
        torch.save(state, path)
        paths.append(path)
    return paths
