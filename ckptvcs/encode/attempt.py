"""Attempt: how a checkpoint is to be coded, and what is tried until its bounds hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from ckptvcs.codec.spec import CodecSpec, NearSpec, finer

T = TypeVar("T")

_TRIES = 5  # to code within bounds, before everything is exact


class TooFar(Exception):
    """The weights are about as far from their base as from zero: it says nothing of them."""


class TooCoarse(Exception):
    """The error of the weights is `excess` times what it may be."""

    def __init__(self, excess: float) -> None:
        super().__init__(f"{excess:.3g} times the bound")
        self.excess = excess


@dataclass(frozen=True)
class Attempt:
    """As a `keyframe` or by residuals, also exactly if it is `patched`, and with an error of all
    weights together of no more than `bound` (0: there is none); `alone`, if the parent says nothing
    of these weights.
    """

    spec: CodecSpec
    keyframe: bool
    patched: bool
    bound: float
    alone: bool = False

    @classmethod
    def first(cls, spec: CodecSpec, *, keyframe: bool, patched: bool) -> Attempt:
        """What is tried at first: the bound is that of the codec."""
        bound = spec.settings.max_weight_error if isinstance(spec.settings, NearSpec) else 0
        return cls(spec, keyframe, patched, bound)


def within_bounds(first: Attempt, encode: Callable[[Attempt], T]) -> T:
    """What `encode` gives: of residuals, else finer, else of a keyframe, else exactly.

    It raises TooFar or TooCoarse where it does not come about.
    """
    attempt = first
    for _ in range(_TRIES):
        try:
            return encode(attempt)
        except TooFar:
            attempt = replace(attempt, keyframe=True, alone=True)
        except TooCoarse as error:
            attempt = replace(attempt, spec=finer(attempt.spec, error.excess))
    return encode(Attempt(CodecSpec(first.spec.name), keyframe=True, patched=False, bound=0))
