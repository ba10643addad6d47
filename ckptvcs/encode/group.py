"""Groups of tensors that are encoded together, and the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptvcs.checkpoint.optimizer_state import SECOND, Rule
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.kernels import on_torch
from ckptvcs.codec.sections import sample
from ckptvcs.codec.words import Words, to_float32
from ckptvcs.encode.bases import BaseTensor

Floats = NDArray[np.float32]

_LIMITS = {"F64": 1e38, "F32": 1e38, "BF16": 1e38, "F16": 3e4}
"""Weights of larger magnitude could overflow when decoded."""


class SourceTensor(Protocol):
    """A tensor of the checkpoint that is read slice by slice."""

    def slice(self, number: int) -> Words:
        """Return the words of one slice."""

    def on_device(self, number: int) -> Any:
        """Return a slice on its device, as a flat uint8 tensor; None if it is in host memory."""


@dataclass(frozen=True)
class EncodedSlice:
    """An encoded slice, the words it decodes to, and the original words.

    `source` is None if the original stayed on a device, and is `decoded` if the slice is exact.
    """

    data: bytes
    decoded: Words
    source: Words | None
    uses_base: bool = False


@dataclass
class Errors:
    """Sums over the entries of one tensor: x is the original, e the error of its near form.

    error            e^2; for second moments, x and e are those of the square roots
    energy           x^2
    residual         (x - base)^2, for weights
    movement         (x - parent)^2, where the parent is the original of the base
    fisher_*         e^2 and (x - base)^2, weighted by the second moment
    update_*         squares of the next optimizer step, from a sample
    largest          the largest |e|
    """

    error: float = 0.0
    energy: float = 0.0
    residual: float = 0.0
    fisher_error: float = 0.0
    fisher_residual: float = 0.0
    update_error: float = 0.0
    update_energy: float = 0.0
    largest: float = 0.0
    movement: float = 0.0

    @classmethod
    def of(cls, sums: tuple[float, ...]) -> Errors:
        """Return the errors of a weight from the result of `kernels.weight_squares`."""
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
        self.movement += other.movement


@dataclass(frozen=True)
class EncodedGroup:
    """One slice of each member of a group and its errors, in the order of the encoder."""

    slices: tuple[EncodedSlice, ...]
    errors: tuple[Errors, ...]


@dataclass(frozen=True)
class Target:
    """A tensor to encode with loss.

    number   position in the schema
    dtype    real element type; `shape` counts a complex element as two
    role     role in the optimizer; `weak` if only its location in the checkpoint indicates it
    iterate  whether it is optimizer state that moves like a weight (see `ITERATES`)
    base     the earlier tensor that it may be encoded against; other moments have none
    """

    number: int
    tensor: SourceTensor
    dtype: str
    shape: tuple[int, ...] = ()
    role: str = ""
    weak: bool = False
    iterate: bool = False
    base: BaseTensor | None = None

    @property
    def squared(self) -> bool:
        """Return whether this is a second moment."""
        return self.role in SECOND

    def floats(self, number: int) -> Floats:
        """Return the values of one slice."""
        return to_float32(self.tensor.slice(number), self.dtype)

    def residual(self, number: int) -> Floats | None:
        """Return values - base in one slice, with NaN for values too large to encode safely."""
        if self.base is None:
            return None
        values = self.floats(number)
        with np.errstate(over="ignore", invalid="ignore"):
            residual = values - to_float32(self.base.slice(number), self.dtype)
            residual[~(np.abs(values) < _LIMITS[self.dtype])] = np.nan
        return residual

    def sampled(self, number: int, size: int) -> Floats:
        """Return at most `size` values of one slice, at the positions of `sections.sample`."""
        data = self.tensor.on_device(number)
        if data is not None:
            return on_torch.picked(on_torch.floats(data, self.dtype), size)
        return sample(self.floats(number), size)

    @property
    def columns(self) -> int:
        """Return the words in a row of the tensor as a matrix.

        Rows span all dimensions but the first, or the last dimension if that has 16 or more
        elements and there are three or more dimensions.
        """
        if len(self.shape) < 2:
            return max(1, int(np.prod(self.shape)))
        last = self.shape[-1]
        return max(1, last if len(self.shape) > 2 and last >= 16 else int(np.prod(self.shape[1:])))

    def start(self, number: int) -> int:
        """Return the position of a slice in its first row, in words."""
        return number * SLICE_WORDS % self.columns


@dataclass(frozen=True)
class Group:
    """Tensors of `words` words each that are encoded together: a weight and its moments.

    The weight or the moments may be missing. The optimizer divides `first` by the root of `second`.
    `others` are further moments; `copies` are the weight rounded to 16 bits.
    """

    words: int
    weight: Target | None = None
    first: Target | None = None
    second: Target | None = None
    others: tuple[Target, ...] = ()
    copies: tuple[Target, ...] = ()
    rule: Rule = field(default_factory=Rule)


class GroupEncoder(Protocol):
    """Encodes the slices of tensors of the same size, in any order and in any thread."""

    @property
    def members(self) -> Sequence[Target]:
        """Return the encoded tensors, in the order of the slices of an `EncodedGroup`."""

    @property
    def companions(self) -> Mapping[int, int]:
        """Return member -> the member whose frame is its auxiliary frame, by position."""

    def encode(self, number: int) -> EncodedGroup:
        """Encode one slice of each member."""
