"""Compare states bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor, row after row, as they are."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def same(a: Any, b: Any) -> bool:
    """Return whether two states have equal types, keys in equal order, strides and bits."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.stride() == b.stride()
            and bits(a) == bits(b)
        )
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)
