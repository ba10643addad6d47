"""Which parts of which tensors a state of torch.distributed.checkpoint has: its metadata as JSON.

{"format": "ckptvcs-distributed", "version": 1,
 "tensors": {"model.0.weight": {"dtype": "BF16", "size": [8, 4], "requires_grad": true,
                                "chunks": [[[0, 0], [4, 4]], [[4, 0], [4, 4]]]}},
 "values": ["optim.lr"],
 "paths": {"model.0.weight": ["model", "0.weight"], "optim.lr": ["optim", "lr"]}}

A chunk is its offsets and its sizes; `paths` are where in the state a name belongs.
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
"""The name of the file."""

_FORMAT, _VERSION = "ckptvcs-distributed", 1
_MAX_DIMS, _MAX_NUMBER = 64, 1 << 44

Path = tuple[str | int, ...]


def chunk_name(
    name: str, offsets: Sequence[int], sizes: Sequence[int], whole: Sequence[int]
) -> str:
    """What a chunk of a tensor is called: `0.weight[4:8,0:4]`; as its tensor, if it is all."""
    if tuple(sizes) == tuple(whole):
        return name
    return f"{name}[{','.join(f'{a}:{a + n}' for a, n in zip(offsets, sizes, strict=True))}]"


def dump_metadata(metadata: Metadata) -> bytes:
    """The JSON of what a planner planned.

    Raises:
        InvalidInputError: it has tensors that cannot be stored.
    """
    tensors: dict[str, Any] = {}
    values: list[str] = []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            values.append(name)
            continue
        dtype = OF_TORCH.get(str(entry.properties.dtype).removeprefix("torch."))
        if dtype is None:
            raise InvalidInputError(f"{name} is of {entry.properties.dtype}, which is not stored")
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
    """Whether this is where something stands in a nested state."""
    return isinstance(path, tuple) and all(type(step) in (str, int) for step in path)


def load_metadata(data: bytes) -> Metadata:
    """What `dump_metadata` wrote.  Raises CorruptionError."""
    try:
        record = json.loads(data)
        if (record["format"], record["version"]) != (_FORMAT, _VERSION):
            raise CorruptionError(f"{DESCRIPTION} is none that this program wrote")
        entries: dict[str, Any] = {
            str(name): _load_tensor(row) for name, row in record["tensors"].items()
        }
        entries |= {str(name): BytesStorageMetadata() for name in record["values"]}
        paths = {str(name): tuple(path) for name, path in record["paths"].items()}
        if not all(map(is_path, paths.values())):
            raise TypeError  # noqa: TRY301  the same answer as for what is no path at all
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(f"{DESCRIPTION} does not describe a state") from error
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
        raise TypeError("no shape")
    if not all(type(n) is int and n >= 0 for n in row) or math.prod(row) >= _MAX_NUMBER:
        raise ValueError("no shape that there can be")
    return row
