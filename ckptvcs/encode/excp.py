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
from ckptvcs.codec.words import NONE, Floats
from ckptvcs.encode.group import EncodedGroup, EncodedSlice, Group, Target
from ckptvcs.encode.measure import finite, measure
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

    def read(number: int) -> list[tuple[Floats, float]]:
        """Return samples of the residual and both moments of a slice, and sums of magnitudes."""
        residual = None if group.weight is None else group.weight.residual(number)
        moments = (None if t is None else t.floats(number) for t in (group.first, group.second))
        rows = [NONE if values is None else values for values in (residual, *moments)]
        return [
            (row[_picked(row.size, share)].copy(), float(np.abs(row).sum(dtype=np.float64)))
            for row in rows
        ]

    samples: tuple[list[Floats], ...] = [NONE], [NONE], [NONE]
    sums = [0.0, 0.0, 0.0]
    for rows in ordered_map(read, slices_of(group.words)):
        for index, (values, total) in enumerate(rows):
            samples[index].append(values)
            sums[index] += total
        if not np.isfinite(sums).all():
            return None
    if group.weight is not None and not sums[0]:
        return None
    residual, first, second = map(np.concatenate, samples)
    threshold = 0.0
    if residual.size:
        mean_square = None if group.second is None else sums[2] / group.words
        threshold = excp.residual_threshold(float(np.median(np.abs(residual))), mean_square, spec)
    moment_threshold = spec.beta * sums[1] / group.words
    moved, kept = np.abs(residual) > threshold, np.abs(first) > moment_threshold
    if residual.size and first.size:
        kept &= moved
    size = (1 << spec.bits) - 1
    sampled = (residual[moved], first[kept], second[kept])
    codebooks = [excp.fit_codebook(values, size) for values in sampled]
    if not np.isfinite(np.concatenate(codebooks)).all():
        return None
    return ExcpPlan(threshold, moment_threshold, *codebooks)


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
        rows = zip(self.members, slices, strict=True)
        errors = (finite(measure(group, target, number, part)) for target, part in rows)
        return EncodedGroup(tuple(slices), tuple(errors))


def _moment(
    moment: Target, number: int, mask: Mask, centres: Centres, *, own_mask: bool
) -> EncodedSlice:
    words = moment.tensor.slice(number)
    payload, decoded = excp.encode_moment(words, mask, centres, moment.dtype, own_mask=own_mask)
    method = EXCP_MOMENT if own_mask else EXCP_SHARED_MASK_MOMENT
    return EncodedSlice(put_slice(method, payload), decoded, words)
