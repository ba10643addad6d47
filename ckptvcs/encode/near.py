"""Assignment by the near codec: which steps, and exactly where it cannot do well.

One step for the residuals of the whole model spends bits where they do most (reverse
water-filling); a cap in each tensor's own scale keeps quiet tensors from starving.  A slice whose
near form would be worse than nothing (an NMSE above 1), or would make larger optimizer steps than
the error of dropping it, is coded exactly.
"""

from __future__ import annotations

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
    slice_counts,
)
from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_lowrank import encode_low_rank
from ckptvcs.codec.near_moments import Factors, encode_first, encode_second
from ckptvcs.codec.near_weight import encode_delta, encode_keyframe, row_factors
from ckptvcs.codec.sections import sample
from ckptvcs.codec.words import NONE, Bytes, Floats, NearSlice, Words, from_float32, to_float32
from ckptvcs.encode.exact import encode_exactly
from ckptvcs.encode.group import EncodedGroup, EncodedSlice, Errors, Group, Target
from ckptvcs.encode.measure import (
    finite,
    measure_matrix,
    measure_moment,
    measure_step,
    measure_weight,
    step_sample,
)
from ckptvcs.encode.near_plan import NearPlan, Scale
from ckptvcs.encode.updates import is_known, takes_matrices

_MOMENT_ZONE = 0.66
_FIRST_STEP = 1 / 256  # of a weight's own scale, where there is no residual to measure by
_COARSEST_KEYFRAME = 1 / 8
_KEYFRAME_STEP = 0.9  # of the step of residuals: about the same error
_RUN = 64  # neighbours that share an exponent where the shape tells nothing
_FLAT = 1 << 14  # words from which on a vector is cut into such runs
_FEW_ROWS = 16  # in a slice: columns would cost more than they tell
_PER_RANK = 4  # rows and columns that a direction is worth
_ENTRIES = ((0, 1.0), (0, 0.5), (0, 0.25), (0, 0.125), (0, 0.04))
_FORMS = ((1, 1.0), (2, 1.0), *_ENTRIES[1:])
"""Averages, in forms that get finer: times the usual directions, or in a share of usual steps."""
_UNKNOWN = 0.3  # error of a step, where nobody knows what the optimizer makes of it
_FEW = 256  # values that show both signs, if there are both
_LEVELS = 3  # of squares: row times column, word by word, exactly
_LEAST_ROW = 32  # words that a factor of their own is worth


def second_rows(target: Target, number: int, words: int) -> Rows:
    """How a slice of second moments is cut into rows and columns."""
    if target.columns * _FEW_ROWS <= words:
        return Rows(target.columns, target.start(number))
    if words >= _FLAT:
        return Rows(_RUN)
    if target.columns * 2 <= words:
        return Rows(target.columns, target.start(number))
    return Rows(words)


def _sign(values: Floats) -> int:
    """1 where no value is below zero, -1 where none is above, else 0."""
    few = values[:_FEW]
    if few.size and few.min() < 0 < few.max():
        return 0  # as nearly always
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    return 1 if low >= 0 else -1 if high <= 0 else 0


def is_implausible(true: Floats, near: Floats, *, squared: bool) -> bool:
    """Whether a near form is what nobody can mean, whatever the tensor is for: of the other sign
    where the original has only one, or zero where a second moment is not.

    It cannot leave the range of the original by more than its error, which is the largest one.
    """
    if squared:
        if not near.size or near.min() > 0:  # as nearly always
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
    """The rows and columns of a slice of second moments that is coded by these."""
    if second is None or second[0].data[0] != NEAR_SECOND:
        return None
    return Factors.of(second[0].data[1:], second[0].decoded.size)


