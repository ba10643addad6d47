"""Storages and their tensors -> stored tensors, for both formats of torch.save.

A file of torch.save holds storages (flat bytes) and a pickle of tensors, each a view of a storage.
Each storage becomes one stored tensor.  It has the shape of the tensor that covers it in row-major
order; without such a tensor it is flat.  Tied weights and views are thus stored once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ckptvcs.checkpoint.layout import StoredTensor
from ckptvcs.checkpoint.pickle_reader import TensorRef, walk
from ckptvcs.codec.dtypes import DTYPES, OF_TORCH
from ckptvcs.history.schema import BIG, LITTLE, UNKNOWN, View
from ckptvcs.text import size

_STORAGE_TYPES = {dtype.storage: dtype.name for dtype in DTYPES.values() if dtype.storage} | {
    "QInt8Storage": "I8",
    "QUInt8Storage": "U8",
    "QInt32Storage": "I32",
    "UntypedStorage": "U8",
}


def storage_dtype(type_name: str) -> str:
    """Return the dtype of a torch storage class, or U8 if the class is unknown."""
    return _STORAGE_TYPES.get(type_name, "U8")


def ref_dtype(ref: TensorRef) -> str | None:
    """Return the dtype of a tensor, or None if it is unknown."""
    return storage_dtype(ref.storage.type_name) if ref.dtype is None else OF_TORCH.get(ref.dtype)


@dataclass(frozen=True)
class Storage:
    """The payload of a storage in its file."""

    key: str
    offset: int
    size: int


def _row_major(ref: TensorRef) -> bool:
    expected = 1
    for length, stride in zip(reversed(ref.shape), reversed(ref.stride), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def set_order(tensors: Iterable[StoredTensor], order: str) -> str | None:
    """Set the byte order of tensors that are not little-endian, and return a remark about them.

    If the word size of a storage is unknown, so is its order.
    """
    size_bytes = 0
    for tensor in tensors:
        types = {tensor.dtype, *(view.dtype for view in tensor.views)}
        if order != LITTLE and any(DTYPES[dtype].word > 1 for dtype in types):
            tensor.order = order if DTYPES[tensor.dtype].word > 1 else UNKNOWN
            size_bytes += tensor.size
    if not size_bytes:
        return None
    how = "big-endian numbers" if order == BIG else "numbers in an unknown order of bytes"
    return f"{how}; {size(size_bytes)} of tensors stored exactly, not near"


def stored_tensors(storages: Iterable[Storage], tree: object) -> list[StoredTensor]:
    """Return one stored tensor for each storage, named after the first tensor that views it."""
    refs: dict[str, list[tuple[str, TensorRef]]] = {}
    for path, node in walk(tree):
        if isinstance(node, TensorRef):
            refs.setdefault(node.storage.key, []).append((".".join(path), node))
    taken: dict[str, int] = {}
    return [_stored(storage, refs.get(storage.key, []), taken) for storage in storages]


def _stored(
    storage: Storage, refs: list[tuple[str, TensorRef]], taken: dict[str, int]
) -> StoredTensor:
    """Return the stored tensor of a storage; `taken` counts the uses of each name."""
    views, fitting = [], []
    for name, ref in refs:
        dtype = ref_dtype(ref)
        view = View(name, dtype or "", ref.offset, ref.shape, ref.stride)
        if dtype is not None and view.fits(storage.size // DTYPES[dtype].size):
            views.append(view)
            fitting.append(ref)
    dtype = _common_dtype(storage, refs)
    elements = storage.size // DTYPES[dtype].size
    whole = next((ref for ref in fitting if _covers(ref, dtype, elements)), None)
    name = views[0].name if views else f"storage.{storage.key}"
    taken[name] = taken.get(name, 0) + 1
    if taken[name] > 1:
        name = f"{name}#{taken[name]}"
    shape = whole.shape if whole else (elements,)
    tensor = StoredTensor(name, dtype, shape, storage.offset, storage.size, storage.key)
    if not (whole and len(refs) == 1):
        tensor.views = views
    return tensor


def _common_dtype(storage: Storage, refs: list[tuple[str, TensorRef]]) -> str:
    """Return the element type of all tensors of a storage, or U8 if they differ."""
    dtypes = {ref_dtype(ref) for _, ref in refs}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return "U8" if dtype is None or storage.size % DTYPES[dtype].size else dtype


def _covers(ref: TensorRef, dtype: str, elements: int) -> bool:
    """Return whether a tensor is the whole storage in row-major order."""
    is_whole = ref.offset == 0 and math.prod(ref.shape) == elements
    return is_whole and _row_major(ref) and ref_dtype(ref) == dtype
