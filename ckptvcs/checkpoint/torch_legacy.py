"""torch.save files from before the zip format (torch < 1.6) -> layout.

    pickle(magic) pickle(protocol) pickle(system) pickle(object) pickle(storage keys)
    then for each key: 8 bytes of element count, the elements

Storages are ordered by their keys, which are memory addresses, so their order differs from save
to save; they are matched by the names of their tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

from ckptvcs.checkpoint.layout import Layout, Source
from ckptvcs.checkpoint.pickle_reader import (
    MAX_PICKLE_BYTES,
    StorageRef,
    TensorRef,
    read_pickle,
    walk,
)
from ckptvcs.checkpoint.torch_storages import Storage, set_order, storage_dtype, stored_tensors
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.history.schema import LITTLE, UNKNOWN

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAGIC_BYTES = _MAGIC.to_bytes(10, "little")


class _Raw(io.RawIOBase):
    """A file as an unbuffered stream."""

    def __init__(self, file: Source, limit: int) -> None:
        self._file, self._limit, self._at = file, min(limit, file.size), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        count = min(len(buffer), self._limit - self._at)
        buffer[:count] = self._file.read(self._at, count)
        self._at += count
        return count


class _Reader(io.BufferedReader):
    """A buffered stream for the unpickler.

    The unpickler asks for as many bytes as a pickle claims; this reader allocates what exists.
    """

    def __init__(self, file: Source, limit: int) -> None:
        super().__init__(_Raw(file, limit))  # type: ignore[arg-type]
        self._limit = limit

    def read(self, size: int | None = -1) -> bytes:
        wanted = self._limit if size is None or size < 0 else min(size, self._limit)
        return super().read(wanted)


def stream(file: Source) -> io.BufferedReader:
    """Return a file as a stream for the unpickler."""
    return _Reader(file, min(file.size, MAX_PICKLE_BYTES))


def begins_like_one(file: Source) -> bool:
    """Return whether a file starts with the magic number of legacy torch files."""
    return _MAGIC_BYTES in file.read(0, min(32, file.size))


def is_cut(file: Source) -> bool:
    """Return whether a legacy torch file is known to end before its last tensor."""
    if not begins_like_one(file):
        return False
    pickles = stream(file)
    try:
        *_, tree, keys = _pickles(file, pickles)
    except pickle.UnpicklingError:
        return file.size <= MAX_PICKLE_BYTES and not pickles.read(1)
    for storage in _storages(file, pickles.tell(), tree, keys if isinstance(keys, list) else []):
        if storage is None:
            return False  # the start of the next storage is unknown
        if storage.offset + storage.size > file.size:
            return True
    return False


def _pickles(file: Source, pickles: io.BufferedReader) -> list[Any]:
    """Return the five pickles at the start of a file.  Raises UnpicklingError."""
    return [read_pickle(pickles, file.size) for _ in range(5)]


def _storages(file: Source, at: int, tree: object, keys: list[Any]) -> Iterator[Storage | None]:
    """Yield the storages behind the pickles, which end at `at`.

    The last one may end beyond the file.  None is a storage that no tensor of the tree has.
    """
    types: dict[str, str] = {}
    for _, node in walk(tree):
        ref = node.storage if isinstance(node, TensorRef) else node
        if isinstance(ref, StorageRef):
            types[ref.key] = ref.type_name
    for key in keys:
        if not isinstance(key, str) or key not in types:
            yield None
            return
        size = file.size
        if at + 8 <= file.size:
            count = int.from_bytes(file.read(at, 8), "little")
            size = count * DTYPES[storage_dtype(types[key])].size
        yield Storage(key, at + 8, size)
        at += 8 + size


def parse(file: Source) -> Layout | None:
    """Return the layout of a legacy torch file, or None for any other file."""
    if file.size < 32 or not begins_like_one(file):
        return None
    pickles = stream(file)
    try:
        magic, protocol, system, tree, keys = _pickles(file, pickles)
    except pickle.UnpicklingError:
        return None
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        return None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        return None
    if len(set(keys)) < len(keys):
        return None  # with duplicate keys, each tensor would belong to several storages
    storages = []
    for storage in _storages(file, pickles.tell(), tree, keys):
        if storage is None or storage.offset + storage.size > file.size:
            return None
        storages.append(storage)
    tensors = stored_tensors(storages, tree)
    # torch writes the same bytes on every machine; other programs may not.
    little = not isinstance(system, dict) or system.get("little_endian", True) is True
    remark = set_order(tensors, LITTLE if little else UNKNOWN)
    remarks = () if remark is None else (remark,)
    return Layout("torch-legacy", tensors, tree=tree, remarks=remarks)
