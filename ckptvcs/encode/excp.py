"""Encode a weight with its moments by ExCP (Li et al., ICML 2024), in two passes.

The first pass fits thresholds and codebooks, the second encodes. Both read slice by slice, so
memory does not depend on the size of a tensor. Layout: docs/format.md, "ExCP slices".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckptvcs.codec import excp
from ckptvcs.codec.excp import Centres
from ckptvcs.codec.frame import (
    EXCP_MOMENT,
    EXCP_RESIDUAL,
    EXCP_SHARED_MASK_MOMENT,
    put_slice,
    slices_of,
)
from ckptvcs.codec.masks import Mask
from ckptvcs.codec.spec import ExcpSpec
from ckptvcs.codec.words import Floats
from ckptvcs.encode.group import EncodedGroup, EncodedSlice, Group, Target
from ckptvcs.encode.measure import measure
from ckptvcs.parallel import ordered_map

_SAMPLE = 1 << 20  # sampled entries of a tensor
_RUN = 1 << 12  # entries of each evenly spaced run of a sample


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
    """Sampled entries of residual, exp_avg and exp_avg_sq, and sums over all entries."""

    residual: list[Floats]
    first: list[Floats]
    second: list[Floats]
    moved: bool = False
    first_sum: float = 0.0
    second_sum: float = 0.0


def _picked(count: int, share: float) -> slice | Mask:
    """Return which entries of a slice of `count` words are in the sample."""
    if share >= 1:
        return slice(None)
    runs = np.arange(count) // _RUN
    picked: Mask = np.floor((runs + 1) * share) > np.floor(runs * share)
    return picked


def plan(group: Group, spec: ExcpSpec) -> ExcpPlan | None:
    """Fit the thresholds and codebooks of a group, or return None if ExCP does not apply.

    ExCP needs finite values within the range of its float16 centres. It would set the moments of a
    weight that did not move to zero.
    """
    share = _SAMPLE / group.words
    sample = _Sample([], [], [], moved=group.weight is None)

    def measure(number: int) -> tuple[Floats | None, Floats | None, Floats | None]:
        first = None if group.first is None else group.first.floats(number)
        second = None if group.second is None else group.second.floats(number)
        residual = None if group.weight is None else group.weight.residual(number)
        return residual, first, second

    for residual, first, second in ordered_map(measure, slices_of(group.words)):
        for values, kept in (
            (residual, sample.residual),
            (first, sample.first),
            (second, sample.second),
        ):
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


class ExcpEncoder:
    """Encodes a group: the weight, then exp_avg, then exp_avg_sq."""

    def __init__(self, group: Group, fitted: ExcpPlan) -> None:
        self._group, self._plan = group, fitted
        self.members = tuple(
            target for target in (group.weight, group.first, group.second) if target is not None
        )
        last = len(self.members) - 1
        self.companions = {last: last - 1} if group.second is not None else {}

    def encode(self, number: int) -> EncodedGroup:
        """Encode one slice of each member."""
        group, fitted = self._group, self._plan
        slices = []
        mask: Mask | bool = True
        weight = group.weight
        residual = None if weight is None else weight.residual(number)
        if weight is not None and weight.base is not None and residual is not None:
            source, base = weight.tensor.slice(number), weight.base.slice(number)
            # The codebook is empty if the sample has no large residual: keep none at all.
            mask = (np.abs(residual) > fitted.residual_threshold) & bool(fitted.weight.size)
            payload, decoded = excp.encode_residual(source, base, mask, fitted.weight, weight.dtype)
            data = put_slice(EXCP_RESIDUAL, payload)
            slices.append(EncodedSlice(data, decoded, source, uses_base=True))
        if group.first is not None:
            large = np.abs(group.first.floats(number)) > fitted.moment_threshold
            kept = mask & large & bool(fitted.first.size)
            slices.append(_moment(group.first, number, kept, fitted.first, own_mask=True))
            if group.second is not None:
                slices.append(_moment(group.second, number, kept, fitted.second, own_mask=False))
        return EncodedGroup(tuple(slices), measure(group, number, self.members, slices))


def _moment(
    moment: Target, number: int, mask: Mask, centres: Centres, *, own_mask: bool
) -> EncodedSlice:
    words = moment.tensor.slice(number)
    payload, decoded = excp.encode_moment(words, mask, centres, moment.dtype, own_mask=own_mask)
    method = EXCP_MOMENT if own_mask else EXCP_SHARED_MASK_MOMENT
    return EncodedSlice(put_slice(method, payload), decoded, words)
