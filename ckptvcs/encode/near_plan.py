"""The scales of a model's weights, and the quantization step that all its groups share.

Quantization steps are multiples of the movement since the parent, not of the residual.  The
residual also holds the error of the parent, so errors would make steps larger, and steps errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ckptvcs.codec.sections import sample
from ckptvcs.codec.spec import NearSpec
from ckptvcs.codec.words import double_squares, to_float32
from ckptvcs.encode.error_sample import sampled
from ckptvcs.encode.group import Floats, Group, Target

_SAMPLE = 1 << 16  # sampled entries of a tensor
_OUTLYING = 4.0  # largest RMS of a movement that counts, over that of the median tensor
_NOISE = 0.066  # approximate lag at a quantization step of one standard deviation of the movement
_SETTLED = 0.05  # movement energy over weight energy, below which weights have settled
_LEAST_MOVEMENT = 0.02  # of the energy of the residual: less cannot be told from noise
_LEAST_SAMPLED = 1e-4  # the same, if a sample tells the movement
_UNSETTLED = 0.1  # limit of the update NMSE before weights have settled
_MARGIN = 0.9  # of a bound, since scales are measured on samples


@dataclass(frozen=True)
class Scale:
    """RMS of a weight, of its residual and its movement, and log2 of its second moment.

    `residual` is None without a base. `share` is the energy of the movement over that of the
    residual. `second` is a median, and None without a second moment.
    """

    words: int
    weight: float
    residual: float | None
    share: float
    second: float | None

    @property
    def movement(self) -> float | None:
        """The RMS of the movement since the original of the base."""
        return None if self.residual is None else self.residual * math.sqrt(self.share)


def movement_share(residual: float, error: float) -> float:
    """Return the share of the movement in the energy of a residual, without a sample of errors.

    `error` is the energy of the error of the base. A movement that continues the one before meets
    an error that points back, so this is up to 1.3 times too much.
    """
    return max(1 - error / residual, _LEAST_MOVEMENT) if residual else 1.0


def _finite_rms(values: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        finite = values[np.isfinite(values)]
        return float(np.sqrt(np.mean(double_squares(finite)))) if finite.size else 0.0


def share_of_movement(target: Target) -> float | None:
    """Return the share of the movement in the residuals of a weight; None without a sample."""
    base = target.base
    if base is None or base.errors is None:
        return None
    words = int(np.prod(target.shape, dtype=np.int64))
    picked, few = sampled(words)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = [
            target.sampled(number, few) - sample(to_float32(base.slice(number), target.dtype), few)
            for number in picked
        ]
    residuals = np.concatenate(rows)
    if residuals.size != base.errors.size:
        return None
    return _sampled_share(residuals, base.errors, 1.0)


def _sampled_share(residuals: Floats, errors: Floats, other: float) -> float:
    """Return the share of the movement in sampled residuals, given the errors of the base there.

    Return `other` if the residuals are 0 or not finite.
    """
    residual, movement = _finite_rms(residuals) ** 2, _finite_rms(residuals + errors) ** 2
    return max(movement / residual, _LEAST_SAMPLED) if residual else other


def measure_scale(group: Group) -> Scale:
    """Measure the scale of a group with a weight, on a sample."""
    assert group.weight is not None
    picked, few = sampled(group.words)
    size = _SAMPLE // max(1, len(picked))
    weights, residuals, seconds, bases, moved = [], [], [], [], []
    for number in picked:
        values = group.weight.sampled(number, size)
        weights.append(values)
        if group.weight.base is not None:
            whole = to_float32(group.weight.base.slice(number), group.weight.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                residuals.append(values - sample(whole, size))
                moved.append(group.weight.sampled(number, few) - sample(whole, few))
            bases.append(sample(whole, size))
        if group.second is not None:
            second = group.second.sampled(number, size)
            seconds.append(second[(second > 0) & np.isfinite(second)])
    positive = np.concatenate(seconds) if seconds else np.zeros(0, np.float32)
    residual, share = None, 1.0
    if group.weight.base is not None and residuals:
        residual = _finite_rms(np.concatenate(residuals))
        error = group.weight.base.error * _finite_rms(np.concatenate(bases))
        share = movement_share(residual**2, error**2)
        few_residuals, errors = np.concatenate(moved), group.weight.base.errors
        if errors is not None and errors.size == few_residuals.size:
            share = _sampled_share(few_residuals, errors, share)
    return Scale(
        group.words,
        _finite_rms(np.concatenate(weights)) if weights else 0.0,
        residual,
        share,
        float(np.median(np.log2(positive))) if positive.size else None,
    )


def _weighted_median(values: list[float], weights: list[int]) -> float:
    order = np.argsort(values)
    total = np.cumsum(np.asarray(weights)[order])
    return float(values[order[int(np.searchsorted(total, total[-1] / 2))]])


@dataclass(frozen=True)
class NearPlan:
    """Settings that all groups of a commit share.

    `movement` is the RMS of all movements, `second` the median of log2 of all second moments.
    """

    spec: NearSpec
    movement: float
    second: float

    @classmethod
    def of(cls, spec: NearSpec, scales: Iterable[Scale]) -> NearPlan:
        """Return the plan for weights of these scales.

        The RMS of each movement is clipped, so that one re-initialised layer does not set the
        quantization step of all others. The steps of `spec` become finer if a bound on the
        error of weights requires it.
        """
        rows = list(scales)
        spec = _finer(spec, rows)
        moved = [row for row in rows if row.movement]
        movement = 0.0
        if moved:
            sizes = [row.words for row in moved]
            values = [row.movement or 0.0 for row in moved]
            limit = _OUTLYING * _weighted_median(values, sizes)
            energy = np.square(np.minimum(values, limit))
            movement = float(np.sqrt(np.average(energy, weights=sizes)))
        known = [(row.second, row.words) for row in rows if row.second is not None]
        second = _weighted_median([s for s, _ in known], [w for _, w in known]) if known else 0.0
        return cls(spec, movement, second)


def _finer(spec: NearSpec, rows: list[Scale]) -> NearSpec:
    """Return a spec whose quantization steps are expected to meet the bound on weight errors.

    The limit of the update NMSE is lower while weights move by a large part of their size: the loss
    is then more sensitive to errors than that of a settled model.
    """
    moved = [row for row in rows if row.movement is not None]
    movement = sum(row.words * float(row.movement or 0) ** 2 for row in moved)
    weight = sum(row.words * row.weight**2 for row in moved)
    if (movement > _SETTLED * weight or not rows) and spec.max_update_nmse < math.inf:
        spec = replace(spec, max_update_nmse=min(_UNSETTLED, spec.max_update_nmse))
    if not movement:
        return spec
    bounds = [
        (_MARGIN * spec.max_weight_error) ** 2 * weight if spec.max_weight_error else math.inf,
        _MARGIN**2 * spec.lag_bound * movement,
    ]
    bound, step = min(bounds), min(spec.step, spec.cap)
    if _NOISE * step**2 * movement <= bound:
        return spec
    share = float(np.sqrt(bound / (_NOISE * movement))) / step
    return replace(spec, step=share * spec.step, cap=share * spec.cap)
