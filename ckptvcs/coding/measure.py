"""How far the near form of a slice is from what was asked for.

    weight   squared error against squared weight and squared residual, plain and weighted by the
             second moment (the empirical Fisher information, as far as an optimizer knows it)
    moments  squared error of m and of sqrt(v), and *update NMSE*: the relative squared error of the
             optimizer's next step, since a moment matters by nothing but the steps it makes

The next step is taken by the optimizer's own rule (`updates.py`), from the true and the restored
state, with a gradient as it is likely to come, on a fixed sample of entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache

import numpy as np

from ckptvcs.checkpoint.roles import Rule
from ckptvcs.codec import loops
from ckptvcs.codec.frame import slice_counts
from ckptvcs.codec.words import NONE, Words, to_float32
from ckptvcs.coding.group import CodedSlice, Errors, Floats, Group, Target
from ckptvcs.coding.updates import Moments, gradient_scale, steps_alone, steps_of

_SAMPLE = 1 << 16  # entries of a tensor whose next step is looked at
_LEAST = 1 << 12  # of a slice
_SMALL = np.float32(0.05)
_BEYOND = 1e6  # times the step itself


def measure(
    group: Group, number: int, members: Sequence[Target], slices: Sequence[CodedSlice]
) -> tuple[Errors, ...]:
    """The errors of slice `number` of each member."""
    return tuple(
        finite(
            measure_weight(group, number, coded)
            if target is group.weight
            else measure_moment(target, coded)
        )
        for target, coded in zip(members, slices, strict=True)
    )


def measure_weight(group: Group, number: int, coded: CodedSlice) -> Errors:
    """The errors of slice `number` of a group's weight."""
    assert group.weight is not None
    assert coded.source is not None
    dtype = group.weight.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        true, near = (to_float32(words, dtype) for words in (coded.source, coded.decoded))
        base = np.zeros_like(true)
        if group.base is not None:
            base = to_float32(group.base.slice(number), dtype)
        second = NONE if group.second is None else group.second.floats(number)
        sums = loops.active().weight_squares(near, true, base, second)
    return Errors.of(sums)


def measure_moment(target: Target, coded: CodedSlice) -> Errors:
    """The errors of a slice of a moment."""
    assert coded.source is not None
    with np.errstate(over="ignore", invalid="ignore"):
        true, near = (to_float32(words, target.dtype) for words in (coded.source, coded.decoded))
        if target.squared:
            return Errors(*loops.active().root_squares(true, near))
        error, energy, largest = loops.active().squares(near, true)
        return Errors(error, energy, largest=largest)


def finite(errors: Errors) -> Errors:
    """No errors for what is stored exactly, with what is not finite in it."""
    return errors if all(map(np.isfinite, astuple(errors))) else Errors()


def count_nonfinite(words: Words, dtype: str) -> int:
    """How many of the values are infinite, or none at all."""
    return int(words.size - np.count_nonzero(np.isfinite(to_float32(words, dtype))))


@lru_cache(1)
def _normal() -> Floats:
    return np.random.default_rng(0).standard_normal(_SAMPLE, np.float32)


def step_sample(words: int) -> int:
    """How many entries of a slice are looked at, in a tensor of `words` words."""
    return max(_LEAST, _SAMPLE // max(1, len(slice_counts(words))))


def measure_step(rule: Rule, true: Moments, near: Moments, count: int) -> Errors:
    """The error of the next step, from the true and the restored moments of a sample that stands
    for `count` entries: the worst, where there are several ways to step.
    """
    size = next(iter(true.values())).size
    worst = Errors()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        likely = _normal()[:size] * gradient_scale(rule, true)
        # What an average says alone counts most where the gradient is small, but not zero: then it
        # gives a sign to what came back as zero.
        gradients = [likely, _SMALL * likely] if steps_alone(true) else [likely]
        for step in steps_of(rule, true):
            for gradient in gradients:
                found = difference(step(true, gradient), step(near, gradient), count)
                if is_worse(found, worst):
                    worst = found
    return worst


def is_worse(one: Errors, other: Errors) -> bool:
    """Whether one has the larger error of its step, as a share of it."""
    return one.update_error * other.update_energy > other.update_error * one.update_energy or (
        not other.update_energy
    )


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
