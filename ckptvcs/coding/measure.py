"""How far the near form of a slice is from what was asked for.

    weight   squared error against squared weight and squared residual, plain and weighted by the
             second moment (the empirical Fisher information, as far as an optimizer knows it)
    moments  squared error of m and of sqrt(v), and *update NMSE*: the relative squared error of the
             optimizer's next step, since a moment matters by nothing but the steps it makes

The next step is taken with a gradient drawn from N(0, v), from the true and the restored state, on
a fixed sample of entries.
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

_SAMPLE = 1 << 16  # entries of a tensor whose next step is looked at
_LEAST = 1 << 12  # of a slice


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


def _step(rule: Rule, first: Floats | None, second: Floats | None, gradient: Floats) -> Floats:
    """The optimizer's next step, but for the learning rate."""
    if second is None:
        assert first is not None
        return first  # momentum alone: the gradient adds the same to both
    ahead = gradient
    if first is not None:
        ahead = rule.beta1 * first + (1 - rule.beta1) * gradient
    root = np.sqrt(rule.beta2 * second + (1 - rule.beta2) * np.square(gradient))
    return (ahead / (root + rule.eps)).astype(np.float32)


def step_sample(words: int) -> int:
    """How many entries of a slice are looked at, in a tensor of `words` words."""
    return max(_LEAST, _SAMPLE // max(1, len(slice_counts(words))))


def measure_step(
    rule: Rule, first: tuple[Floats, Floats] | None, second: tuple[Floats, Floats] | None,
    count: int,
) -> Errors:  # fmt: skip
    """The error of the next step, from (true, restored) moments of a sample that stands for `count`
    entries; either may be missing.
    """
    pairs = [pair for pair in (first, second) if pair is not None]
    gradient = _normal()[: pairs[0][0].size]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if second is not None:
            gradient = gradient * np.sqrt(second[0])
        steps = [
            _step(rule, first and first[restored], second and second[restored], gradient)
            for restored in (0, 1)
        ]
        share = count / max(1, gradient.size)
        out = Errors(
            update_error=share * float(np.square(steps[1] - steps[0], dtype=np.float64).sum()),
            update_energy=share * float(np.square(steps[0], dtype=np.float64).sum()),
        )
    return finite(out)