class NearEncoder:
    """Codes a weight with its moments, or moments alone."""

    def __init__(
        self, group: Group, plan: NearPlan, scale: Scale | None, *, keyframe: bool
    ) -> None:
        self._group, self._scale, self._keyframe = group, scale, keyframe
        self._plan, self.spec = plan, plan.spec
        named = (group.second, group.weight, *group.copies, group.first, *group.others)
        self.members = tuple(target for target in named if target is not None)
        self._limit = self.spec.max_update_nmse
        roles = [target.role for target in self._moments_of()]
        if roles and not is_known(group.rule, roles):
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
        coded: dict[int, Measured] = {}
        if self._moments_of():
            self._moments(number, coded)
        if group.weight is not None:
            second = None if group.second is None else coded[group.second.number]
            weight, own = self._weight(group.weight, number, second)
            if group.weight.iterate:  # steps are about as large as its movement
                own.update_error, own.update_energy = own.error, own.residual
            coded[group.weight.number] = weight, own
            for target in group.copies:
                master = to_float32(coded[group.weight.number][0].decoded, "F32")
                near = from_float32(master, target.dtype)
                copy = EncodedSlice(put_slice(ROUNDED, b""), near, target.tensor.slice(number))
                of_master = coded[group.weight.number][1]
                coded[target.number] = (
                    copy,
                    finite(
                        replace(
                            measure_moment(target, copy),
                            residual=of_master.residual,
                            fisher_error=of_master.fisher_error,
                            fisher_residual=of_master.fisher_residual,
                        )
                    ),
                )
        slices, errors = zip(*(coded[target.number] for target in self.members), strict=True)
        return EncodedGroup(slices, errors)

    def _exact(self, target: Target, number: int) -> Measured:
        base = None
        if target is self._group.weight and self._group.base is not None and not self._keyframe:
            base = self._group.base.slice(number)
        coded = encode_exactly(target.tensor.slice(number), base, target.dtype)
        return coded, finite(self._errors(target, number, coded))

    def _errors(self, target: Target, number: int, coded: EncodedSlice) -> Errors:
        if target is self._group.weight:
            return measure_weight(self._group, number, coded)
        return measure_moment(target, coded)

    def _near(
        self,
        target: Target,
        number: int,
        method: int,
        encoded: NearSlice | None,
        *,
        uses_base: bool = False,
    ) -> Measured | None:
        """A near form with its errors; None where there is none, or it is worse than nothing, or
        so large that it cannot be told, or is_implausible.
        """
        if encoded is None:
            return None
        data = put_slice(method, encoded.payload)
        words = target.tensor.slice(number)
        coded = EncodedSlice(data, encoded.decoded, words, uses_base)
        errors = (
            self._errors(target, number, coded) if encoded.sums is None else Errors.of(encoded.sums)
        )
        if not np.isfinite(errors.fisher_residual + errors.fisher_error):  # a moment is not finite
            errors = replace(errors, fisher_error=0.0, fisher_residual=0.0)
        least = errors.residual if target is self._group.weight else errors.energy
        if not errors.error <= least < np.inf:
            return None
        true, near = (to_float32(w, target.dtype) for w in (words, encoded.decoded))
        if is_implausible(true, near, squared=target.squared):
            return None
        # Numbers that no float32 has would come back as zero.
        lost = target.dtype == "F64" and (true == 0) & (words.view(np.float64) != 0)
        return None if np.any(lost) else (coded, errors)

    # -- moments -------------------------------------------------------------------------------

    def _moments(self, number: int, coded: dict[int, Measured]) -> None:
        """Code all moments: in the coarsest forms with which the next step is as good as it must
        be.
        """
        step = Errors()
        for forms in self._forms(number):
            coded |= forms
            step = self.step(number, coded)
            if self.good(step):
                break
        coded[self._moments_of()[0].number][1].add(step)

    def _moments_of(self) -> list[Target]:
        group = self._group
        return [target for target in (group.first, group.second, *group.others) if target]

    def good(self, step: Errors) -> bool:
        """Whether the next step is within its bound."""
        return step.update_error <= self._limit * step.update_energy

    def _forms(self, number: int) -> Iterator[dict[int, Measured]]:
        """Forms of a slice of all moments that get finer: of squares row times column, word by
        word, exactly; of averages, with each of these, by directions, by entries, exactly.
        """
        group = self._group
        averages = [target for target in self._moments_of() if not target.squared]
        squares = [target for target in self._moments_of() if target.squared]
        forms = self._forms_of(averages, number)
        for level in range(_LEVELS if squares else 1):
            coded = {target.number: self._second(target, number, level) for target in squares}
            second = None if group.second is None else coded[group.second.number]
            for directions, share in forms:
                for target in averages:
                    divided = second if target is group.first else None
                    coded[target.number] = (
                        self._first(target, number, divided, directions)
                        if directions
                        else self._entries(target, number, divided, share)
                    )
                yield coded
            if averages:
                yield coded | {target.number: self._exact(target, number) for target in averages}

    def _forms_of(self, averages: list[Target], number: int) -> tuple[tuple[int, float], ...]:
        """How averages may be coded, the coarsest first: see `_FORMS`."""
        if not averages:
            return _FORMS[:1]
        count, spec = slice_counts(self._group.words)[number], self.spec
        rank = spec.momentum_rank if self._group.second is None else spec.rank
        if any(self.low_rank_rows(target, number, count, rank) for target in averages):
            return _FORMS
        # Entries that something divides take half the usual steps at least to be of any use.
        halves = self._group.second is not None and spec.max_update_nmse < 1
        return _ENTRIES[halves:]

    def step(self, number: int, coded: dict[int, Measured]) -> Errors:
        """The error of the next step with a slice of each moment as it is coded, by number."""
        rule, size = self._group.rule, step_sample(self._group.words)
        targets = self._moments_of()
        near = {t.role: to_float32(coded[t.number][0].decoded, t.dtype) for t in targets}
        count = slice_counts(self._group.words)[number]
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
        """A slice of squares: row times column, word by word, or exactly."""
        words = target.tensor.slice(number)
        forms = (second_rows(target, number, words.size), Rows(words.size))
        for rows in forms[level:]:
            encoded = encode_second(words, target.dtype, rows)
            found = self._near(target, number, NEAR_SECOND, encoded)
            if found is not None:
                return found
        return self._exact(target, number)

    def _first(
        self, target: Target, number: int, second: Measured | None, times: int = 1
    ) -> Measured:
        found = self._low_rank(target, number, target.tensor.slice(number), second, times)
        return found or self._entries(target, number, second)

    def _entries(
        self, target: Target, number: int, second: Measured | None, share: float = 1
    ) -> Measured:
        """A slice entry by entry, in a `share` of the usual steps."""
        words, spec = target.tensor.slice(number), self.spec
        step, method, squares = spec.momentum_step, NEAR_FIRST, None
        if second is not None:
            step, method, squares = spec.moment_step, NEAR_SCALED_FIRST, second[0].decoded
        encoded = encode_first(words, squares, target.dtype, share * step, _MOMENT_ZONE)
        return self._near(target, number, method, encoded) or self._exact(target, number)

    def _low_rank(
        self, target: Target, number: int, words: Words, second: Measured | None, times: int
    ) -> Measured | None:
        """A slice by so many `times` the usual number of its strongest directions; None where it is
        too narrow to have any, or, where nothing divides it, these do not say enough.
        """
        spec = self.spec
        rank = min(64, times * (spec.momentum_rank if second is None else spec.rank))
        rows = self.low_rank_rows(target, number, words.size, rank)
        if rows is None:
            return None
        if second is None:
            encoded = encode_low_rank(words, None, target.dtype, rows, rank, spec.rank_step)
            found = self._near(target, number, NEAR_LOW_RANK, encoded)
            enough = found is not None and found[1].error <= spec.momentum_nmse * found[1].energy
            return found if enough else None
        factors = _factors(second)
        encoded = encode_low_rank(
            words,
            second[0].decoded,
            target.dtype,
            rows,
            rank,
            spec.rank_step,
            factors.roots() if factors is not None and factors.rows == rows else None,
        )
        return self._near(target, number, NEAR_SCALED_LOW_RANK, encoded)

    @staticmethod
    def low_rank_rows(target: Target, number: int, count: int, rank: int) -> Rows | None:
        """How a slice of a first moment is cut into rows; None where it is too narrow to have so
        many directions.
        """
        rows = Rows(target.columns, target.start(number))
        wide = rank * _PER_RANK <= min(rows.columns, rows.count(count))
        return rows if rank and wide else None

    # -- weights -------------------------------------------------------------------------------

    def _weight(self, target: Target, number: int, second: Measured | None) -> Measured:
        words, base = target.tensor.slice(number), self._group.base
        encoded = None
        if target.weak and _sign(to_float32(words, target.dtype)):
            return self._exact(target, number)  # weights have both signs: these may be counts
        if base is None or self._keyframe:
            step = self._keyframe_step(target)
            if step is not None:
                encoded = encode_keyframe(words, target.dtype, step)
        else:
            encoded = encode_delta(
                words,
                base.slice(number),
                target.dtype,
                self.delta_step(),
                self.spec.zone,
                self.row_factors(_factors(second)),
                NONE if self._group.second is None else self._group.second.floats(number),
            )
        stands = base is not None and not self._keyframe
        found = self._near(target, number, NEAR_WEIGHT, encoded, uses_base=stands)
        return found or self._exact(target, number)

    def delta_step(self) -> float:
        """The step of the residuals of a row whose factor is 1; 0 where nothing moved."""
        spec = self.spec
        own = (self._scale.residual if self._scale is not None else None) or 0.0
        return min(spec.step * self._plan.residual, spec.cap * own) if own else 0.0

    @property
    def is_untrained(self) -> bool:
        """Whether nothing says that the weight is in training: it has neither moments nor a base,
        or has not moved.
        """
        moved = self._scale is not None and self._scale.residual
        return not moved and not self._moments_of()

    def _keyframe_step(self, target: Target) -> float | None:
        """None where it has to be exact: 16-bit weights, whose near form would not be smaller, and
        what nothing says is trained.
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
        """Factors of steps by the second moments of rows; None where these say nothing of rows."""
        gamma = self.spec.gamma
        if not gamma or factors is None or factors.rows.columns < _LEAST_ROW:
            return None
        return factors.rows, row_factors(factors.logs(), self._plan.second, gamma)
