"""What the near codec does on a device: the sums, products and codes of tensors that stay there.

All in operations of torch, on flat float32 tensors; small results come back as numpy arrays.  What
is measured here steers and reports; what is decoded is decoded by `frame`, so that all machines and
devices agree.  torch is the caller's: this module imports it with the first tensor of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.codes import Integers
from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_lowrank import Matrix
from ckptvcs.codec.sections import Bytes, sample_positions
from ckptvcs.errors import optional
from ckptvcs.hashing import hasher

Floats = NDArray[np.float32]
Tensor = Any
"""A flat tensor of torch."""

_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_PIECE = 1 << 24  # bytes whose fingerprint is taken at once


@lru_cache(1)
def _torch() -> Any:
    return optional("torch")


def floats(data: Tensor, dtype: str) -> Tensor:
    """The values of the bytes of a tensor as float32."""
    return data.view(getattr(_torch(), _TORCH[dtype])).float()


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Values as they are when stored as `dtype`."""
    return values if dtype == "F32" else values.to(getattr(_torch(), _TORCH[dtype])).float()


def here(values: Tensor) -> NDArray[Any]:
    """The same as a numpy array, in the memory of the process."""
    found: NDArray[Any] = values.cpu().numpy()
    return found


def there(values: NDArray[Any], like: Tensor) -> Tensor:
    """A numpy array on the device of another tensor."""
    return _torch().from_numpy(np.ascontiguousarray(values)).to(like.device)


def picked(values: Tensor, size: int) -> Floats:
    """The values at the positions of `planes.sample`."""
    found: Floats = here(values[there(sample_positions(values.numel(), size), values)])
    return found


def fingerprint(data: Tensor) -> bytes:
    """32 bytes that tell the bytes of a tensor from others: two sums of its words, each times a
    number of its position, modulo 2^64.  No proof against those who choose the bytes.
    """
    torch, digest = _torch(), hasher()
    digest.update(data.numel().to_bytes(8, "little"))
    for low in range(0, data.numel(), _PIECE):
        piece = data[low : low + _PIECE]
        whole = piece.numel() // 4 * 4
        words = piece[:whole].view(torch.int32).long()
        words = torch.cat((words, piece[whole:].long()))
        places = torch.arange(1, words.numel() + 1, device=data.device)
        for multiplier in _MULTIPLIERS:
            odd = places * (multiplier - (1 << 64))  # wraps around
            odd = odd ^ (odd >> 29)
            digest.update(int((words * (odd | 1)).sum()).to_bytes(8, "little", signed=True))
    return digest.digest()


def _matrix(values: Tensor, rows: Rows) -> Tensor:
    height = rows.count(values.numel())
    missing = height * rows.columns - values.numel() - rows.start
    return _torch().nn.functional.pad(values, (rows.start, missing)).view(height, rows.columns)


def log_sums(values: Tensor, rows: Rows) -> tuple[Floats, Integers, Floats, Integers] | None:
    """`loops.log_sums` of values that are all positive and normal floats; None for others."""
    if not bool(((values > 2.0**-120) & (values < np.inf)).all()):
        return None
    logs = _matrix(values.log2(), rows)
    inside = _matrix(_torch().ones_like(values), rows)
    return (
        here(logs.sum(1)),
        here(inside.sum(1)).astype(np.int32),
        here(logs.sum(0)),
        here(inside.sum(0)).astype(np.int32),
    )


def product(row: Floats, column: Floats, rows: Rows, like: Tensor) -> Tensor:
    """Row x column, of as many values as `like`."""
    matrix = there(row, like)[:, None] * there(column, like)[None]
    return matrix.reshape(-1)[rows.start : rows.start + like.numel()]


def squares(near: Tensor, true: Tensor) -> tuple[float, float, float]:
    """As `loops.squares`."""
    error = near - true
    return _sum(error.square()), _sum(true.square()), float(error.abs().max())


def root_squares(true: Tensor, near: Tensor) -> tuple[float, float]:
    """As `loops.root_squares`."""
    return _sum((true.sqrt() - near.sqrt()).square()), _sum(true)


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=_torch().float64))


class DeviceMatrix(Matrix):
    """A matrix on a device."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    @classmethod
    def of(cls, values: Tensor, rows: Rows) -> DeviceMatrix:
        """Flat values as a matrix."""
        return cls(_matrix(values, rows))

    @property
    def shape(self) -> tuple[int, int]:
        return self._values.shape[0], self._values.shape[1]

    def times_rows(self, lines: Floats) -> Floats:
        found: Floats = here(self._values @ there(lines, self._values).T)
        return found

    def times_columns(self, left: Floats) -> Floats:
        found: Floats = here(there(left, self._values).T @ self._values)
        return found

    def thinned(self, height: int) -> DeviceMatrix:
        return DeviceMatrix(self._values[:: max(1, self.shape[0] // height)].contiguous())


class DeviceResiduals:
    """A slice of a weight and of its base, as `weight.put_delta` asks for them."""

    def __init__(self, values: Tensor, base: Tensor, weights: Tensor | None, dtype: str) -> None:
        self._values, self._base, self._weights, self._dtype = values, base, weights, dtype
        self.size = int(values.numel())

    def sample(self, size: int) -> tuple[Floats, Floats]:
        return picked(self._values, size), picked(self._base, size)

    def code(
        self,
        scale: np.float32,
        step: np.float32,
        zone: np.float32,
        amounts: Floats,
        factors: Floats,
        columns: int,
        start: int,
    ) -> tuple[Bytes, Integers, tuple[float, ...], float]:
        torch, values, base = _torch(), self._values, self._base
        factor = there(factors, values)
        if factors.size > 1:
            places = torch.arange(self.size, device=values.device)
            factor = factor[(places + start) // columns]
        lower, unit = (base * float(scale)).round(), float(step)
        units = (values * float(scale) - lower) / (factor * unit)
        units = units + torch.copysign(torch.full_like(units, 1 - float(zone)), units)
        codes = units.nan_to_num(0, 0, 0).clamp(-(2.0**24), 2.0**24).to(torch.int32)
        known = there(amounts, values)[(codes & 255).long()]
        amount = torch.where(codes.abs() < 128, known, codes.float() * unit)
        near = (lower + (amount * factor).round()) / float(scale)
        near = rounded(torch.where(codes != 0, near, base), self._dtype)
        error, change = (near - values).square(), (values - base).square()
        weighted = (0.0, 0.0)
        if self._weights is not None:
            weighted = _sum(error * self._weights), _sum(change * self._weights)
        sums = (
            _sum(error),
            _sum(values.square()),
            _sum(change),
            *weighted,
            float(error.max().sqrt()),
        )
        kept = codes != 0
        return _bits(kept), here(codes[kept]), sums, self.largest()

    def largest(self) -> float:
        return float(_torch().maximum(self._values.abs().max(), self._base.abs().max()))


def _bits(mask: Tensor) -> Bytes:
    torch = _torch()
    eights = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    found: Bytes = here((eights * places).sum(1, dtype=torch.uint8))
    return found
