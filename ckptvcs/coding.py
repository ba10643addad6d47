"""Coding of one tensor, or of a weight with its moments: slices in, coded slices out.

Two passes over the data at most: one to measure (thresholds, codebooks), one to code.  Both go
slice by slice, so memory does not depend on the size of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ckptvcs.codec import excp, lossless
from ckptvcs.codec.excp import Centres, Floats
from ckptvcs.codec.frame import (
    LOSSLESS,
    MOMENT,
    RESIDUAL,
    SHARED_MASK_MOMENT,
    put_slice,
    slice_counts,
)  # fmt: skip
from ckptvcs.codec.sparse import Mask
from ckptvcs.codec.spec import ExcpSpec
from ckptvcs.codec.words import Words, to_float32
from ckptvcs.dtypes import DType
from ckptvcs.parallel import ordered_map

_SAMPLE = 1 << 20  # entries that thresholds and codebooks are fitted on
_RUN = 1 << 12  # a sample is made of runs of this many entries at even distances
_LIMITS = {"F32": 1e38, "BF16": 1e38, "F16": 3e4}  # larger weights could overflow when decoded


class Tensor(Protocol):
    """A tensor that is read slice by slice."""

    def slice(self, number: int) -> Words:
        """The words of one slice."""


@dataclass(frozen=True)
class CodedSlice:
    """A slice as it is stored, the words it decodes to, and the words that were asked for."""

    data: bytes
    decoded: Words
    source: Words


@dataclass(frozen=True)
class SliceErrors:
    """Squared errors of a slice of a weight, its squared values, its squared residuals."""

    error: float
    weight: float
    residual: float


def code_lossless(
    tensor: Tensor, base: Tensor | None, dtype: DType, words: int
) -> Iterator[tuple[CodedSlice, bool]]:
    """Code a tensor exactly; each slice, and whether it stands on the base."""

    def code(number: int) -> tuple[CodedSlice, bool]:
        source = tensor.slice(number)
        payload = lossless.encode(source, base.slice(number) if base else None, dtype)
        data = put_slice(LOSSLESS, payload)
        return CodedSlice(data, source, source), lossless.needs_base(memoryview(payload))

    return ordered_map(code, range(len(slice_counts(words))))


@dataclass(frozen=True)
class Target:
    """A tensor of `dtype` that is to be coded with loss."""

    tensor: Tensor
    dtype: str

    def floats(self, number: int) -> Floats:
        """The values of one slice."""
        return to_float32(self.tensor.slice(number), self.dtype)


@dataclass(frozen=True)
class Group:
    """What ExCP codes together, all of as many words: a weight and its base, its moments.

    A weight without moments, and moments whose weight is not known, are groups too.
    """

    words: int
    weight: Target | None = None
    base: Tensor | None = None
    first: Target | None = None
    second: Target | None = None

    def residual(self, number: int) -> Floats | None:
        """Weight - base in one slice.  NaN where the weight is too large to be coded safely."""
        if self.weight is None or self.base is None:
            return None
        target = self.weight.floats(number)
        with np.errstate(over="ignore", invalid="ignore"):
            residual = target - to_float32(self.base.slice(number), self.weight.dtype)
            residual[~(np.abs(target) < _LIMITS[self.weight.dtype])] = np.nan
        return residual


@dataclass(frozen=True)
class ExcpPlan:
    """Thresholds and codebooks of one group."""

    residual_threshold: float
    moment_threshold: float
    weight: Centres
    first: Centres
    second: Centres


@dataclass
class _Sample:
    """Entries of residual, exp_avg and exp_avg_sq at the same positions, and sums over all."""

    residual: list[Floats]
    first: list[Floats]
    second: list[Floats]
    moved: bool = False
    first_sum: float = 0.0
    second_sum: float = 0.0


def _picked(count: int, share: float) -> slice | Mask:
    """Which entries of a slice of `count` are in the sample."""
    if share >= 1:
        return slice(None)
    runs = np.arange(count) // _RUN
    picked: Mask = np.floor((runs + 1) * share) > np.floor(runs * share)
    return picked


def plan_excp(group: Group, spec: ExcpSpec) -> ExcpPlan | None:
    """Measure a group.

    None where ExCP does not apply: values that are not finite or too large for its float16
    centres, or a weight that did not move, whose moments it would set to zero.
    """
    share = _SAMPLE / group.words
    sample = _Sample([], [], [], moved=group.weight is None)

    def measure(number: int) -> tuple[Floats | None, Floats | None, Floats | None]:
        first = None if group.first is None else group.first.floats(number)
        second = None if group.second is None else group.second.floats(number)
        return group.residual(number), first, second

    for residual, first, second in ordered_map(measure, range(len(slice_counts(group.words)))):
        for values, kept in (
            (residual, sample.residual), (first, sample.first), (second, sample.second),
        ):  # fmt: skip
            if values is not None:
                if not np.isfinite(values).all():
                    return None
                kept.append(values[_picked(values.size, share)].copy())
        sample.moved = sample.moved or (residual is not None and bool(residual.any()))
        sample.first_sum += 0.0 if first is None else float(np.abs(first).sum(dtype=np.float64))
        sample.second_sum += 0.0 if second is None else float(second.sum(dtype=np.float64))
    return _fit(sample, group, spec) if sample.moved else None


def _fit(sample: _Sample, group: Group, spec: ExcpSpec) -> ExcpPlan | None:
    size = (1 << spec.bits) - 1
    weight_codes = first_codes = second_codes = np.zeros(0, np.float16)
    threshold = 0.0
    mask: Mask | bool = True
    if sample.residual:
        residual = np.concatenate(sample.residual)
        mean_square = sample.second_sum / group.words if group.second is not None else None
        median = float(np.median(np.abs(residual)))
        threshold = excp.residual_threshold(median, mean_square, spec)
        mask = np.abs(residual) > threshold
        weight_codes = excp.fit_codebook(residual[mask], size)
    moment_threshold = spec.beta * sample.first_sum / group.words
    if sample.first:
        first = np.concatenate(sample.first)
        kept = mask & (np.abs(first) > moment_threshold)
        first_codes = excp.fit_codebook(first[kept], size)
        if sample.second:
            second_codes = excp.fit_codebook(np.concatenate(sample.second)[kept], size)
    centres = np.concatenate((weight_codes, first_codes, second_codes))
    if not np.isfinite(centres).all():
        return None
    return ExcpPlan(threshold, moment_threshold, weight_codes, first_codes, second_codes)


@dataclass(frozen=True)
class CodedGroup:
    """One slice of each tensor of a group, in the order weight, exp_avg, exp_avg_sq, and the
    errors of the weight.
    """

    slices: tuple[CodedSlice, ...]
    errors: SliceErrors


def code_excp(group: Group, plan: ExcpPlan) -> Iterator[CodedGroup]:
    """Code a group slice by slice."""

    def code(number: int) -> CodedGroup:
        slices = []
        mask: Mask | bool = True
        errors = SliceErrors(0.0, 0.0, 0.0)
        residual = group.residual(number)
        if residual is not None and group.weight is not None and group.base is not None:
            source, base = group.weight.tensor.slice(number), group.base.slice(number)
            dtype = group.weight.dtype
            # A codebook is empty only where the sample kept nothing; then nothing is kept at all.
            mask = (np.abs(residual) > plan.residual_threshold) & bool(plan.weight.size)
            payload, decoded = excp.encode_residual(source, base, mask, plan.weight, dtype)
            slices.append(CodedSlice(put_slice(RESIDUAL, payload), decoded, source))
            errors = _errors(decoded, to_float32(source, dtype), residual, dtype)
        if group.first is not None:
            large = np.abs(group.first.floats(number)) > plan.moment_threshold
            kept = mask & large & bool(plan.first.size)
            slices.append(_moment(group.first, number, kept, plan.first, own_mask=True))
            if group.second is not None:
                slices.append(_moment(group.second, number, kept, plan.second, own_mask=False))
        return CodedGroup(tuple(slices), errors)

    return ordered_map(code, range(len(slice_counts(group.words))))


def _moment(
    moment: Target, number: int, mask: Mask, centres: Centres, *, own_mask: bool
) -> CodedSlice:
    words = moment.tensor.slice(number)
    payload, decoded = excp.encode_moment(words, mask, centres, moment.dtype, own_mask=own_mask)
    method = MOMENT if own_mask else SHARED_MASK_MOMENT
    return CodedSlice(put_slice(method, payload), decoded, words)


def _errors(decoded: Words, target: Floats, residual: Floats, dtype: str) -> SliceErrors:
    error = (to_float32(decoded, dtype) - target).astype(np.float64)
    return SliceErrors(
        float(error @ error),
        float(np.square(target, dtype=np.float64).sum()),
        float(np.square(residual, dtype=np.float64).sum()),
    )
