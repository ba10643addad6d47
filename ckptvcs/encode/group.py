"""Groups of tensors that are encoded together, and the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptvcs.checkpoint.roles import SECOND, Rule
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.kernels import on_torch
from ckptvcs.codec.sections import sample
from ckptvcs.codec.words import Words, to_float32

Floats = NDArray[np.float32]

_LIMITS = {
    "F64": 1e38,
    "F32": 1e38,
    "BF16": 1e38,
    "F16": 3e4,
}  # larger weights could overflow when decoded


class Tensor(Protocol):
    """A tensor that is read slice by slice."""

    def slice(self, number: int) -> Words:
        """Return the words of one slice."""


class SourceTensor(Tensor, Protocol):
    """A tensor of the checkpoint."""

    def on_device(self, number: int) -> Any:
        """The bytes of a slice as a flat tensor, where they are on a device; else None."""


@dataclass(frozen=True)
class EncodedSlice:
    """A slice as it is stored, the words it decodes to, and the words that were asked for, unless
    these stayed on a device.
    """

    data: bytes
    decoded: Words
    source: Words | None
    uses_base: bool = False


@dataclass
class Errors:
    """Sums over entries of one tensor, x being what was asked for and e the error of its near form.

    Of a weight: `residual` sums (x - base)^2; `fisher_error` and `fisher_residual` weigh e^2 and
    that by the second moment.  Of a second moment x and e are roots.  `update_*` sum squares of the
    optimizer's next step, from a sample.
    """

    error: float = 0.0
    energy: float = 0.0
    residual: float = 0.0
    fisher_error: float = 0.0
    fisher_residual: float = 0.0
    update_error: float = 0.0
    update_energy: float = 0.0
    largest: float = 0.0

    @classmethod
    def of(cls, sums: tuple[float, ...]) -> Errors:
        """Those of a weight, from what `kernels.weight_squares` returns."""
        error, energy, residual, fisher_error, fisher_residual, largest = sums
        return cls(error, energy, residual, fisher_error, fisher_residual, largest=largest)

    def add(self, other: Errors) -> None:
        """Add the sums of other entries."""
        self.error += other.error
        self.energy += other.energy
        self.residual += other.residual
        self.fisher_error += other.fisher_error
        self.fisher_residual += other.fisher_residual
        self.update_error += other.update_error
        self.update_energy += other.update_energy
        self.largest = max(self.largest, other.largest)


@dataclass(frozen=True)
class EncodedGroup:
    """One slice of each member of a group, in the order of its encoder, and its errors."""

    slices: tuple[EncodedSlice, ...]
    errors: tuple[Errors, ...]


@dataclass(frozen=True)
class Target:
    """A tensor of `dtype` and `shape` to encode with loss.  `number` is its position in
    the schema, `role` what it is to its optimizer; `weak`, if its place alone says so;
    `iterate`, if it is state that an optimizer steps from.
    """

    number: int
    tensor: SourceTensor
    dtype: str
    shape: tuple[int, ...] = ()
    role: str = ""
    weak: bool = False
    iterate: bool = False

    @property
    def squared(self) -> bool:
        """Whether it averages squares."""
        return self.role in SECOND

    def floats(self, number: int) -> Floats:
        """The values of one slice."""
        return to_float32(self.tensor.slice(number), self.dtype)

    def sampled(self, number: int, size: int) -> Floats:
        """The values of one slice at the positions of `planes.sample`."""
        data = self.tensor.on_device(number)
        if data is not None:
            return on_torch.picked(on_torch.floats(data, self.dtype), size)
        return sample(self.floats(number), size)

    @property
    def columns(self) -> int:
        """Words in a row of the matrix it is seen as: all but the first dimension, or the last one
        where there are many matrices.
        """
        if len(self.shape) < 2:
            return max(1, int(np.prod(self.shape)))
        last = self.shape[-1]
        return max(1, last if len(self.shape) > 2 and last >= 16 else int(np.prod(self.shape[1:])))

    def start(self, number: int) -> int:
        """How many words of its first row a slice lacks."""
        return number * SLICE_WORDS % self.columns


@dataclass(frozen=True)
class Group:
    """What is coded together, all of as many words: a weight and its base, its moments.

    A weight without moments, and moments whose weight is not known, are groups too.  `first` is
    what the optimizer divides by the root of `second`; `others` are coded by themselves;
    `copies` are the weight rounded to 16 bits.
    """

    words: int
    weight: Target | None = None
    base: Tensor | None = None
    first: Target | None = None
    second: Target | None = None
    others: tuple[Target, ...] = ()
    copies: tuple[Target, ...] = ()
    rule: Rule = field(default_factory=Rule)

    def residual(self, number: int) -> Floats | None:
        """Weight - base in one slice.  NaN where the weight is too large to be coded safely."""
        if self.weight is None or self.base is None:
            return None
        target = self.weight.floats(number)
        with np.errstate(over="ignore", invalid="ignore"):
            residual = target - to_float32(self.base.slice(number), self.weight.dtype)
            residual[~(np.abs(target) < _LIMITS[self.weight.dtype])] = np.nan
        return residual


class GroupEncoder(Protocol):
    """Codes the slices of some tensors of as many words, in any order and any thread."""

    @property
    def members(self) -> Sequence[Target]:
        """What it codes, in the order of the slices that come out."""

    @property
    def companions(self) -> Mapping[int, int]:
        """Which member names which other as its companion, by position."""

    def encode(self, number: int) -> EncodedGroup:
        """Encode one slice of each member."""
