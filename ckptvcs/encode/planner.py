"""Group related tensors and choose an encoder for each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ckptvcs.checkpoint.notes import NOTED
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.optimizer_state import FIRST, ITERATES, MOMENTS, SECOND, Rule
from ckptvcs.checkpoint.roles import BESIDE, LOSSY, OPTIMIZER, STATE_DICT, WEIGHT
from ckptvcs.codec.dtypes import WEIGHT_DTYPES, can_be_lossy, float_type
from ckptvcs.codec.frame import slices_of
from ckptvcs.codec.spec import CodecSpec, ExcpSpec, NearSpec, finer
from ckptvcs.codec.words import double_squares
from ckptvcs.encode import excp
from ckptvcs.encode.bases import Bases, BaseTensor
from ckptvcs.encode.exact import ExactEncoder
from ckptvcs.encode.gpu import DeviceEncoder
from ckptvcs.encode.group import Errors, Floats, Group, GroupEncoder, Target
from ckptvcs.encode.near import NearEncoder
from ckptvcs.encode.near_plan import (
    NearPlan,
    Scale,
    measure_scale,
    movement_share,
    share_of_movement,
)
from ckptvcs.encode.source import SourceTensor, find_masters
from ckptvcs.history.commit import ErrorReport
from ckptvcs.parallel import ordered_map
from ckptvcs.text import size

_RELATED = 0.5  # largest residual energy over weight energy of weights related to their base
_SAMPLE = 1 << 12  # sampled entries of a slice
_LARGEST = 1e3  # m^2 / v: at most 53 for betas of 0.9 and 0.999, 526 for 0.9 and 0.9999
_SHARE = 0.99  # of entries within that bound


class Planner:
    """Chooses encoders for the tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, attempt: Attempt, bases: Bases) -> None:
        self._checkpoint, self._bases = checkpoint, bases
        self._settings = attempt.spec.settings
        self._keyframe, self._alone = attempt.keyframe, attempt.alone
        self._infos = checkpoint.schema.tensors
        self._masters = find_masters(checkpoint) if isinstance(self._settings, NearSpec) else {}
        self._untrained: list[int] = []
        self._weight_bytes = 0
        self._shares: dict[int, float] = {}  # of the movement in the energy of the residual

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes for the user about the chosen encodings."""
        notes = []
        if self._alone and self._weight_bytes >= NOTED:
            notes.append(
                "these weights have nothing to do with those of the parent: stored as a "
                "first checkpoint"
            )
        if sum(self._untrained) >= NOTED:
            count = len(self._untrained)
            weights = "1 weight" if count == 1 else f"{count} weights"
            notes.append(
                f"{weights}, {size(sum(self._untrained))}, stored exactly: no optimizer state, "
                "and no parent close by, shows that they are in training"
            )
        return tuple(notes)

    def groups(self) -> list[list[int]]:
        """Return the stored tensors in groups, in the order of their first tensor in the files.

        A weight forms a group with its moments, as do moments of an unknown weight. Any other
        tensor is a group of its own.
        """
        groups: dict[object, list[int]] = {}
        for number, info in enumerate(self._infos):
            if info.inline:
                continue
            key: object = self._masters.get(number, number)
            if info.role in MOMENTS:
                weight = info.pair
                alone = weight is None or self._infos[weight].inline
                key = ("moments", self._checkpoint.parameters.get(number, number))
                if weight is not None and not alone:
                    key = self._masters.get(weight, weight)
            # A complex tensor has twice as many words as a real one of its shape.
            groups.setdefault((key, info.words), []).append(number)
        return list(groups.values())

    def _target(self, number: int, base: BaseTensor | None = None) -> Target:
        info = self._infos[number]
        source = SourceTensor(self._checkpoint, number)
        weak = info.evidence == STATE_DICT
        dtype, shape = float_type(info.dtype), info.shape
        if dtype != info.dtype:  # a complex element has two words
            shape = (*shape[:-1], 2 * shape[-1]) if shape else (2,)
        iterate = info.evidence == OPTIMIZER and info.name.rpartition(".")[2] in ITERATES
        return Target(number, source, dtype, shape, info.role, weak, iterate, base)

    def encoders(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[GroupEncoder]:
        """Yield encoders for groups of tensors, given (all tensors, tensors to store) of each.

        Raises:
            TooFar: the weights are not related to their base.
        """
        settings = self._settings
        if isinstance(settings, NearSpec):
            stored = [n for group, left in rows for n in {*group} - {*left}]
            unchanged = sum(self._infos[n].words for n in stored if self._infos[n].role == WEIGHT)
            yield from self._near_encoders([left for _, left in rows if left], settings, unchanged)
        elif isinstance(settings, ExcpSpec) and not self._keyframe:
            for group, left in rows:
                yield from self._excp_encoders(left, group, settings)
        else:
            yield from (self._exact_encoder(number) for _, left in rows for number in left)

    def measure_movement(self, target: Target) -> None:
        """Measure how far a weight moved, before its base in memory is replaced."""
        if target.number not in self._shares:  # those of near weights are measured with the scale
            share = share_of_movement(target)
            if share is not None:
                self._shares[target.number] = share

    def movement(self, target: Target, errors: Errors) -> float:
        """Return the energy of the movement since the parent, of the part that has these errors."""
        assert target.base is not None
        share = self._shares.get(target.number)
        if share is None:
            share = movement_share(errors.residual, target.base.error**2 * errors.energy)
        return share * errors.residual

    def _excp_encoders(
        self, left: list[int], group: list[int], spec: ExcpSpec
    ) -> Iterator[GroupEncoder]:
        """Encode the members of an ExCP group together, and all other tensors exactly."""
        encoder = self._excp_encoder(left, group, spec) if left else None
        members = []
        if encoder is not None:
            members = [target.number for target in encoder.members]
            yield encoder
        yield from (self._exact_encoder(number) for number in left if number not in members)

    def _exact_encoder(self, number: int) -> GroupEncoder:
        return ExactEncoder(self._target(number, None if self._keyframe else self._base(number)))

    def _base(self, number: int) -> BaseTensor | None:
        """Return the verified base of a tensor, if it has one."""
        base = self._bases.tensor(number)
        if base is not None:
            base.verify()
        return base

    def _near_encoders(
        self, rows: list[list[int]], spec: NearSpec, unchanged: int
    ) -> Iterator[GroupEncoder]:
        """Yield encoders for groups of tensors, next to `unchanged` words of unchanged weights."""
        groups: list[Group] = []
        for left in rows:
            lossy = self._lossy(left)
            yield from (self._exact_encoder(number) for number in left if number not in lossy)
            groups += self._near_groups(lossy)
        weights = [group for group in groups if group.weight is not None]
        scales = dict(zip(map(id, weights), ordered_map(_scale, weights, _words), strict=True))
        if not self._alone and _is_far(scales.values(), unchanged):
            raise TooFar
        for group in weights:
            assert group.weight is not None
            self._shares[group.weight.number] = scales[id(group)].share
        plan = NearPlan.of(spec, scales.values())
        for group in groups:
            yield self._near_encoder(group, plan, scales.get(id(group)))

    def _lossy(self, numbers: list[int]) -> list[int]:
        """Return the tensors that may be encoded with loss."""
        infos = self._infos
        lossy = [n for n in numbers if infos[n].role in LOSSY and can_be_lossy(infos[n].dtype)]
        return lossy if self._plausible(lossy) else []

    def _near_groups(self, lossy: list[int]) -> Iterator[Group]:
        """Split tensors into groups with one tensor of each role.

        Roles can repeat, because a model can have two optimizers.
        """
        while lossy:
            first: dict[str, int] = {}
            for number in lossy:
                if self._masters.get(number) not in lossy:
                    first.setdefault(self._infos[number].role, number)
            chosen = set(first.values())
            taken = [n for n in lossy if {n, self._masters.get(n)} & chosen]
            yield self._near_group(taken)
            lossy = [number for number in lossy if number not in taken]

    def _near_encoder(self, group: Group, plan: NearPlan, scale: Scale | None) -> GroupEncoder:
        host = NearEncoder(group, plan, scale, keyframe=self._keyframe)
        if group.weight is not None:
            size = self._infos[group.weight.number].size_bytes
            self._weight_bytes += size
            if host.is_untrained:
                self._untrained.append(size)
        device = None if self._keyframe else DeviceEncoder.of(host, group)
        return device or host

    def _plausible(self, group: list[int]) -> bool:
        """Return whether tensors that only their neighbours indicate as moments can be moments.

        Second moments are not negative, and bound first moments (Cauchy-Schwarz).
        """
        beside = [n for n in group if self._infos[n].evidence == BESIDE]
        seconds = [n for n in beside if self._infos[n].role in SECOND]
        for number in seconds:
            info = self._infos[number]
            first = next(
                (
                    n
                    for n in beside
                    if info.role in FIRST.get(self._infos[n].role, ())
                    and (self._infos[n].dtype, self._infos[n].words) == (info.dtype, info.words)
                ),
                None,
            )
            for index in slices_of(info.words):
                square = self._target(number).sampled(index, _SAMPLE)
                if not (square >= 0).all():
                    return False
                average = None if first is None else self._target(first).sampled(index, _SAMPLE)
                if average is not None and not _is_bounded(average, square):
                    return False
        return True

    def _near_group(self, lossy: list[int]) -> Group:
        copies = tuple(self._target(n) for n in lossy if self._masters.get(n) in lossy)
        own = [number for number in lossy if self._masters.get(number) not in lossy]
        targets = {self._infos[number].role: self._target(number) for number in own}
        weight = targets.pop(WEIGHT, None)
        if weight is not None and not self._alone:
            weight = replace(weight, base=self._bases.tensor(weight.number))
        first, second = _first_and_second(targets)
        others = tuple(t for t in targets.values() if t is not first and t is not second)
        moments = [number for number in lossy if self._infos[number].role != WEIGHT]
        rules = self._checkpoint.rules
        rule = next((rules[number] for number in moments if number in rules), Rule())
        words = self._infos[lossy[0]].words
        return Group(words, weight, first, second, others, copies, rule)

    def _excp_encoder(
        self, left: list[int], group: list[int], spec: ExcpSpec
    ) -> GroupEncoder | None:
        """Return the ExCP encoder of a weight and its moments, or None to encode all exactly."""
        if not {self._infos[number].dtype for number in left} <= WEIGHT_DTYPES:
            return None
        roles = {self._infos[number].role: number for number in left}
        weight = roles.get(WEIGHT)
        base = None if weight is None else self._base(weight)
        paired = any(self._infos[number].role == WEIGHT for number in group)
        if paired and base is None:
            return None  # the weight is new or did not change: its moments have no mask
        # ExCP applies only to optimizers with both moments.
        pair = roles.get("exp_avg"), roles.get("exp_avg_sq")
        pair = pair if None not in pair else (None, None)
        first, second = (None if n is None else self._target(n) for n in pair)
        target = None if weight is None else self._target(weight, base)
        if target is None and first is None:
            return None
        tensors = Group(self._infos[left[0]].words, target, first, second)
        fitted = excp.plan(tensors, spec)
        return None if fitted is None else excp.ExcpEncoder(tensors, fitted)


def _first_and_second(targets: dict[str, Target]) -> tuple[Target | None, Target | None]:
    """Return a first moment and the second moment that divides it, or only one of them."""
    firsts = [target for role, target in targets.items() if role in FIRST]
    seconds = [target for role, target in targets.items() if role in SECOND]
    for first in firsts:
        for second in seconds:
            if second.role in FIRST[first.role] and first.dtype == second.dtype:
                return first, second
    if seconds:
        return None, seconds[0]
    return (firsts[0] if firsts else None), None


def _is_far(scales: Iterable[Scale], unchanged: int) -> bool:
    """Return whether most weights are about as far from their base as from zero.

    `unchanged` words of weights are unchanged. A few weights may have been initialised again.
    """
    rows = [row for row in scales if row.residual is not None and row.weight]
    far = sum(row.words for row in rows if (row.residual or 0) ** 2 > _RELATED * row.weight**2)
    return 2 * far > sum(row.words for row in rows) + unchanged


def _is_bounded(average: Floats, square: Floats) -> bool:
    """Return whether nearly all averages are possible for these mean squares of gradients."""
    with np.errstate(over="ignore"):
        inside = double_squares(average) <= _LARGEST * square.astype(np.float64)
    return bool(inside.mean() >= _SHARE) if inside.size else True


def _words(group: Group) -> int:
    return group.words


def _scale(group: Group) -> Scale:
    if group.weight is not None and group.weight.base is not None:
        group.weight.base.verify()
    return measure_scale(group)


T = TypeVar("T")

_TRIES = 5  # attempts to meet the bounds before everything is encoded exactly


class TooFar(Exception):
    """The weights are about as far from their base as from zero."""


class TooCoarse(Exception):
    """An error of the weights is `excess` times its bound."""

    def __init__(self, excess: float) -> None:
        super().__init__(f"{excess:.3g} times the bound")
        self.excess = excess


@dataclass(frozen=True)
class Attempt:
    """Settings of one attempt to encode a checkpoint.

    keyframe   encode without bases
    patched    also store an exact patch
    bounds     largest relative error (0: unlimited) and largest lag of all weights together
    alone      the weights are not related to those of the parent
    """

    spec: CodecSpec
    keyframe: bool
    patched: bool
    bounds: tuple[float, float] = (0.0, math.inf)
    alone: bool = False

    @classmethod
    def first(cls, spec: CodecSpec, *, keyframe: bool, patched: bool) -> Attempt:
        """Return the first attempt, with the bounds of the codec."""
        settings = spec.settings
        bounds = (0.0, math.inf)
        if isinstance(settings, NearSpec):
            bounds = settings.max_weight_error, settings.lag_bound
        return cls(spec, keyframe, patched and settings is not None, bounds)

    def check(self, error: ErrorReport) -> None:
        """Raise TooCoarse if an error exceeds its bound."""
        weight, lag = self.bounds
        excess = max(
            error.weight_rel / weight if weight else 0.0, math.sqrt((error.lag or 0.0) / lag)
        )
        if excess > 1:
            raise TooCoarse(excess)


def within_bounds(first: Attempt, encode: Callable[[Attempt], T]) -> T:
    """Encode again until the error is within bounds: as a keyframe, finer, and finally exactly.

    `encode` raises TooFar or TooCoarse if an attempt fails.
    """
    attempt = first
    for _ in range(_TRIES):
        try:
            return encode(attempt)
        except TooFar:
            attempt = replace(attempt, keyframe=True, alone=True)
        except TooCoarse as error:
            attempt = replace(attempt, spec=finer(attempt.spec, error.excess))
    return encode(Attempt(CodecSpec(first.spec.name), keyframe=True, patched=False))
