"""Measure the errors of a restored training state, by kind of tensor.

The errors are computed from the files, without the error report of the commit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, Any]

LEAST = 128  # smaller tensors are never encoded with loss
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Quality:
    """Relative squared errors over all tensors that may be encoded with loss.

    `weight_rel`: of the weights (a root)
    `lag`: of the weights, relative to the difference between the true states
    `residual_nmse`: relative to the difference to the previous restored checkpoint
    `fisher_nmse`: the same, with squares weighted by exp_avg_sq
    `first_nmse`: of exp_avg, or of SGD's momentum
    `root_second_nmse`: of sqrt(exp_avg_sq), by which the optimizer divides
    `update_nmse`: of the next step: Adam's for a gradient from N(0, exp_avg_sq), or the momentum
    `worst`: the largest `residual_nmse` of a tensor
    """

    weight_rel: float
    lag: float
    residual_nmse: float
    fisher_nmse: float
    first_nmse: float
    root_second_nmse: float
    update_nmse: float
    worst: float


class _Ratio:
    def __init__(self) -> None:
        self.error, self.energy = 0.0, 0.0

    def add(self, error: torch.Tensor, energy: torch.Tensor) -> float:
        one, other = float(error.double().square().sum()), float(energy.double().square().sum())
        self.error += one
        self.energy += other
        return one / other if other else 0.0

    def value(self) -> float:
        return self.error / self.energy if self.energy else 0.0


def weights(state: State) -> dict[str, torch.Tensor]:
    """Return the weights of a state as float32 by name, without batch norm statistics."""
    return {
        name: value.float() for name, value in state["model"].items() if not name.endswith(_BUFFERS)
    }


def moments(state: State) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the moments of each weight as float32, in the order of the weights."""
    for each in state["optimizer"]["state"].values():
        yield {name: value.float() for name, value in each.items() if value is not None}


def compare(true: State, restored: State, base: State, parent: State) -> Quality:
    """Compare a restored state with the true one.

    `parent` is the true state before it, and `base` the restored form of `parent`.
    """
    weight, lag, residual, fisher, first, second, update = (_Ratio() for _ in range(7))
    group, worst = true["optimizer"]["param_groups"][0], 0.0
    draw = torch.Generator().manual_seed(0)
    old, near, now = weights(base), weights(restored), weights(true)
    before = weights(parent)
    for name, value in now.items():
        if value.numel() >= LEAST:
            error = near[name] - value
            weight.add(error, value)
            lag.add(error, value - before[name])
            worst = max(worst, residual.add(error, value - old[name]))
    for name, one, two in zip(now, moments(true), moments(restored), strict=True):
        key = "exp_avg" if "exp_avg" in one else "momentum_buffer"
        if one[key].numel() < LEAST:
            continue
        first.add(two[key] - one[key], one[key])
        if key == "momentum_buffer":
            update.add(two[key] - one[key], one[key])
            continue
        root = one["exp_avg_sq"].sqrt()
        second.add(two["exp_avg_sq"].sqrt() - root, root)
        gradient = torch.randn(root.shape, generator=draw) * root
        step = next_step(group, one, gradient)
        update.add(next_step(group, two, gradient) - step, step)
        fisher.add(root * (near[name] - now[name]), root * (now[name] - old[name]))
    return Quality(
        weight.value() ** 0.5,
        lag.value(),
        residual.value(),
        fisher.value(),
        first.value(),
        second.value(),
        update.value(),
        worst,
    )


def next_step(group: State, moments: State, gradient: torch.Tensor) -> torch.Tensor:
    """Return Adam's next step, without learning rate and bias correction."""
    slow, fast = group["betas"]
    first = slow * moments["exp_avg"] + (1 - slow) * gradient
    second = fast * moments["exp_avg_sq"] + (1 - fast) * gradient.square()
    step: torch.Tensor = first / (second.sqrt() + group["eps"])
    return step
