"""The metadata of a torch.distributed.checkpoint state, as JSON: its tensors and their chunks.

{"format": "ckptvcs-distributed", "version": 1,
 "tensors": {"model.0.weight": {"dtype": "BF16", "size": [8, 4], "requires_grad": true,
                                "chunks": [[[0, 0], [4, 4]], [[4, 0], [4, 4]]]}},
 "values": ["optim.lr"],
 "paths": {"model.0.weight": ["model", "0.weight"], "optim.lr": ["optim", "lr"]}}

A chunk is a pair of offsets and sizes.  `paths` gives the path of each name in the nested state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptvcs.codec.dtypes import DTYPES, OF_TORCH
from ckptvcs.errors import CorruptionError, InvalidInputError

DESCRIPTION = "checkpoint.json"
"""The name of the metadata file."""

_FORMAT, _VERSION = "ckptvcs-distributed", 1
_MAX_DIMS, _MAX_NUMBER = 64, 1 << 44

Path = tuple[str | int, ...]


def chunk_name(
    name: str, offsets: Sequence[int], sizes: Sequence[int], whole: Sequence[int]
) -> str:
    """Return the name of a chunk: `0.weight[4:8,0:4]`, or `name` if it is the whole tensor."""
    if tuple(sizes) == tuple(whole):
        return name
    return f"{name}[{','.join(f'{a}:{a + n}' for a, n in zip(offsets, sizes, strict=True))}]"


def dump_metadata(metadata: Metadata) -> bytes:
    """Return the metadata of a planner as JSON.

    Raises:
        InvalidInputError: The element type of a tensor is not supported.
    """
    tensors: dict[str, Any] = {}
    values: list[str] = []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            values.append(name)
            continue
        dtype = OF_TORCH.get(str(entry.properties.dtype).removeprefix("torch."))
        if dtype is None:
            raise InvalidInputError(f"{name} has unsupported type {entry.properties.dtype}")
        tensors[name] = {
            "dtype": dtype,
            "size": list(entry.size),
            "requires_grad": bool(entry.properties.requires_grad),
            "chunks": [[list(c.offsets), list(c.sizes)] for c in entry.chunks],
        }
    planned = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    paths = {name: list(path) for name, path in planned.items() if is_path(path)}
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "tensors": tensors,
        "values": values,
        "paths": paths,
    }
    return json.dumps(record, separators=(",", ":")).encode()


def is_path(path: object) -> bool:
    """Return whether `path` is a path in a nested state."""
    return isinstance(path, tuple) and all(type(step) in (str, int) for step in path)


def load_metadata(data: bytes) -> Metadata:
    """Parse the JSON of `dump_metadata`; raises CorruptionError."""
    try:
        record = json.loads(data)
        if (record["format"], record["version"]) != (_FORMAT, _VERSION):
            raise CorruptionError(f"{DESCRIPTION} has an unknown format or version")
        entries: dict[str, Any] = {
            str(name): _load_tensor(row) for name, row in record["tensors"].items()
        }
        entries |= {str(name): BytesStorageMetadata() for name in record["values"]}
        paths = {str(name): tuple(path) for name, path in record["paths"].items()}
        if not all(map(is_path, paths.values())):
            raise TypeError  # noqa: TRY301  the same message as for other wrong types
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(f"{DESCRIPTION} is not valid") from error
    return Metadata(entries, planner_data=paths or None)


def _load_tensor(row: dict[str, Any]) -> TensorStorageMetadata:
    dtype = getattr(torch, DTYPES[row["dtype"]].torch)
    size = _numbers(row["size"])
    chunks = []
    for offsets, sizes in row["chunks"]:
        chunk = ChunkStorageMetadata(torch.Size(_numbers(offsets)), torch.Size(_numbers(sizes)))
        inside = all(
            a + n <= whole for a, n, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        if not inside:
            raise ValueError("a chunk leaves its tensor")
        chunks.append(chunk)
    properties = TensorProperties(dtype=dtype, requires_grad=row["requires_grad"] is True)
    return TensorStorageMetadata(properties, torch.Size(size), chunks)


def _numbers(row: Any) -> list[int]:
    if not isinstance(row, list) or len(row) > _MAX_DIMS:
        raise TypeError("not a shape")
    if not all(type(n) is int and n >= 0 for n in row) or math.prod(row) >= _MAX_NUMBER:
        raise ValueError("shape out of range")
    return row
