"""How far a restored training state is from the true one, per kind of tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, Any]


@dataclass
class Quality:
    """Sums of squares over all tensors of 128 elements or more (what codecs may touch).

    `residual_nmse` is set against the residual to what the codec had for the checkpoint before;
    `root_second` compares sqrt(exp_avg_sq), which is what an optimizer divides by.
    """

    weight_rel: float
    residual_nmse: float
    first_nmse: float
    root_second_nmse: float


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
    weight, residual, first, second = _Ratio(), _Ratio(), _Ratio(), _Ratio()
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
    return Quality(weight.value() ** 0.5, residual.value(), first.value(), second.value())
