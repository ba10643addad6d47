"""Kernels of the near encoder for tensors that stay on a device.

They use torch operations on flat float32 tensors and return numpy arrays. Their results only steer
the encoder and its error report; only the CPU decodes, so that all machines decode the same bits.
This module imports torch at the first use.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_lowrank import Matrix
from ckptvcs.codec.sections import sample_positions
from ckptvcs.codec.words import Bytes, Floats, Integers
from ckptvcs.errors import optional
from ckptvcs.hashing import hasher

Tensor = Any
"""A torch tensor, flat unless stated otherwise."""

_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_PIECE = 1 << 24  # bytes that `fingerprint` reads at once


@lru_cache(1)
def _torch() -> Any:
    return optional("torch")


def floats(data: Tensor, dtype: str) -> Tensor:
    """Convert the bytes of a tensor (uint8) to float32."""
    return data.view(getattr(_torch(), _TORCH[dtype])).float()


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Round float32 values to `dtype` and convert them back."""
    return values if dtype == "F32" else values.to(getattr(_torch(), _TORCH[dtype])).float()


def to_host(values: Tensor) -> NDArray[Any]:
    """Copy a tensor to a numpy array."""
    array: NDArray[Any] = values.cpu().numpy()
    return array


def to_device(values: NDArray[Any], like: Tensor) -> Tensor:
    """Copy a numpy array to the device of another tensor."""
    return _torch().from_numpy(np.ascontiguousarray(values)).to(like.device)


def picked(values: Tensor, size: int) -> Floats:
    """Return the values at the positions of `sections.sample`."""
    return to_host(values[to_device(sample_positions(values.numel(), size), values)])


def fingerprint(data: Tensor) -> bytes:
    """Return 32 bytes that almost certainly differ for different bytes (uint8).

    They are a hash of two sums modulo 2^64 of words times an odd number of their position. This is
    not safe against bytes that were chosen to collide.
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
    """Return the first four results of `reference.log_sums`; None unless all are normal and > 0."""
    if not bool(((values > 2.0**-120) & (values < np.inf)).all()):
        return None
    logs = _matrix(values.log2(), rows)
    inside = _matrix(_torch().ones_like(values), rows)
    return (
        to_host(logs.sum(1)),
        to_host(inside.sum(1)).astype(np.int32),
        to_host(logs.sum(0)),
        to_host(inside.sum(0)).astype(np.int32),
    )


def product(row: Floats, column: Floats, rows: Rows, like: Tensor) -> Tensor:
    """Return row factors * column factors, as many as `like` has values."""
    matrix = to_device(row, like)[:, None] * to_device(column, like)[None]
    return matrix.reshape(-1)[rows.start : rows.start + like.numel()]


def squares(near: Tensor, true: Tensor) -> tuple[float, float, float]:
    """See `reference.squares`."""
    error = near - true
    return _sum(error.square()), _sum(true.square()), float(error.abs().max())


def root_squares(true: Tensor, near: Tensor) -> tuple[float, float]:
    """See `reference.root_squares`."""
    return _sum((true.sqrt() - near.sqrt()).square()), _sum(true)


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=_torch().float64))


class DeviceMatrix(Matrix):
    """A matrix on a device."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    @classmethod
    def of(cls, values: Tensor, rows: Rows) -> DeviceMatrix:
        """Return flat values as a matrix."""
        return cls(_matrix(values, rows))

    @property
    def shape(self) -> tuple[int, int]:
        return self._values.shape[0], self._values.shape[1]

    def times_rows(self, lines: Floats) -> Floats:
        return to_host(self._values @ to_device(lines, self._values).T)

    def times_columns(self, left: Floats) -> Floats:
        return to_host(to_device(left, self._values).T @ self._values)

    def thinned(self, height: int) -> DeviceMatrix:
        return DeviceMatrix(self._values[:: max(1, self.shape[0] // height)].contiguous())


class DeviceResiduals:
    """A slice of a weight and of its base on a device, for `near_weight.put_delta`."""

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
        factor = to_device(factors, values)
        if factors.size > 1:
            places = torch.arange(self.size, device=values.device)
            factor = factor[(places + start) // columns]
        lower, unit = (base * float(scale)).round(), float(step)
        units = (values * float(scale) - lower) / (factor * unit)
        units = units + torch.copysign(torch.full_like(units, 1 - float(zone)), units)
        codes = units.nan_to_num(0, 0, 0).clamp(-(2.0**24), 2.0**24).to(torch.int32)
        level = to_device(amounts, values)[(codes & 255).long()]
        amount = torch.where(codes.abs() < 128, level, codes.float() * unit)
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
        return _bits(kept), to_host(codes[kept]), sums, self.largest()

    def largest(self) -> float:
        return float(_torch().maximum(self._values.abs().max(), self._base.abs().max()))


def _bits(mask: Tensor) -> Bytes:
    torch = _torch()
    eights = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    return to_host((eights * places).sum(1, dtype=torch.uint8))
