"""Optimizers that no small package has in the form in which they are used: the published update,
and the published names of their states.
"""

from __future__ import annotations

from typing import Any

import torch

Optimizer = torch.optim.Optimizer
Tensor = torch.Tensor


class KeepsTypes(Optimizer):
    """`load_state_dict` of torch gives every state the type of its weight; these have their own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, weight in zip(indices, weights, strict=True):
            if index in state_dict["state"]:
                self.state[weight] = dict(state_dict["state"][index])


def _moments(state: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Adam's state of a weight, made where there is none yet."""
    first = state.setdefault("exp_avg", torch.zeros_like(like))
    second = state.setdefault("exp_avg_sq", torch.zeros_like(like))
    state["step"] = state.get("step", 0) + 1
    return first, second, state["step"]


def _adam(
    first: Tensor, second: Tensor, step: int, gradient: Tensor, group: dict[str, Any]
) -> Tensor:
    """Move the moments; the step that they make, but for the learning rate."""
    beta1, beta2 = group["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    moved: Tensor = first / (1 - beta1**step) / root
    return moved


class SophiaG(Optimizer):
    """Sophia with the Gauss-Newton-Bartlett estimate (Liu et al., 2023), from the gradient of the
    batch itself.
    """

    def __init__(self, params: Any, lr: float, rho: float = 0.04, every: int = 10) -> None:
        defaults = {"lr": lr, "betas": (0.965, 0.99), "rho": rho, "weight_decay": 0.1}
        super().__init__(params, {**defaults, "every": every, "bs": 64})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                first = state.setdefault("exp_avg", torch.zeros_like(p))
                hessian = state.setdefault("hessian", torch.zeros_like(p))
                step = state["step"] = state.get("step", torch.tensor(0.0)) + 1
                if step.item() % group["every"] == 1:
                    hessian.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                first.lerp_(p.grad, 1 - beta1)
                ratio = first.abs() / (group["rho"] * group["bs"] * hessian + 1e-15)
                p.addcmul_(first.sign(), ratio.clamp(None, 1), value=-group["lr"])


class MuonWithAdam(Optimizer):
    """Muon for matrices beside AdamW for all else, as in `SingleDeviceMuonWithAuxAdam`
    (Jordan et al., 2024); groups say `use_muon`.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"betas": (0.9, 0.95), "eps": 1e-10, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if group["use_muon"]:
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(buffer, group["momentum"])
                    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.add_(orthogonal(ahead), alpha=-group["lr"] * scale)
                else:
                    p.sub_(group["lr"] * _adam(*_moments(state, p), p.grad, group))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix without scale, about, by five steps of Newton-Schulz."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    back: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return back


class Shampoo(Optimizer):
    """Shampoo (Gupta et al., 2018) with the state of the package torch_optimizer: for each axis a
    preconditioner and its inverse root, which is made anew every tenth step.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "epsilon": 1e-4})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state, moved = self.state[p], p.grad
                state["step"] = state.get("step", 0) + 1
                for axis, size in enumerate(p.shape):
                    key = f"precond_{axis}"
                    if key not in state:
                        state[key] = group["epsilon"] * torch.eye(size)
                        state[f"inv_{key}"] = torch.zeros(size, size)
                    flat = p.grad.movedim(axis, 0).reshape(size, -1)
                    state[key].addmm_(flat, flat.T)
                    if state["step"] % 10 == 1:
                        values, vectors = torch.linalg.eigh(state[key])
                        roots = values.clamp_min(group["epsilon"]) ** (-1 / (2 * p.ndim))
                        state[f"inv_{key}"].copy_(vectors * roots @ vectors.T)
                    moved = torch.tensordot(moved, state[f"inv_{key}"], ([0], [0]))
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(moved, alpha=1 - group["momentum"])
                p.sub_(group["lr"] * buffer)


class MasterAdam(KeepsTypes):
    """AdamW on 16-bit weights with float32 masters in its state, as in apex and TransformerEngine;
    with `remainders` the lower 16 bits of the masters only, as apex's distributed optimizer has
    them.
    """

    def __init__(self, params: Any, lr: float, *, remainders: bool = False) -> None:
        self.remainders = remainders
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                master = self._master(p, state)
                moved = _adam(*_moments(state, master), p.grad.float(), group)
                master.sub_(group["lr"] * moved)
                self._put(p, state, master)

    def master(self, p: Tensor) -> Tensor:
        """The float32 weight of a 16-bit one."""
        return self._master(p, self.state[p])

    def _master(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        if not self.remainders:
            found: Tensor = state.setdefault("master_param", p.float())
            return found
        # The weight is the upper half, cut and not rounded, so that both together are the master.
        low = state.setdefault("param_remainders", torch.zeros_like(p, dtype=torch.int16))
        upper = p.view(torch.int16).to(torch.int32) << 16
        bits: Tensor = upper | (low.to(torch.int32) & 0xFFFF)
        return bits.view(torch.float32)

    def _put(self, p: Tensor, state: dict[str, Any], master: Tensor) -> None:
        if not self.remainders:
            p.copy_(master)
            return
        bits = master.view(torch.int32)
        state["param_remainders"].copy_(bits.to(torch.int16))
        p.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))


def _quantiles(*, signed: bool) -> Tensor:
    """The 256 values of dynamic 8-bit quantization (Dettmers et al., 2022)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2 ** (exponent + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, count + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values + [0.0] * (256 - len(values))))


class Adam8bit(KeepsTypes):
    """AdamW with blockwise 8-bit moments in the layout of bitsandbytes; those of small tensors are
    float32.  `nested` puts the quantized state into a dict of its own, as releases from 0.50 do.
    """

    BLOCK = 256

    def __init__(self, params: Any, lr: float, *, nested: bool = False) -> None:
        self.nested = nested
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "alpha": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                held = self._held(state)
                small = p.numel() < 4096
                if small:
                    for key in ("state1", "state2"):
                        held.setdefault(key, torch.zeros_like(p))
                    first, second = held["state1"], held["state2"]
                else:
                    first, second = self._read(held, 1, p), self._read(held, 2, p)
                p.sub_(group["lr"] * _adam(first, second, state["step"], p.grad, group))
                if not small:
                    self._write(held, 1, first)
                    self._write(held, 2, second)

    def _held(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self.nested:
            return state
        found: dict[str, Any] = state.setdefault("__bnb_optimizer_quant_state__", {})
        return found

    def _read(self, held: dict[str, Any], number: int, p: Tensor) -> Tensor:
        if f"state{number}" not in held:
            held[f"qmap{number}"] = _quantiles(signed=number == 1)
            return torch.zeros_like(p)
        codes = held[f"qmap{number}"][held[f"state{number}"].flatten().long()]
        blocks: Tensor = codes.view(-1, self.BLOCK) * held[f"absmax{number}"][:, None]
        return blocks.view(p.shape)

    def _write(self, held: dict[str, Any], number: int, moment: Tensor) -> None:
        blocks = moment.view(-1, self.BLOCK)
        absmax = blocks.abs().amax(1)
        values = held[f"qmap{number}"]
        scaled = (blocks / absmax.clamp_min(1e-38)[:, None]).contiguous()
        codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)
        held[f"state{number}"] = codes.to(torch.uint8).view(moment.shape)
        held[f"absmax{number}"] = absmax
