"""The scales of a model's weights, and the quantization step that all its groups share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ckptvcs.codec.frame import slices_of
from ckptvcs.codec.sections import sample
from ckptvcs.codec.spec import NearSpec
from ckptvcs.codec.words import double_squares, to_float32
from ckptvcs.encode.group import Floats, Group

_SAMPLE = 1 << 16  # sampled entries of a tensor
_SAMPLED_SLICES = 4
_OUTLYING = 4.0  # largest RMS of a residual that counts, over that of the median tensor
_NOISE = 0.066  # approximate NMSE of residuals at a quantization step of one standard deviation
_SETTLED = 0.05  # residual energy over weight energy, below which weights have settled
_UNSETTLED = 0.1  # limit of the update NMSE before weights have settled
_MARGIN = 0.9  # of a bound, since scales are measured on samples


@dataclass(frozen=True)
class Scale:
    """RMS of a weight and of its residual, and the median of log2 of its second moment.

    `residual` is None without a base, `second` is None without a second moment.
    """

    words: int
    weight: float
    residual: float | None
    second: float | None


def _finite_rms(values: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        finite = values[np.isfinite(values)]
        return float(np.sqrt(np.mean(double_squares(finite)))) if finite.size else 0.0


def measure_scale(group: Group) -> Scale:
    """Measure the scale of a group with a weight, on a sample."""
    assert group.weight is not None
    numbers = slices_of(group.words)
    picked = numbers[:: max(1, len(numbers) // _SAMPLED_SLICES)][:_SAMPLED_SLICES]
    size = _SAMPLE // max(1, len(picked))
    weights, residuals, seconds = [], [], []
    for number in picked:
        values = group.weight.sampled(number, size)
        weights.append(values)
        if group.weight.base is not None:
            base = sample(to_float32(group.weight.base.slice(number), group.weight.dtype), size)
            with np.errstate(over="ignore", invalid="ignore"):
                residuals.append(values - base)
        if group.second is not None:
            second = group.second.sampled(number, size)
            seconds.append(second[(second > 0) & np.isfinite(second)])
    positive = np.concatenate(seconds) if seconds else np.zeros(0, np.float32)
    return Scale(
        group.words,
        _finite_rms(np.concatenate(weights)) if weights else 0.0,
        _finite_rms(np.concatenate(residuals)) if residuals else None,
        float(np.median(np.log2(positive))) if positive.size else None,
    )


def _weighted_median(values: list[float], weights: list[int]) -> float:
    order = np.argsort(values)
    total = np.cumsum(np.asarray(weights)[order])
    return float(values[order[int(np.searchsorted(total, total[-1] / 2))]])


@dataclass(frozen=True)
class NearPlan:
    """Settings that all groups of a commit share.

    `residual` is the RMS of all residuals, `second` the median of log2 of all second moments.
    """

    spec: NearSpec
    residual: float
    second: float

    @classmethod
    def of(cls, spec: NearSpec, scales: Iterable[Scale]) -> NearPlan:
        """Return the plan for weights of these scales.

        The RMS of each residual is clipped, so that one re-initialised layer does not set the
        quantization step of all others. The steps of `spec` become finer if the bound on the
        error of weights requires it.
        """
        rows = list(scales)
        spec = _finer(spec, rows)
        moved = [row for row in rows if row.residual]
        residual = 0.0
        if moved:
            sizes = [row.words for row in moved]
            values = [row.residual or 0.0 for row in moved]
            limit = _OUTLYING * _weighted_median(values, sizes)
            energy = np.square(np.minimum(values, limit))
            residual = float(np.sqrt(np.average(energy, weights=sizes)))
        known = [(row.second, row.words) for row in rows if row.second is not None]
        second = _weighted_median([s for s, _ in known], [w for _, w in known]) if known else 0.0
        return cls(spec, residual, second)


def _finer(spec: NearSpec, rows: list[Scale]) -> NearSpec:
    """Return a spec whose quantization steps are expected to meet the bound on weight errors.

    The limit of the update NMSE is lower while weights move by a large part of their size: the loss
    is then more sensitive to errors than that of a settled model.
    """
    moved = [row for row in rows if row.residual is not None]
    residual = sum(row.words * float(row.residual or 0) ** 2 for row in moved)
    weight = sum(row.words * row.weight**2 for row in moved)
    if residual > _SETTLED * weight or not rows:
        spec = replace(spec, max_update_nmse=min(_UNSETTLED, spec.max_update_nmse))
    bound = (_MARGIN * spec.max_weight_error) ** 2 * weight
    if not spec.max_weight_error or _NOISE * spec.step**2 * residual <= bound:
        return spec
    share = float(np.sqrt(bound / (_NOISE * residual))) / spec.step
    return replace(spec, step=share * spec.step, cap=share * spec.cap)
