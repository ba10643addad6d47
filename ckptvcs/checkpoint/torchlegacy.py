"""torch.save files from before the zip format (torch < 1.6) -> layout.

    pickle(magic) pickle(protocol) pickle(system) pickle(object) pickle(storage keys)
    then for each key: 8 bytes of element count, the elements

Storages are ordered by their keys, which are memory addresses, so their order differs from save
to save; they are matched by the names of their tensors.
"""

from __future__ import annotations

import io
import pickle

from ckptvcs.checkpoint.layout import Layout, Source
from ckptvcs.checkpoint.pickles import MAX_PICKLE_BYTES, StorageRef, TensorRef, read_pickle, walk
from ckptvcs.checkpoint.torchfile import Storage, storage_dtype, stored_tensors
from ckptvcs.dtypes import DTYPES

_MAGIC = 0x1950A86A20F9469CFC6C
_LEAST_BYTES = 1 << 10  # how many storages there are is told last; most are larger than this
_PROTOCOL = 1001
_MAGIC_BYTES = _MAGIC.to_bytes(10, "little")


class _Raw(io.RawIOBase):
    """The file as a stream, by position."""

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
    """The same for the unpickler.  It asks for as much as a pickle claims, which takes no memory
    here before it is there.
    """

    def __init__(self, file: Source, limit: int) -> None:
        super().__init__(_Raw(file, limit))  # type: ignore[arg-type]
        self._limit = limit

    def read(self, size: int | None = -1) -> bytes:
        wanted = self._limit if size is None or size < 0 else min(size, self._limit)
        return super().read(wanted)


def parse(file: Source) -> Layout | None:
    """The layout of a legacy torch file; None where it is none."""
    if file.size < 32 or _MAGIC_BYTES not in file.read(0, 32):
        return None
    most = file.size // _LEAST_BYTES
    stream = _Reader(file, min(file.size, MAX_PICKLE_BYTES))
    try:
        magic, protocol, _, tree, keys = (read_pickle(stream, file.size, most) for _ in range(5))
    except pickle.UnpicklingError:
        return None
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        return None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        return None
    if len(set(keys)) < len(keys):
        return None  # all tensors of a key would be seen in each of its storages
    types: dict[str, StorageRef] = {}
    for _, node in walk(tree):
        ref = node.storage if isinstance(node, TensorRef) else node
        if isinstance(ref, StorageRef):
            types[ref.key] = ref
    at = stream.tell()
    storages = []
    for key in keys:
        storage = types.get(key)
        if storage is None or at + 8 > file.size:
            return None
        count = int.from_bytes(file.read(at, 8), "little")
        size = count * DTYPES[storage_dtype(storage.type_name)].size
        if at + 8 + size > file.size:
            return None
        storages.append(Storage(key, at + 8, size))
        at += 8 + size
    return Layout("torch-legacy", stored_tensors(storages, tree), tree=tree)
