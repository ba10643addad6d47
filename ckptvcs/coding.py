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
class WeightGroup:
    """A weight, its base, and its moments where it has them; all have as many words."""

    dtype: str
    words: int
    weight: Tensor
    base: Tensor
    first: Tensor | None = None
    first_dtype: str = "F32"
    second: Tensor | None = None
    second_dtype: str = "F32"


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


def plan_excp(group: WeightGroup, spec: ExcpSpec) -> ExcpPlan | None:
    """Measure a group.

    None where ExCP does not apply: values that are not finite or too large for its float16
    centres, or a weight that did not move, whose moments it would set to zero.
    """
    share = _SAMPLE / group.words
    sample = _Sample([], [], [])

    def measure(number: int) -> tuple[Floats, Floats | None, Floats | None]:
        base = to_float32(group.base.slice(number), group.dtype)
        target = to_float32(group.weight.slice(number), group.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            residual = target - base
            if not (np.abs(target) < _LIMITS[group.dtype]).all():
                residual[:1] = np.nan
        first = second = None
        if group.first is not None:
            first = to_float32(group.first.slice(number), group.first_dtype)
        if group.second is not None:
            second = to_float32(group.second.slice(number), group.second_dtype)
        return residual, first, second

    for residual, first, second in ordered_map(measure, range(len(slice_counts(group.words)))):
        picked = _picked(residual.size, share)
        for values, kept in (
            (residual, sample.residual), (first, sample.first), (second, sample.second),
        ):  # fmt: skip
            if values is not None:
                if not np.isfinite(values).all():
                    return None
                kept.append(values[picked].copy())
        sample.moved = sample.moved or bool(residual.any())
        sample.first_sum += 0.0 if first is None else float(np.abs(first).sum(dtype=np.float64))
        sample.second_sum += 0.0 if second is None else float(second.sum(dtype=np.float64))
    return _fit(sample, group, spec) if sample.moved else None


def _fit(sample: _Sample, group: WeightGroup, spec: ExcpSpec) -> ExcpPlan | None:
    residual = np.concatenate(sample.residual)
    mean_square = sample.second_sum / group.words if group.second is not None else None
    median = float(np.median(np.abs(residual)))
    threshold = excp.residual_threshold(median, mean_square, spec)
    moment_threshold = spec.beta * sample.first_sum / group.words
    mask = np.abs(residual) > threshold
    size = (1 << spec.bits) - 1
    empty = np.zeros(0, np.float16)
    first_codes = second_codes = empty
    if sample.first:
        first = np.concatenate(sample.first)
        kept = mask & (np.abs(first) > moment_threshold)
        first_codes = excp.fit_codebook(first[kept], size)
        if sample.second:
            second_codes = excp.fit_codebook(np.concatenate(sample.second)[kept], size)
    weight_codes = excp.fit_codebook(residual[mask], size)
    centres = np.concatenate((weight_codes, first_codes, second_codes))
    if not np.isfinite(centres).all():
        return None
    return ExcpPlan(threshold, moment_threshold, weight_codes, first_codes, second_codes)


def code_excp(
    group: WeightGroup, plan: ExcpPlan
) -> Iterator[tuple[CodedSlice, CodedSlice | None, CodedSlice | None, SliceErrors]]:
    """Code a group: weight, exp_avg and exp_avg_sq of each slice, and the weight's errors."""

    def code(
        number: int,
    ) -> tuple[CodedSlice, CodedSlice | None, CodedSlice | None, SliceErrors]:
        source, base = group.weight.slice(number), group.base.slice(number)
        target = to_float32(source, group.dtype)
        residual = target - to_float32(base, group.dtype)
        # A codebook is empty only where the sample kept nothing; then nothing is kept at all.
        mask = (np.abs(residual) > plan.residual_threshold) & bool(plan.weight.size)
        payload, decoded = excp.encode_residual(source, base, mask, plan.weight, group.dtype)
        weight = CodedSlice(put_slice(RESIDUAL, payload), decoded, source)
        first = second = None
        if group.first is not None:
            words = group.first.slice(number)
            large = np.abs(to_float32(words, group.first_dtype)) > plan.moment_threshold
            kept = mask & large & bool(plan.first.size)
            first = _moment(words, kept, plan.first, group.first_dtype, own_mask=True)
            if group.second is not None:
                words = group.second.slice(number)
                second = _moment(words, kept, plan.second, group.second_dtype, own_mask=False)
        return weight, first, second, _errors(decoded, target, residual, group.dtype)

    return ordered_map(code, range(len(slice_counts(group.words))))


def _moment(
    words: Words, mask: Mask, centres: Centres, dtype: str, *, own_mask: bool
) -> CodedSlice:
    payload, decoded = excp.encode_moment(words, mask, centres, dtype, own_mask=own_mask)
    method = MOMENT if own_mask else SHARED_MASK_MOMENT
    return CodedSlice(put_slice(method, payload), decoded, words)


def _errors(decoded: Words, target: Floats, residual: Floats, dtype: str) -> SliceErrors:
    error = (to_float32(decoded, dtype) - target).astype(np.float64)
    return SliceErrors(
        float(error @ error),
        float(np.square(target, dtype=np.float64).sum()),
        float(np.square(residual, dtype=np.float64).sum()),
    )
