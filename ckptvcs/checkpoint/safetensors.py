"""safetensors files -> layout.  Format: 8 bytes of header length, JSON header, tensors.

Shapes in the file count elements.  Two F4 elements share a byte; as in torch, F4 shapes count bytes
here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from ckptvcs.checkpoint.layout import Layout, Source, StoredTensor
from ckptvcs.codec.dtypes import DTYPES

_MAX_HEADER = 100_000_000
_MAX_DIMS, _MAX_NUMBER = 64, 1 << 56  # larger products of sizes are slow to compute
_MAX_TYPE, _MAX_NAMED = 20, 3  # characters of a dtype, dtypes in remarks
_MAX_NAME = 1000  # the schema cuts longer names; the file keeps them


def parse(file: Source) -> Layout | None:
    """Return the layout of a safetensors file, or None for any other file.

    The header is literal, because the order of its metadata differs from save to save.  Tensors
    of dtypes that torch does not have, such as F6_E2M3, become bytes.
    """
    if file.size < 10:
        return None
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(_MAX_HEADER, file.size - 8) or file.read(8, 1) != b"{":
        return None
    try:
        header = json.loads(file.read(8, length))
        tree = {
            name: _tensor(name, entry, 8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    types = (str(entry["dtype"]) for name, entry in header.items() if name in tree)
    unknown = Counter(dtype[:_MAX_TYPE] for dtype in types if dtype not in DTYPES)
    tensors = sorted(tree.values(), key=lambda tensor: tensor.offset)
    remarks = (
        f"{count} {'tensor' if count == 1 else 'tensors'} of type {dtype}, which torch lacks:"
        " stored exactly, and bytes in Python"
        for dtype, count in unknown.most_common(_MAX_NAMED)
    )
    return Layout("safetensors", tensors, tree=tree, remarks=tuple(remarks))


def _tensor(name: str, entry: Any, data_start: int) -> StoredTensor:
    """Return a tensor from its header entry.

    Raises:
        ValueError: a number in the entry is not valid.
    """
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = str(entry["dtype"])
    if not all(type(n) is int and 0 <= n < _MAX_NUMBER for n in (start, end, *shape)):
        raise ValueError("a number is negative, too large or not an integer")
    if end < start or len(shape) > _MAX_DIMS:
        raise ValueError("a size is negative, or there are too many dimensions")
    if dtype == "F4" and shape and not shape[-1] % 2:
        shape = (*shape[:-1], shape[-1] // 2)
    if dtype not in DTYPES or math.prod(shape) * DTYPES[dtype].size != end - start:
        dtype, shape = "U8", (end - start,)
    return StoredTensor(name[:_MAX_NAME], dtype, shape, data_start + start, end - start, name)
