"""safetensors files -> layout.  Format: 8 bytes of header length, JSON header, tensors.

Shapes count elements.  Of F4 two share a byte, and torch's type for them counts the bytes: so do
shapes here.
"""

from __future__ import annotations

import json
import math
from collections import Counter

from ckptvcs.checkpoint.layout import Found, Layout, Source
from ckptvcs.codec.dtypes import DTYPES

_MAX_HEADER = 100_000_000
_MAX_DIMS, _MAX_NUMBER = 64, 1 << 56  # products of more and larger ones take long
_MAX_TYPE, _SAID = 20, 3  # characters of a type, types that are named
_MAX_NAME = 1000  # longer names are cut in what is shown and matched, not in the file


def parse(file: Source) -> Layout | None:
    """The layout of a safetensors file; None where it is none.

    The header is kept as it is, since the order of its metadata differs from save to save.
    Tensors of a type that torch does not have, such as F6_E2M3, become bytes.
    """
    if file.size < 10:
        return None
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(_MAX_HEADER, file.size - 8) or file.read(8, 1) != b"{":
        return None
    try:
        header = json.loads(file.read(8, length))
        tensors, tree = [], {}
        unknown: Counter[str] = Counter()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype = str(entry["dtype"])
            if not all(type(n) is int and 0 <= n < _MAX_NUMBER for n in (start, end, *shape)):
                return None
            if end < start or len(shape) > _MAX_DIMS:
                return None
            if dtype == "F4" and shape and not shape[-1] % 2:
                shape = (*shape[:-1], shape[-1] // 2)
            if dtype not in DTYPES:
                unknown[dtype[:_MAX_TYPE]] += 1
            if dtype not in DTYPES or math.prod(shape) * DTYPES[dtype].size != end - start:
                dtype, shape = "U8", (end - start,)
            found = Found(name[:_MAX_NAME], dtype, shape, 8 + length + start, end - start, name)
            tensors.append(found)
            tree[name] = found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    tensors.sort(key=lambda found: found.offset)
    remarks = (
        f"{count} {'tensor' if count == 1 else 'tensors'} of type {dtype}, which torch lacks:"
        " stored exactly, and bytes in Python"
        for dtype, count in unknown.most_common(_SAID)
    )
    return Layout("safetensors", tensors, tree=tree, remarks=tuple(remarks))
