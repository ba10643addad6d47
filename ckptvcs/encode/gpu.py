"""Encode weights and moments on their device with the near codec.

Only encoded slices leave the device. The host decodes them for their hashes and the next base, and
copies the base to the device slice by slice. Unusual slices (zeros in the second moment, say) are
copied and encoded on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.frame import (
    NEAR_SCALED_LOW_RANK,
    NEAR_SECOND,
    NEAR_WEIGHT,
    Companion,
    decode_slice,
    put_slice,
)
from ckptvcs.codec.kernels import on_torch
from ckptvcs.codec.near_lowrank import factors_of, put_components
from ckptvcs.codec.near_moments import Factors, put_second
from ckptvcs.codec.near_weight import put_delta
from ckptvcs.codec.words import Words, to_float32
from ckptvcs.encode.bases import BaseTensor
from ckptvcs.encode.group import EncodedGroup, EncodedSlice, Errors, Group, Target
from ckptvcs.encode.near import Measured, NearEncoder, is_beyond, second_rows

_OnDevice = tuple[EncodedSlice, Errors, Any]
"""An encoded slice, its errors, and its decoded values on the device, if they are needed."""


class DeviceEncoder:
    """Encodes on the device what `NearEncoder` encodes on the host."""

    def __init__(
        self, host: NearEncoder, weight: Target, base: BaseTensor, first: Target, second: Target
    ) -> None:
        self._host, self._weight, self._base = host, weight, base
        self._first, self._second = first, second
        self.members, self.companions = host.members, host.companions

    @classmethod
    def of(cls, host: NearEncoder, group: Group) -> DeviceEncoder | None:
        """Return an encoder if a group has a weight with a base, and both moments, on a device."""
        weight, first, second = group.weight, group.first, group.second
        if not group.words or group.others or group.copies:
            return None
        if weight is None or weight.base is None or first is None or second is None:
            return None
        for target in (weight, first, second):
            if target.dtype == "F64" or target.tensor.on_device(0) is None:
                return None
        return cls(host, weight, weight.base, first, second)

    def encode(self, number: int) -> EncodedGroup:
        """Encode one slice of each member."""
        return self._encode_on_device(number) or self._host.encode(number)

    def _encode_on_device(self, number: int) -> EncodedGroup | None:
        second = self._encode_second(self._second, number)
        first = None if second is None else self._encode_first(self._first, number, second)
        if second is None or first is None:
            return None
        encoded: dict[int, Measured] = {
            self._first.number: first[:2],
            self._second.number: second[:2],
        }
        step = self._host.step(number, encoded)
        weight = self._encode_weight(self._weight, number, second)
        if weight is None or not self._host.is_within_limit(step):
            return None
        first[1].add(step)
        encoded[self._weight.number] = weight[:2]
        return EncodedGroup(*zip(*(encoded[target.number] for target in self.members), strict=True))

    def _values(self, target: Target, number: int) -> Any:
        return on_torch.floats(target.tensor.on_device(number), target.dtype)

    def _encode_second(self, target: Target, number: int) -> _OnDevice | None:
        values = self._values(target, number)
        count = int(values.numel())
        rows = second_rows(target, number, count)
        sums = on_torch.log_sums(values, rows)
        payload = None if sums is None else put_second(*sums, rows, None)
        if payload is None:
            return None
        factors = Factors.of(payload, count)
        product = on_torch.product(factors.row, factors.column, rows, values)
        near = on_torch.rounded(product, target.dtype)
        errors = Errors(*on_torch.root_squares(values, near))
        return _checked(NEAR_SECOND, payload, target, values, errors, near)

    def _encode_first(self, target: Target, number: int, second: _OnDevice) -> _OnDevice | None:
        values, roots = self._values(target, number), second[2].sqrt()
        count = int(values.numel())
        spec = self._host.spec
        rows = self._host.low_rank_rows(target, number, count, spec.rank)
        if rows is None:
            return None
        matrix = on_torch.DeviceMatrix.of(values / roots, rows)
        payload = put_components(matrix, rows, spec.rank, spec.rank_step)
        if payload is None:
            return None
        left, right, _, scale = factors_of(payload, count)
        product = on_torch.to_device(left, values) @ on_torch.to_device(right, values)
        near = product.reshape(-1)[rows.start : rows.start + count] * float(scale) * roots
        near = on_torch.rounded(near, target.dtype)
        error, energy, largest = on_torch.squares(near, values)
        errors = Errors(error, energy, largest=largest)
        auxiliary = Companion(memoryview(second[0].data))
        return _checked(
            NEAR_SCALED_LOW_RANK, payload, target, values, errors, near, companion=auxiliary
        )

    def _encode_weight(self, target: Target, number: int, second: _OnDevice) -> _OnDevice | None:
        values, base = self._values(target, number), self._base.slice(number)
        residuals = on_torch.DeviceResiduals(
            values,
            on_torch.to_device(to_float32(base, target.dtype), values),
            self._values(self._second, number),
            target.dtype,
        )
        factors = self._host.row_factors(Factors.of(second[0].data[1:], base.size))
        delta = put_delta(residuals, self._host.delta_step(), self._host.spec.zone, factors)
        if delta is None:
            return None
        payload, sums = delta
        return _checked(NEAR_WEIGHT, payload, target, values, Errors.of(sums), None, base=base)


def _checked(
    method: int,
    payload: bytes,
    target: Target,
    values: Any,
    errors: Errors,
    near: Any,
    *,
    base: Words | None = None,
    companion: Companion | None = None,
) -> _OnDevice | None:
    """Return the slice of a near form, or None if it is unusable as in `NearEncoder`."""
    least = errors.energy if base is None else errors.residual
    if not errors.error <= least < np.inf:
        return None
    data = put_slice(method, payload)
    decoded = decode_slice(memoryview(data), DTYPES[target.dtype], values.numel(), base, companion)
    floats = to_float32(decoded, target.dtype)
    if target.dtype != "F32" and not np.isfinite(floats).all():
        return None  # rounded to infinity
    low, high = float(values.min()), float(values.max())
    sign = 1 if low >= 0 else -1 if high <= 0 else 0
    if sign and (target.weak or is_beyond(floats, sign)):
        return None
    if target.squared and not floats.all():
        return None
    return EncodedSlice(data, decoded, None, uses_base=base is not None), errors, near
