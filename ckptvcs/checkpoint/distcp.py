"""Parse directories of torch.distributed.checkpoint.

    .metadata      a pickle: the place of each part of each tensor
    __R_N.distcp   the output of one process: torch.save files, one after another

FileSystemWriter of torch 2.4 - 2.13 writes this form.  The pickle reader calls nothing.  A place in
the metadata counts only if a torch.save file is there.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptvcs.checkpoint import torch_zip
from ckptvcs.checkpoint.conventions import SHARD_SUFFIX
from ckptvcs.checkpoint.layout import FileSource, Layout, Source, covers, overlap
from ckptvcs.checkpoint.pickle_reader import MAX_PICKLE_BYTES, Inert, TensorRef, read_pickle
from ckptvcs.errors import InvalidInputError

METADATA = ".metadata"

_GROUPS = "param_groups"
_MAX_DEPTH = 100

_Path = tuple[str | int, ...]
"""The keys that lead to a tensor in the state."""

Parsed = tuple[str, FileSource, Layout]


@dataclass(frozen=True)
class _Item:
    """A torch.save file inside a `.distcp` file: its place, tensor name, part and state path."""

    offset: int
    size: int
    name: str
    part: str
    path: _Path


class _Window(Source):
    """A range of a file, as a file."""

    def __init__(self, source: Source, item: _Item) -> None:
        self._source, self._offset, self.size = source, item.offset, item.size

    def read(self, offset: int, length: int) -> bytes:
        return self._source.read(self._offset + offset, length)


def with_structure(parsed: Sequence[Parsed]) -> list[Parsed]:
    """Return the files of a directory, with the tensors of its `.distcp` files."""
    items: dict[str, list[_Item]] = {}
    for name, source, _ in parsed:
        folder, _, last = name.rpartition("/")
        if last == METADATA and 0 < source.size <= MAX_PICKLE_BYTES:
            items |= _items(f"{folder}/" if folder else "", source)
    groups: dict[_Path, object] = {}
    shards: dict[str, tuple[Layout, dict[_Path, object]]] = {}
    for name, source, _ in parsed:
        if name in items:
            with source:
                shards[name] = _parse(source, items[name], groups)
    for layout, leaves in shards.values():  # all processes share the optimizer groups
        layout.tree = _tree(groups | leaves)
    structured = []
    for name, source, plain in parsed:
        layout = shards[name][0] if name in shards else plain
        if not covers(layout, source.size):
            layout = Layout("raw", [])
        if name.endswith(SHARD_SUFFIX) and layout.format == "raw":
            layout.problem = f"{METADATA} does not describe its content"
        structured.append((name, source, layout))
    return structured


def _items(folder: str, source: FileSource) -> dict[str, list[_Item]]:
    """Return the items of each file by the metadata of a folder; none if it is not valid."""
    try:
        with source:
            data = source.read(0, source.size)
        state = read_pickle(io.BytesIO(data), len(data)).state
        tensors, places = state["state_dict_metadata"], state["storage_data"]
        paths = state["planner_data"] or {}
        items: dict[str, list[_Item]] = {}
        for key, place in places.items():
            index = key.args[0].state if isinstance(key, Inert) else key.state
            name, info = str(index["fqn"]), tensors[index["fqn"]].state
            path = paths.get(name, (name,))
            plain = (
                isinstance(path, tuple)
                and len(path) < _MAX_DEPTH
                and all(type(step) in (str, int) for step in path)
            )
            item = _Item(
                int(place.state["offset"]),
                int(place.state["length"]),
                name,
                _part(index.get("offset"), info),
                path if plain and path else (name,),
            )
            items.setdefault(folder + str(place.state["relative_path"]), []).append(item)
    except (pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError):
        return {}
    return items


def _part(offset: Any, info: Any) -> str:
    """Return the part of a tensor that an item holds, as `[4:8,0:16]`; "" for the whole."""
    if offset is None or not isinstance(info, Mapping) or "chunks" not in info:
        return ""
    start, whole = _size(offset), _size(info["size"])
    for chunk in info["chunks"]:
        if _size(chunk.state["offsets"]) == start:
            sizes = _size(chunk.state["sizes"])
            ranges = (f"{a}:{a + n}" for a, n in zip(start, sizes, strict=True))
            return "" if sizes == whole else f"[{','.join(ranges)}]"
    return ""


def _size(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value.args[0] if isinstance(value, Inert) else value))


def _parse(
    source: FileSource, items: Sequence[_Item], groups: dict[_Path, object]
) -> tuple[Layout, dict[_Path, object]]:
    """Return the layout of one file without its tree, and the leaves of the tree.

    Optimizer groups of its items are added to `groups`.
    """
    layout = Layout("distcp", [])
    leaves: dict[_Path, object] = {}
    if overlap((item.offset, item.size) for item in items):
        return layout, leaves  # before anything is read: many items may point at one place
    for number, item in enumerate(items):
        window = _Window(source, item)
        if item.offset < 0 or item.size <= 0:
            continue
        if item.offset + item.size > source.size:
            raise InvalidInputError(
                f"{source.path} is incomplete: {METADATA} names tensors beyond its end",
                hint="commit the directory with --raw to store the bytes as they are",
            )
        inner = torch_zip.parse(window) if torch_zip.starts_like_zip(window) else None
        if inner is None:
            continue
        first = len(layout.tensors)
        layout.remarks = layout.remarks or inner.remarks
        for tensor in inner.tensors:
            tensor.offset += item.offset
            tensor.key = f"{number}/{tensor.key}"
            below = tensor.name and f".{tensor.name}"
            tensor.name, tensor.part = item.name + below, item.part
            layout.tensors.append(tensor)
        layout.checksums += [
            replace(mark, offset=mark.offset + item.offset, tensor=first + mark.tensor)
            for mark in inner.checksums
        ]
        if isinstance(inner.tree, TensorRef):
            storage = replace(inner.tree.storage, key=f"{number}/{inner.tree.storage.key}")
            leaves[item.path] = replace(inner.tree, storage=storage)
        elif _GROUPS in item.path:
            groups[item.path] = inner.tree
    return layout, leaves


def _tree(leaves: Mapping[_Path, object]) -> dict[Any, Any]:
    """Return the state that consists of these leaves; a dict with keys 0 to n-1 becomes a list."""
    root: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for key in path[:-1]:
            inner = node.setdefault(key, {})
            if not isinstance(inner, dict):
                break  # another path has a leaf here
            node = inner
        else:
            node[path[-1]] = leaf
    for node in [*_dicts(root)]:
        for key, value in node.items():
            if isinstance(value, dict) and value and {*value} == {*range(len(value))}:
                node[key] = [value[number] for number in range(len(value))]
    return root


def _dicts(node: dict[Any, Any]) -> list[dict[Any, Any]]:
    """Return all dicts in a tree, the innermost first."""
    below = [row for value in node.values() if isinstance(value, dict) for row in _dicts(value)]
    return [*below, node]
