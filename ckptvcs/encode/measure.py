"""Measure the error of the near form of a slice.

    weight   squared error over squared weight and squared residual, plain and weighted by the
             second moment (an estimate of the empirical Fisher information)
    moments  squared error of m and of sqrt(v), and the *update NMSE*: the relative squared error of
             the next optimizer step, the only way in which errors of moments matter

The next step follows the optimizer's update rule (`updates.py`), from the original and the decoded
moments, with simulated gradients, on a fixed sample of entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import lru_cache
from math import sqrt

import numpy as np

from ckptvcs.checkpoint.optimizer_state import Rule
from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.codec import kernels
from ckptvcs.codec.frame import slice_size, slices_of
from ckptvcs.codec.words import NONE, Words, double_squares, to_float32
from ckptvcs.encode.group import EncodedSlice, Errors, Floats, Group, Target
from ckptvcs.encode.updates import Moments, gradient_scale, orthogonal, steps_alone, steps_of
from ckptvcs.history.commit import ErrorReport
from ckptvcs.history.schema import TensorInfo

_SAMPLE = 1 << 16  # sampled entries of a tensor
_LEAST = 1 << 12  # sampled entries of a slice, at least
_SMALL = np.float32(0.05)
_PARTITION = 1 << 14  # words; longer vectors are partitions (ZeRO, FSDP), not biases
_BEYOND = 1e6  # update NMSE that exceeds every limit


def measure(group: Group, target: Target, number: int, encoded: EncodedSlice) -> Errors:
    """Measure the errors of slice `number` of a member of a group."""
    assert encoded.source is not None
    with np.errstate(over="ignore", invalid="ignore"):
        true, near = (
            to_float32(words, target.dtype) for words in (encoded.source, encoded.decoded)
        )
        if target.squared:
            return Errors(*kernels.active().root_squares(true, near))
        if target is not group.weight:
            error, energy, largest = kernels.active().squares(near, true)
            return Errors(error, energy, largest=largest)
        base = np.zeros_like(true)
        if target.base is not None:
            base = to_float32(target.base.slice(number), target.dtype)
        second = NONE if group.second is None else group.second.floats(number)
        return Errors.of(kernels.active().weight_squares(near, true, base, second))


def finite(errors: Errors) -> Errors:
    """Return the errors, or none if one is not finite: such slices are stored exactly."""
    return errors if all(map(np.isfinite, astuple(errors))) else Errors()


def count_nonfinite(words: Words, dtype: str) -> int:
    """Count the infinite values and NaNs."""
    return int(words.size - np.count_nonzero(np.isfinite(to_float32(words, dtype))))


@lru_cache(1)
def _gradients() -> Floats:
    """Return simulated gradients with an RMS of 1, shape (_SAMPLE,).

    As in real training, most gradients are small: few classes occur in a batch. Small gradients
    make the step depend on the moments, whose errors then count most.
    """
    draw = np.random.default_rng(0)
    sizes = np.where(draw.random(_SAMPLE) < 0.25, 1.96, 0.2).astype(np.float32)
    return sizes * draw.standard_normal(_SAMPLE, np.float32)


def step_sample(words: int) -> int:
    """Return the number of sampled entries of each slice of a tensor of `words` words."""
    return max(_LEAST, _SAMPLE // max(1, len(slices_of(words))))


def measure_step(rule: Rule, true: Moments, near: Moments, count: int) -> Errors:
    """Return the worst error of the next step over all candidate step functions.

    `true` and `near` are the original and decoded moments of a sample of `count` entries.
    """
    size = next(iter(true.values())).size
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        likely = _gradients()[:size] * gradient_scale(rule, true)
        # A first moment alone counts most if the gradient is small, but not zero: the gradient
        # then decides the sign of entries that decode to zero.
        gradients = [likely, _SMALL * likely] if steps_alone(true) else [likely]
        return _worst(
            [
                difference(step(rule, true, gradient), step(rule, near, gradient), count)
                for step in steps_of(rule, true)
                for gradient in gradients
            ],
            count,
        )


def measure_matrix(
    rule: Rule, target: Target, number: int, words: int, near: Floats, other: Errors
) -> Errors:
    """Return the error of a Muon step from `near`, the decoded slice `number` of a tensor.

    `words` is the size of the tensor. If the optimizer may not be Muon, return the worse of this
    and `other`. For a partition of unknown matrices, return an error above every limit.
    """
    if target.columns == words >= _PARTITION:
        return replace(other, update_error=np.inf) if other.update_error else other
    start = target.start(number)
    true, decoded = (orthogonal(v, target.columns, start) for v in (target.floats(number), near))
    if true is None or decoded is None:
        return other
    count = slice_size(words, number)
    muon = difference(true, decoded, count)
    return muon if rule.kind == "muon" else _worst([other, muon], count)


def _worst(errors: list[Errors], count: int) -> Errors:
    """Return the worst relative error of several candidate steps.

    Steps of two optimizers can differ by orders of magnitude. The result is scaled to a step of
    size 1 in each entry, so that sums over slices are comparable.
    """
    if len(errors) == 1:
        return errors[0]
    share = max(
        error.update_error / error.update_energy
        if error.update_energy
        else _BEYOND
        if error.update_error
        else 0.0
        for error in errors
    )
    return Errors(update_error=share * count, update_energy=float(count))


def difference(true: Floats, near: Floats, count: int) -> Errors:
    """Return the error of a step over its finite entries, extrapolated to `count` entries.

    It exceeds every limit if the near step is not finite there.
    """
    share, finite_ones = count / max(1, true.size), np.isfinite(true)
    if not finite_ones.all():
        true, near = true[finite_ones], near[finite_ones]
    energy = share * float(double_squares(true).sum())
    error = share * float(double_squares(near - true).sum())
    if not np.isfinite(error):
        error = _BEYOND * max(energy, 1.0)
    return Errors(update_error=error, update_energy=energy)


def _ratio(error: float, energy: float) -> float:
    return error / energy if energy else 0.0


def _report(sums: Errors) -> ErrorReport:
    return ErrorReport(
        sqrt(_ratio(sums.error, sums.energy)),
        _ratio(sums.error, sums.residual),
        _ratio(sums.fisher_error, sums.fisher_residual),
        _ratio(sums.update_error, sums.update_energy),
        sums.largest,
        sums.error / sums.movement if sums.movement else None,
    )


def report(errors: Mapping[int, Errors], infos: Sequence[TensorInfo]) -> ErrorReport:
    """Return the errors of a commit: those of all weights, and of all next steps."""
    total = Errors()
    for number, sums in errors.items():
        if infos[number].role == WEIGHT:
            total.add(sums)
        total.update_error += sums.update_error
        total.update_energy += sums.update_energy
    return _report(total)


def report_tensors(
    errors: Mapping[int, Errors], infos: Sequence[TensorInfo]
) -> dict[int, ErrorReport]:
    """Return the errors of each tensor that is not exact.

    `residual_nmse` of a moment is the NMSE of its values, or of their roots for second moments.
    """
    reports = {}
    for number, sums in errors.items():
        if sums.error:
            report = _report(sums)
            if infos[number].role != WEIGHT:
                nmse = _ratio(sums.error, sums.energy)
                report = ErrorReport(0.0, nmse, 0.0, report.update_nmse, report.max_abs)
            reports[number] = report
    return reports
