"""Compute the next optimizer step from its moments, without the learning rate.

Errors of moments matter only through the next step. Lion takes the sign of its moment and Muon
orthogonalizes it, so a small error of a moment can become a large error of the step. If the
optimizer is unknown, the worst step of all candidates counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptvcs.checkpoint.optimizer_state import SECOND, Rule
from ckptvcs.codec.words import double_squares

Floats = NDArray[np.float32]
Moments = Mapping[str, Floats]
"""Moments of the same entries, by key in the optimizer state."""
Step = Callable[[Rule, Moments, Floats], Floats]
"""Returns the step from moments and a gradient, without the learning rate."""

_DOUBT = 1.1  # tolerance of `_most_share` for samples and rounding
_LEAST_SHARE = 1e-3  # of a first moment; Adam has 0.05 if gradients are pure noise
_SIDE = 128  # rows and columns of the block on which a step of Muon is computed
_TIMES = 5  # Newton-Schulz iterations
_SQUARES = ("exp_avg_sq", "exp_avg_var", "v", "nu", "max_exp_avg_sq")
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of torch.optim.Muon


def steps_of(rule: Rule, moments: Moments) -> list[Step]:
    """Return the candidate step functions of an optimizer with these moments.

    A known optimizer has one. Steps of Muon need whole matrices: see `orthogonal`.
    """
    keys = moments.keys()
    if keys & {*_SQUARES}:
        adams: list[Step] = [_adam]
        share = _share(moments)
        if share is not None and share < _LEAST_SHARE:
            adams.append(_over_norm)
        is_bounded = share is None or share <= _DOUBT * _most_share(rule)
        alone = (rule.kind == "adam" and rule.is_sure and is_bounded) or not keys - SECOND
        return adams if alone else [*adams, _momentum]
    for key, step in _STEPS_OF_KEYS:
        if key in keys:
            return [step]
    return _STEPS_OF_KINDS.get(rule.kind, [_momentum, _lion])


def _share(moments: Moments) -> float | None:
    """Return the energy of the first moment over that of the gradients (the sum of `v`)."""
    second = _first(moments, "exp_avg_sq", "v", "nu")
    if second is None or not moments.keys() - SECOND:
        return None
    energy = float(second.sum(dtype=np.float64))
    return float(double_squares(_average(moments)).sum()) / energy if energy else None


def _most_share(rule: Rule) -> float:
    """Return the largest possible `_share` of an average of gradients (Cauchy-Schwarz).

    ADOPT exceeds it, because it averages steps.
    """
    if rule.beta1**2 >= rule.beta2:
        return np.inf
    return (1 - rule.beta1) ** 2 / ((1 - rule.beta2) * (1 - rule.beta1**2 / rule.beta2))


def is_known(rule: Rule, keys: Iterable[str]) -> bool:
    """Return whether the step function for moments with these keys is known or likely."""
    steps = steps_of(rule, dict.fromkeys(keys, np.zeros(0, np.float32)))
    return rule.kind == "adam" or len(steps) == 1


def gradient_scale(rule: Rule, moments: Moments) -> Floats:
    """Return the likely size of the next gradient, per entry or as one value."""
    second = _first(moments, *_SQUARES, "square_avg")
    if second is not None:
        return np.sqrt(second)
    if "exp_inf" in moments:
        return moments["exp_inf"] * np.float32(0.3)
    if "sum" in moments:  # assume a sum of 100 gradients
        return np.sqrt(moments["sum"]) * np.float32(0.1)
    # The average of independent gradients is smaller than the gradients.
    beta = rule.beta2 if rule.kind == "lion" else rule.beta1
    spread = float(np.sqrt(np.mean(double_squares(_average(moments)))))
    return np.full(1, spread * np.sqrt((1 + beta) / (1 - beta)), np.float32)


def steps_alone(moments: Moments) -> bool:
    """Return whether the step is not divided by a second moment, or is clipped after that."""
    return not moments.keys() & SECOND or "hessian" in moments


def _first(moments: Moments, *keys: str) -> Floats | None:
    """Return the moment with the first of these keys that the optimizer has."""
    return next((moments[key] for key in keys if key in moments), None)


def _average(moments: Moments) -> Floats:
    average = _first(moments, "exp_avg", "momentum_buffer", "exp_avg_fast", "m", "mu")
    return next(iter(moments.values())) if average is None else average


def _blend(beta: float, average: Floats | None, new: Floats) -> Any:
    """Return the next value of an exponential average; the new value if there is no average."""
    return new if average is None else beta * average + (1 - beta) * new


def _adam(rule: Rule, moments: Moments, gradient: Floats) -> Floats:
    """Return the step of Adam, AMSGrad, NAdam, RAdam, AdaBelief, AdEMAMix or Adan."""
    ahead = _blend(rule.beta1, _first(moments, "exp_avg", "exp_avg_fast", "m", "mu"), gradient)
    if "exp_avg_slow" in moments:
        ahead = ahead + (rule.alpha or 1) * moments["exp_avg_slow"]
    if "exp_avg_diff" in moments:
        ahead = ahead + moments["exp_avg_diff"]
    second, root = _first(moments, *_SQUARES[:-1]), np.zeros(1, np.float32)
    if second is not None:
        root = _blend(rule.beta2, second, np.square(gradient))
    if "max_exp_avg_sq" in moments:
        root = np.maximum(root, moments["max_exp_avg_sq"])
    return np.asarray(ahead / (np.sqrt(root) + rule.eps), np.float32)


def _momentum(_rule: Rule, moments: Moments, _gradient: Floats) -> Floats:
    """Return the step of an optimizer that moves along its momentum."""
    return _average(moments)


def _over_norm(_rule: Rule, moments: Moments, _gradient: Floats) -> Floats:
    """Return the step if `v` is a norm (as in Adamax), not an average of squares."""
    second = next(moments[key] for key in _SQUARES if key in moments)
    return np.asarray(_average(moments) / np.maximum(second, np.float32(1e-30)), np.float32)


def _adamax(rule: Rule, moments: Moments, gradient: Floats) -> Floats:
    norm = np.maximum(rule.beta2 * moments["exp_inf"], np.abs(gradient) + rule.eps)
    return np.asarray(_blend(rule.beta1, moments.get("exp_avg"), gradient) / norm, np.float32)


def _adadelta(rule: Rule, moments: Moments, gradient: Floats) -> Floats:
    squares = _blend(rule.beta2, moments.get("square_avg"), np.square(gradient))
    past = np.sqrt(moments["acc_delta"] + rule.eps)
    return np.asarray(past / np.sqrt(squares + rule.eps) * gradient, np.float32)


def _sophia(rule: Rule, moments: Moments, gradient: Floats) -> Floats:
    bound = np.float32(rule.alpha or 0.04) * moments["hessian"]
    ahead = _blend(rule.beta1, _average(moments), gradient)
    return np.asarray(np.clip(ahead / np.maximum(bound, np.float32(1e-15)), -1, 1), np.float32)


def _rmsprop(rule: Rule, moments: Moments, gradient: Floats) -> Floats:
    """Return the step of Adagrad, or of RMSprop (plain, centred or with momentum)."""
    squares = np.square(gradient)
    summed = "sum" in moments
    mean = (
        moments["sum"] + squares if summed else _blend(rule.beta2, moments["square_avg"], squares)
    )
    if "grad_avg" in moments:  # a near form may make the root NaN, which counts as an error
        mean = mean - np.square(_blend(rule.beta2, moments["grad_avg"], gradient))
    step = gradient / (np.sqrt(mean) + rule.eps)
    if "momentum_buffer" in moments:
        step = np.asarray(rule.beta1 * moments["momentum_buffer"] + step, np.float32)
    return np.asarray(step, np.float32)


def _lion(rule: Rule, moments: Moments, gradient: Floats) -> Floats:
    step: Floats = np.sign(_blend(rule.beta1, _average(moments), gradient))
    return step


_STEPS_OF_KEYS: tuple[tuple[str, Step], ...] = (
    ("exp_inf", _adamax),
    ("acc_delta", _adadelta),
    ("hessian", _sophia),
    ("square_avg", _rmsprop),
    ("sum", _rmsprop),
)
"""Step functions by a key that only their optimizers have."""

_STEPS_OF_KINDS: dict[str, list[Step]] = {"sgd": [_momentum], "muon": [_momentum], "lion": [_lion]}


def takes_matrices(rule: Rule, moments: Moments) -> bool:
    """Return whether the optimizer is Muon, or may be."""
    return rule.kind == "muon" or (rule.kind == "" and [*moments] == ["momentum_buffer"])


def orthogonal(values: Floats, columns: int, start: int) -> Floats | None:
    """Return the Muon step of the top left block of a slice, shape (<=128, <=128).

    `columns` is the width of the matrix, `start` the position of the slice in its first row. Return
    None if the slice has fewer than two whole rows, or values that are not finite.
    """
    first = -start % columns
    rows = (values.size - first) // columns
    if min(rows, columns) < 2:
        return None
    matrix = values[first : first + rows * columns].reshape(rows, columns)[:_SIDE, :_SIDE]
    norm = np.linalg.norm(matrix)
    if not np.isfinite(norm):
        return None
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T) / (norm + np.float32(1e-7))
    a, b, c = _QUINTIC
    for _ in range(_TIMES):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return np.asarray(x, np.float32)
