"""Encode groups of tensors with the near codec, and slices exactly if that fails.

All residuals of a model share one quantization step, which minimizes the total error for a given
size (reverse water-filling). A cap relative to each tensor's movement protects tensors that move
little. A slice is encoded exactly if its near form has an NMSE above 1, or too large an error of
the next optimizer step. Layout: docs/format.md, "Near slices".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ckptvcs.codec.frame import (
    NEAR_FIRST,
    NEAR_LOW_RANK,
    NEAR_SCALED_FIRST,
    NEAR_SCALED_LOW_RANK,
    NEAR_SECOND,
    NEAR_WEIGHT,
    ROUNDED,
    put_slice,
    slice_size,
)
from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_lowrank import MAX_RANK, encode_low_rank
from ckptvcs.codec.near_moments import Factors, encode_first, encode_second
from ckptvcs.codec.near_weight import encode_delta, encode_keyframe, row_factors
from ckptvcs.codec.sections import sample
from ckptvcs.codec.words import NONE, Bytes, Floats, NearSlice, from_float32, to_float32
from ckptvcs.encode.exact import encode_exactly
from ckptvcs.encode.group import EncodedGroup, EncodedSlice, Errors, Group, Target
from ckptvcs.encode.measure import finite, measure, measure_matrix, measure_step, step_sample
from ckptvcs.encode.near_plan import NearPlan, Scale
from ckptvcs.encode.updates import is_known, takes_matrices

_MOMENT_ZONE = 0.66  # dead zone of first moments, in quantization steps
_FIRST_STEP = 1 / 256  # quantization step over the RMS of a weight that has no residual
_COARSEST_KEYFRAME = 1 / 8  # largest quantization step over the RMS of a weight
_KEYFRAME_STEP = 0.9  # of the quantization step of residuals: about the same error
_RUN = 64  # columns of a long vector
_FLAT = 1 << 14  # words of a long vector
_FEW_ROWS = 16  # rows of a slice that justify storing its columns
_PER_RANK = 4  # rows and columns required for each rank-1 component
_ENTRIES = ((0, 1.0), (0, 0.5), (0, 0.25), (0, 0.125), (0, 0.04))
_FORMS = ((1, 1.0), (2, 1.0), *_ENTRIES[1:])
"""Forms of a first moment, the coarsest first: (factor of the default rank, or 0 to quantize
entries; factor of the default quantization step)."""
_UNKNOWN = 0.3  # limit of the update NMSE for an unknown optimizer
_FEW = 256  # values to look at before all values are searched for both signs
_LEVELS = 3  # forms of second moments: row times column, one exponent per word, exact
_LEAST_ROW = 32  # columns that justify a quantization step for each row


def second_rows(target: Target, number: int, words: int) -> Rows:
    """Return the matrix shape for a slice of second moments of `words` words."""
    if target.columns * _FEW_ROWS <= words:
        return Rows(target.columns, target.start(number))
    if words >= _FLAT:
        return Rows(_RUN)
    if target.columns * 2 <= words:
        return Rows(target.columns, target.start(number))
    return Rows(words)


def _sign(values: Floats) -> int:
    """Return 1 if no value is negative, -1 if none is positive, else 0."""
    few = values[:_FEW]
    if few.size and few.min() < 0 < few.max():  # the common case
        return 0
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    return 1 if low >= 0 else -1 if high <= 0 else 0


def is_implausible(true: Floats, near: Floats, *, squared: bool) -> bool:
    """Return whether a near form has values that are impossible for its tensor.

    A second moment must not be negative, nor become zero. A tensor whose values all have one sign
    must keep that sign.
    """
    if squared:
        if not near.size or near.min() > 0:  # the common case
            return False
        return bool((near < 0).any() or ((near == 0) & (true != 0)).any())
    sign = _sign(true)
    return sign != 0 and is_beyond(near, sign)


def is_beyond(near: Floats, sign: int) -> bool:
    """Return whether any value has the opposite sign."""
    return bool(near.size) and bool(near.min() < 0 if sign > 0 else near.max() > 0)


Measured = tuple[EncodedSlice, Errors]
"""An encoded slice and its errors."""


def _factors(second: Measured | None) -> Factors | None:
    """Return the row and column factors of a slice of second moments, if it has them."""
    if second is None or second[0].data[0] != NEAR_SECOND:
        return None
    return Factors.of(second[0].data[1:], second[0].decoded.size)


class NearEncoder:
    """Encodes a weight with its moments, or moments alone."""

    def __init__(
        self, group: Group, plan: NearPlan, scale: Scale | None, *, keyframe: bool
    ) -> None:
        self._group, self._scale, self._keyframe = group, scale, keyframe
        self._plan, self.spec = plan, plan.spec
        named = (group.second, group.weight, *group.copies, group.first, *group.others)
        self.members = tuple(target for target in named if target is not None)
        self._limit = self.spec.max_update_nmse
        moments = (group.first, group.second, *group.others)
        self._moments = [target for target in moments if target is not None]
        roles = [target.role for target in self._moments]
        if roles and self._limit < math.inf and not is_known(group.rule, roles):
            self._limit = min(self._limit, _UNKNOWN)
        self.companions: dict[int, int] = {}
        if group.first is not None and group.second is not None:
            self.companions[self.members.index(group.first)] = 0
        if group.weight is not None:
            for copy in group.copies:
                self.companions[self.members.index(copy)] = self.members.index(group.weight)

    def encode(self, number: int) -> EncodedGroup:
        """Encode one slice of each member."""
        group = self._group
        encoded: dict[int, Measured] = {}
        if self._moments:
            self._encode_moments(number, encoded)
        if group.weight is not None:
            second = None if group.second is None else encoded[group.second.number]
            weight, own = self._weight(group.weight, number, second)
            if group.weight.iterate:  # its residual is about as large as a step
                own.update_error, own.update_energy = own.error, own.residual
            encoded[group.weight.number] = weight, own
            for target in group.copies:
                near = from_float32(to_float32(weight.decoded, "F32"), target.dtype)
                copy = EncodedSlice(put_slice(ROUNDED, b""), near, target.tensor.slice(number))
                errors = measure(group, target, number, copy)
                errors.residual = own.residual
                errors.fisher_error, errors.fisher_residual = own.fisher_error, own.fisher_residual
                encoded[target.number] = copy, finite(errors)
        return EncodedGroup(*zip(*(encoded[target.number] for target in self.members), strict=True))

    def _exact(self, target: Target, number: int) -> Measured:
        base = None
        if target.base is not None and not self._keyframe:
            base = target.base.slice(number)
        encoded = encode_exactly(target.tensor.slice(number), base, target.dtype)
        return encoded, finite(measure(self._group, target, number, encoded))

    def _near(
        self,
        target: Target,
        number: int,
        method: int,
        near_slice: NearSlice | None,
        *,
        uses_base: bool = False,
    ) -> Measured | None:
        """Return a near form with its errors, or None if it is unusable.

        A form is unusable if its NMSE is above 1 or not finite, or if its values are implausible.
        """
        if near_slice is None:
            return None
        data = put_slice(method, near_slice.payload)
        words = target.tensor.slice(number)
        encoded = EncodedSlice(data, near_slice.decoded, words, uses_base)
        sums = near_slice.sums
        errors = Errors.of(sums) if sums else measure(self._group, target, number, encoded)
        if not np.isfinite(errors.fisher_residual + errors.fisher_error):
            errors = replace(errors, fisher_error=0.0, fisher_residual=0.0)
        least = errors.residual if target is self._group.weight else errors.energy
        if not errors.error <= least < np.inf:
            return None
        true, near = (to_float32(w, target.dtype) for w in (words, near_slice.decoded))
        if is_implausible(true, near, squared=target.squared):
            return None
        # float64 values below the smallest float32 would decode to zero.
        lost = target.dtype == "F64" and (true == 0) & (words.view(np.float64) != 0)
        return None if np.any(lost) else (encoded, errors)

    # -- moments -------------------------------------------------------------------------------

    def _encode_moments(self, number: int, encoded: dict[int, Measured]) -> None:
        """Encode all moments in the coarsest forms whose update NMSE is within the limit."""
        step = Errors()
        for forms in self._forms(number):
            encoded |= forms
            step = self.step(number, encoded)
            if self.is_within_limit(step):
                break
        encoded[self._moments[0].number][1].add(step)

    def is_within_limit(self, step: Errors) -> bool:
        """Return whether the error of the next optimizer step is within the limit."""
        return step.update_error <= self._limit * step.update_energy

    def _forms(self, number: int) -> Iterator[dict[int, Measured]]:
        """Yield encodings of one slice of all moments, each finer than the one before.

        The outer loop refines second moments: row times column, one exponent per word, exact. The
        inner loop refines first moments: rank-1 components, quantized entries, exact.
        """
        group = self._group
        averages = [target for target in self._moments if not target.squared]
        squares = [target for target in self._moments if target.squared]
        forms = self._forms_of(averages, number)
        for level in range(_LEVELS if squares else 1):
            encoded = {target.number: self._second(target, number, level) for target in squares}
            second = None if group.second is None else encoded[group.second.number]
            for components, share in forms:
                for target in averages:
                    divided = second if target is group.first else None
                    low_rank = self._low_rank(target, number, divided, components)
                    entries = low_rank or self._entries(target, number, divided, share)
                    encoded[target.number] = entries
                yield encoded
            if averages:
                yield encoded | {target.number: self._exact(target, number) for target in averages}

    def _forms_of(self, averages: list[Target], number: int) -> tuple[tuple[int, float], ...]:
        """Return the forms to try for first moments, the coarsest first: see `_FORMS`."""
        if not averages:
            return _FORMS[:1]
        count, spec = slice_size(self._group.words, number), self.spec
        rank = spec.momentum_rank if self._group.second is None else spec.rank
        if any(self.low_rank_rows(target, number, count, rank) for target in averages):
            return _FORMS
        # A first moment over the root of a second one needs at most half the default step.
        halves = self._group.second is not None and spec.max_update_nmse < 1
        return _ENTRIES[halves:]

    def step(self, number: int, encoded: dict[int, Measured]) -> Errors:
        """Measure the error of the next optimizer step, given one encoded slice of each moment."""
        rule, size, targets = self._group.rule, step_sample(self._group.words), self._moments
        near = {t.role: to_float32(encoded[t.number][0].decoded, t.dtype) for t in targets}
        count = slice_size(self._group.words, number)
        worst = measure_step(
            rule,
            {t.role: t.sampled(number, size) for t in targets},
            {role: sample(values, size) for role, values in near.items()},
            count,
        )
        if takes_matrices(rule, near):
            (target,) = targets
            words = self._group.words
            return measure_matrix(rule, target, number, words, near[target.role], worst)
        return worst

    def _second(self, target: Target, number: int, level: int) -> Measured:
        """Encode a slice of a second moment, starting with form number `level`."""
        words = target.tensor.slice(number)
        forms = (second_rows(target, number, words.size), Rows(words.size))
        for rows in forms[level:]:
            near_slice = encode_second(words, target.dtype, rows)
            result = self._near(target, number, NEAR_SECOND, near_slice)
            if result is not None:
                return result
        return self._exact(target, number)

    def _entries(
        self, target: Target, number: int, second: Measured | None, share: float
    ) -> Measured:
        """Quantize the entries of a slice, with `share` of the default quantization step."""
        words, spec = target.tensor.slice(number), self.spec
        step, method, squares = spec.momentum_step, NEAR_FIRST, None
        if second is not None:
            step, method, squares = spec.moment_step, NEAR_SCALED_FIRST, second[0].decoded
        near_slice = encode_first(words, squares, target.dtype, share * step, _MOMENT_ZONE)
        return self._near(target, number, method, near_slice) or self._exact(target, number)

    def _low_rank(
        self, target: Target, number: int, second: Measured | None, times: int
    ) -> Measured | None:
        """Encode a slice by `times` the default number of rank-1 components.

        Return None if the slice is too narrow. Without a second moment, also return None if the
        NMSE exceeds `momentum_nmse`.
        """
        words, spec = target.tensor.slice(number), self.spec
        rank = min(MAX_RANK, times * (spec.momentum_rank if second is None else spec.rank))
        rows = self.low_rank_rows(target, number, words.size, rank)
        if rows is None:
            return None
        squares, factors = None if second is None else second[0].decoded, _factors(second)
        roots = factors.roots() if factors is not None and factors.rows == rows else None
        near_slice = encode_low_rank(
            words, squares, target.dtype, rows, rank, spec.rank_step, roots
        )
        if second is not None:
            return self._near(target, number, NEAR_SCALED_LOW_RANK, near_slice)
        result = self._near(target, number, NEAR_LOW_RANK, near_slice)
        enough = result is not None and result[1].error <= spec.momentum_nmse * result[1].energy
        return result if enough else None

    @staticmethod
    def low_rank_rows(target: Target, number: int, count: int, rank: int) -> Rows | None:
        """Return the matrix shape of a slice, or None if it is too small for this rank."""
        rows = Rows(target.columns, target.start(number))
        wide = rank * _PER_RANK <= min(rows.columns, rows.count(count))
        return rows if rank and wide else None

    # -- weights -------------------------------------------------------------------------------

    def _weight(self, target: Target, number: int, second: Measured | None) -> Measured:
        words, base = target.tensor.slice(number), target.base
        near_slice = None
        if target.weak and _sign(to_float32(words, target.dtype)):
            return self._exact(target, number)  # weights have both signs; these may be counts
        if base is None or self._keyframe:
            step = self._keyframe_step(target)
            if step is not None:
                near_slice = encode_keyframe(words, target.dtype, step)
        else:
            near_slice = encode_delta(
                words,
                base.slice(number),
                target.dtype,
                self.delta_step(),
                self.spec.zone,
                self.row_factors(_factors(second)),
                NONE if self._group.second is None else self._group.second.floats(number),
            )
        uses_base = base is not None and not self._keyframe
        result = self._near(target, number, NEAR_WEIGHT, near_slice, uses_base=uses_base)
        return result or self._exact(target, number)

    def delta_step(self) -> float:
        """Return the quantization step of residuals, before row factors; 0 if there are none."""
        spec = self.spec
        own = (self._scale.movement if self._scale is not None else None) or 0.0
        return min(spec.step * self._plan.movement, spec.cap * own) if own else 0.0

    @property
    def is_untrained(self) -> bool:
        """Return whether the weight has no moments, and no base from which it moved."""
        moved = self._scale is not None and self._scale.residual
        return not moved and not self._moments

    def _keyframe_step(self, target: Target) -> float | None:
        """Return the quantization step of a keyframe, or None to encode it exactly.

        16-bit weights would not become smaller. Untrained weights stay exact.
        """
        scale = self._scale
        if target.dtype != "F32" or scale is None or not scale.weight:
            return None
        if scale.residual:
            step = _KEYFRAME_STEP * self.delta_step()
            return min(step, _COARSEST_KEYFRAME * scale.weight)
        first = min(_FIRST_STEP, 3 * (self.spec.max_weight_error or 1))
        return None if self.is_untrained else first * scale.weight

    def row_factors(self, factors: Factors | None) -> tuple[Rows, Bytes] | None:
        """Return a factor of the quantization step for each row, from its second moments."""
        gamma = self.spec.gamma
        if not gamma or factors is None or factors.rows.columns < _LEAST_ROW:
            return None
        return factors.rows, row_factors(factors.logs(), self._plan.second, gamma)
