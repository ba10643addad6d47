"""The scales of a model's weights, and the quantization step that all its groups share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ckptvcs.codec.frame import slice_counts
from ckptvcs.codec.sections import sample
from ckptvcs.codec.spec import NearSpec
from ckptvcs.codec.words import to_float32
from ckptvcs.encode.group import Floats, Group

_SAMPLE = 1 << 16  # entries of a tensor that its scale is taken from
_SAMPLED_SLICES = 4
_OUTLYING = 4.0  # a tensor's residual counts as at most this many times the median tensor's
_NOISE = 0.066  # NMSE of residuals over the square of their step in standard deviations, about
_SETTLED = 0.05  # energy of the movement of weights, over theirs, below which they have settled
_UNSETTLED = 0.1  # error of a step, where they have not, or where the averages are not known
_MARGIN = 0.9  # of a bound, to be on the safe side of samples


@dataclass(frozen=True)
class Scale:
    """Root mean squares of a weight and of its residual (None without a base); the median of log2
    of its second moment (None without one).
    """

    words: int
    weight: float
    residual: float | None
    second: float | None


def _finite_rms(values: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        finite = values[np.isfinite(values)]
        return float(np.sqrt(np.mean(np.square(finite, dtype=np.float64)))) if finite.size else 0.0


def measure_scale(group: Group) -> Scale:
    """The scale of a group that has a weight, from a sample."""
    assert group.weight is not None
    numbers = range(len(slice_counts(group.words)))
    picked = numbers[:: max(1, len(numbers) // _SAMPLED_SLICES)][:_SAMPLED_SLICES]
    size = _SAMPLE // max(1, len(picked))
    weights, residuals, seconds = [], [], []
    for number in picked:
        values = group.weight.sampled(number, size)
        weights.append(values)
        if group.base is not None:
            base = sample(to_float32(group.base.slice(number), group.weight.dtype), size)
            with np.errstate(over="ignore", invalid="ignore"):
                residuals.append(values - base)
        if group.second is not None:
            second = group.second.sampled(number, size)
            seconds.append(second[(second > 0) & np.isfinite(second)])
    found = np.concatenate(seconds) if seconds else np.zeros(0, np.float32)
    return Scale(
        group.words,
        _finite_rms(np.concatenate(weights)) if weights else 0.0,
        _finite_rms(np.concatenate(residuals)) if residuals else None,
        float(np.median(np.log2(found))) if found.size else None,
    )


def _weighted_median(values: list[float], weights: list[int]) -> float:
    order = np.argsort(values)
    total = np.cumsum(np.asarray(weights)[order])
    return float(values[order[int(np.searchsorted(total, total[-1] / 2))]])


@dataclass(frozen=True)
class NearPlan:
    """What all groups of a commit share: the scale of residuals, the middle of log2 of second
    moments.
    """

    spec: NearSpec
    residual: float
    second: float

    @classmethod
    def of(cls, spec: NearSpec, scales: Iterable[Scale]) -> NearPlan:
        """The plan for weights of these scales.

        A re-initialised layer, say, must not set the step of all others: residuals far above the
        median tensor's are cut.  Where the bound on the error of weights asks for it, steps are
        finer than `spec` has them.
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
    """Steps with which the bound on the error of weights holds, as far as scales tell.

    The bounds are tighter for weights that move by much of their own size between commits.  The
    loss is far from flat around them, and falls with every step: an error that a settled model does
    not feel costs loss there.  So they are where no weight tells how far a run is.
    """
    residual, weight = _energies(rows)
    if residual > _SETTLED * weight or not rows:
        spec = replace(spec, max_update_nmse=min(_UNSETTLED, spec.max_update_nmse))
    bound = (_MARGIN * spec.max_weight_error) ** 2 * weight
    if not spec.max_weight_error or _NOISE * spec.step**2 * residual <= bound:
        return spec
    share = float(np.sqrt(bound / (_NOISE * residual))) / spec.step
    return replace(spec, step=share * spec.step, cap=share * spec.cap)


def _energies(rows: Iterable[Scale]) -> tuple[float, float]:
    """Sums of squares over all residuals, and over the weights that have one."""
    moved = [row for row in rows if row.residual is not None]
    residual = sum(row.words * float(row.residual or 0) ** 2 for row in moved)
    return residual, sum(row.words * row.weight**2 for row in moved)
