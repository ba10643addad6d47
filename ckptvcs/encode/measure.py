"""Measure the error of the near form of a slice.

    weight   squared error against squared weight and squared residual, plain and weighted by the
             second moment (the empirical Fisher information, as far as an optimizer knows it)
    moments  squared error of m and of sqrt(v), and *update NMSE*: the relative squared error of the
             optimizer's next step, since a moment matters by nothing but the steps it makes

The next step is taken by the optimizer's own rule (`updates.py`), from the true and the restored
state, with a gradient as it is likely to come, on a fixed sample of entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import lru_cache
from math import sqrt

import numpy as np

from ckptvcs.checkpoint.roles import WEIGHT, Rule
from ckptvcs.codec import kernels
from ckptvcs.codec.frame import slice_counts
from ckptvcs.codec.words import NONE, Words, to_float32
from ckptvcs.encode.group import EncodedSlice, Errors, Floats, Group, Target
from ckptvcs.encode.updates import Moments, gradient_scale, orthogonal, steps_alone, steps_of
from ckptvcs.history.commit import ErrorReport
from ckptvcs.history.schema import TensorInfo

_SAMPLE = 1 << 16  # entries of a tensor whose next step is looked at
_LEAST = 1 << 12  # of a slice
_SMALL = np.float32(0.05)
_PARTITION = 1 << 14  # words; longer vectors are partitions (ZeRO, FSDP), not biases
_BEYOND = 1e6  # times the step itself


def measure(
    group: Group, number: int, members: Sequence[Target], slices: Sequence[EncodedSlice]
) -> tuple[Errors, ...]:
    """Measure the errors of slice `number` of each member."""
    return tuple(
        finite(
            measure_weight(group, number, coded)
            if target is group.weight
            else measure_moment(target, coded)
        )
        for target, coded in zip(members, slices, strict=True)
    )


def measure_weight(group: Group, number: int, coded: EncodedSlice) -> Errors:
    """Measure the errors of slice `number` of a group's weight."""
    assert group.weight is not None
    assert coded.source is not None
    dtype = group.weight.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        true, near = (to_float32(words, dtype) for words in (coded.source, coded.decoded))
        base = np.zeros_like(true)
        if group.base is not None:
            base = to_float32(group.base.slice(number), dtype)
        second = NONE if group.second is None else group.second.floats(number)
        sums = kernels.active().weight_squares(near, true, base, second)
    return Errors.of(sums)


def measure_moment(target: Target, coded: EncodedSlice) -> Errors:
    """Measure the errors of a slice of a moment."""
    assert coded.source is not None
    with np.errstate(over="ignore", invalid="ignore"):
        true, near = (to_float32(words, target.dtype) for words in (coded.source, coded.decoded))
        if target.squared:
            return Errors(*kernels.active().root_squares(true, near))
        error, energy, largest = kernels.active().squares(near, true)
        return Errors(error, energy, largest=largest)


def finite(errors: Errors) -> Errors:
    """No errors for what is stored exactly, with what is not finite in it."""
    return errors if all(map(np.isfinite, astuple(errors))) else Errors()


def count_nonfinite(words: Words, dtype: str) -> int:
    """Count the infinite values and NaNs."""
    return int(words.size - np.count_nonzero(np.isfinite(to_float32(words, dtype))))


@lru_cache(1)
def _gradients() -> Floats:
    """Gradients in units of their size: a fourth of them is about twice that, the others are small.

    Real ones are so: most classes are in no batch.  Where the gradient is small, the step is what
    the moments say, and their errors count most.
    """
    draw = np.random.default_rng(0)
    sizes = np.where(draw.random(_SAMPLE) < 0.25, 1.96, 0.2).astype(np.float32)
    return sizes * draw.standard_normal(_SAMPLE, np.float32)


def step_sample(words: int) -> int:
    """How many entries of a slice are looked at, in a tensor of `words` words."""
    return max(_LEAST, _SAMPLE // max(1, len(slice_counts(words))))


def measure_step(rule: Rule, true: Moments, near: Moments, count: int) -> Errors:
    """The error of the next step, from the true and the restored moments of a sample that stands
    for `count` entries: the worst, where there are several ways to step.
    """
    size = next(iter(true.values())).size
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        likely = _gradients()[:size] * gradient_scale(rule, true)
        # What an average says alone counts most where the gradient is small, but not zero: then it
        # gives a sign to what came back as zero.
        gradients = [likely, _SMALL * likely] if steps_alone(true) else [likely]
        return _worst(
            [
                difference(step(true, gradient), step(near, gradient), count)
                for step in steps_of(rule, true)
                for gradient in gradients
            ],
            count,
        )


def measure_matrix(
    rule: Rule, target: Target, number: int, words: int, near: Floats, other: Errors
) -> Errors:
    """The error of a step that is orthogonal, as Muon's, from the restored floats of a slice of
    a tensor of so many `words`; the worse one of this and an `other`, where Muon is only likely;
    beyond any bound where it is not known which matrices a partition holds.
    """
    if target.columns == words >= _PARTITION:
        return replace(other, update_error=np.inf) if other.update_error else other
    start = target.start(number)
    true, back = (orthogonal(v, target.columns, start) for v in (target.floats(number), near))
    if true is None or back is None:
        return other
    count = slice_counts(words)[number]
    found = difference(true, back, count)
    return found if rule.kind == "muon" else _worst([other, found], count)


def _worst(errors: list[Errors], count: int) -> Errors:
    """The worst error of several steps that are possible, as a share of a step.

    The steps of two optimizers can differ by orders of magnitude.  So that sums over slices stay
    sums of one kind, such a step counts as one of size 1 in each of its entries.
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
    """The error of a step, of which some entries stand for `count`, over those that are finite;
    beyond any bound where the near one is not finite there.
    """
    share, known = count / max(1, true.size), np.isfinite(true)
    if not known.all():
        true, near = true[known], near[known]
    energy = share * float(np.square(true, dtype=np.float64).sum())
    error = share * float(np.square(near - true, dtype=np.float64).sum())
    if not np.isfinite(error):
        error = _BEYOND * max(energy, 1.0)
    return Errors(update_error=error, update_energy=energy)


def _ratio(error: float, energy: float) -> float:
    return error / energy if energy else 0.0


def _weights(sums: Errors) -> ErrorReport:
    return ErrorReport(
        sqrt(_ratio(sums.error, sums.energy)),
        _ratio(sums.error, sums.residual),
        _ratio(sums.fisher_error, sums.fisher_residual),
        _ratio(sums.update_error, sums.update_energy),
        sums.largest,
    )


def report(errors: Mapping[int, Errors], infos: Sequence[TensorInfo]) -> ErrorReport:
    """The errors of a commit: of its weights together, and of all next steps together."""
    total = Errors()
    for number, sums in errors.items():
        if infos[number].role == WEIGHT:
            total.add(sums)
        total.update_error += sums.update_error
        total.update_energy += sums.update_energy
    return _weights(total)


def report_tensors(
    errors: Mapping[int, Errors], infos: Sequence[TensorInfo]
) -> dict[int, ErrorReport]:
    """The errors of each tensor that is not exact.  A moment's own NMSE stands as
    `residual_nmse`: of exp_avg as it is, of squares by their roots.
    """
    found = {}
    for number, sums in errors.items():
        if sums.error:
            one = _weights(sums)
            if infos[number].role != WEIGHT:
                nmse = _ratio(sums.error, sums.energy)
                one = ErrorReport(0.0, nmse, 0.0, one.update_nmse, one.max_abs)
            found[number] = one
    return found
