"""How far a restored training state is from the true one, per kind of tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, Any]


@dataclass
class Quality:
    """Sums of squares over all tensors of 128 elements or more (what codecs may touch).

    `residual_nmse` is set against the residual to what the codec had for the checkpoint before,
    `fisher_nmse` is the same with squares weighted by exp_avg_sq; `root_second` compares
    sqrt(exp_avg_sq), which is what an optimizer divides by; `update_nmse` is that of Adam's next
    step, at the run's own betas, with a gradient from N(0, exp_avg_sq), over every parameter.
    """

    weight_rel: float
    residual_nmse: float
    fisher_nmse: float
    first_nmse: float
    root_second_nmse: float
    update_nmse: float


class _Ratio:
    def __init__(self) -> None:
        self.error, self.energy = 0.0, 0.0

    def add(self, error: torch.Tensor, energy: torch.Tensor) -> None:
        self.error += float(error.double().square().sum())
        self.energy += float(energy.double().square().sum())

    def value(self) -> float:
        return self.error / self.energy if self.energy else 0.0


def compare(true: State, restored: State, base: State) -> Quality:
    """Compare a restored state with the true one; `base` is the one restored before."""
    weight, residual, fisher, first, second, update = (_Ratio() for _ in range(6))
    group = true["optimizer"]["param_groups"][0]
    draw = torch.Generator().manual_seed(0)
    for name, value in true["model"].items():
        if value.is_floating_point() and value.numel() >= 128:
            error = restored["model"][name] - value
            weight.add(error, value)
            residual.add(error, value - base["model"][name])
    for key, moments in true["optimizer"]["state"].items():
        near = restored["optimizer"]["state"][key]
        if moments["exp_avg"].numel() >= 128:
            first.add(near["exp_avg"] - moments["exp_avg"], moments["exp_avg"])
            root = moments["exp_avg_sq"].sqrt()
            second.add(near["exp_avg_sq"].sqrt() - root, root)
            gradient = torch.randn(root.shape, generator=draw) * root
            step = next_step(group, moments, gradient)
            update.add(next_step(group, near, gradient) - step, step)
            name = list(true["model"])[key]
            value = true["model"][name]
            fisher.add(root * (restored["model"][name] - value),
                       root * (value - base["model"][name]))  # fmt: skip
    return Quality(
        weight.value() ** 0.5, residual.value(), fisher.value(), first.value(), second.value(),
        update.value(),
    )  # fmt: skip


def next_step(group: State, moments: State, gradient: torch.Tensor) -> torch.Tensor:
    """Adam's next step, but for learning rate and bias correction."""
    slow, fast = group["betas"]
    first = slow * moments["exp_avg"] + (1 - slow) * gradient
    second = fast * moments["exp_avg_sq"] + (1 - fast) * gradient.square()
    step: torch.Tensor = first / (second.sqrt() + group["eps"])
    return step
