"""Small made-up training states."""

from __future__ import annotations

import copy
from typing import Any

import torch

State = dict[str, Any]


def adam_state(weights: dict[str, torch.Tensor], step: int, squares: float = 1e-6) -> State:
    """A state as AdamW leaves it, with made-up moments."""
    draw = torch.Generator().manual_seed(step)
    moments = {
        n: {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.randn(w.shape, generator=draw) * squares**0.5 * 0.3,
            "exp_avg_sq": torch.rand(w.shape, generator=draw) * squares,
        }
        for n, w in enumerate(weights.values())
    }
    group = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "params": list(range(len(weights))),
        "param_names": list(weights),
    }
    state = {"model": weights, "optimizer": {"state": moments, "param_groups": [group]}}
    return copy.deepcopy(state | {"step": step})


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layer{n}": (torch.randn(120, 90) * 0.05).to(dtype) for n in range(4)}


def moved(
    tensors: dict[str, torch.Tensor], size: float = 1e-3, **other: float
) -> dict[str, torch.Tensor]:
    return {
        name: (w.float() + torch.randn(w.shape) * other.get(name, size)).to(w.dtype)
        for name, w in tensors.items()
    }
