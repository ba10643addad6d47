"""Keep a sample of the errors of near weights, by which the next commit measures its movement.

A commit is encoded against the near form W' of its parent, but it moved from the original W.  Their
difference is known while the parent is encoded, and only as long as its exact patch exists.  So a
sample of W' - W is kept beside the cached base:

    cache/errors/<id of the hash table>     a hash, then float32 errors of the weights in order

The folder may be deleted at any time.  Without a sample, `near_plan` subtracts energies.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.codec.frame import slice_size, slices_of
from ckptvcs.codec.sections import sample
from ckptvcs.codec.words import Floats, Words, octets, to_float32
from ckptvcs.decode.base_cache import MemoryBase, has_room
from ckptvcs.hashing import hash_of
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.disk import read_small
from ckptvcs.store.ids import ObjectId

FOLDER = "errors"  # beside the cached bases

_SHARE = 128  # words for each sampled one
_LEAST, _MOST = 256, 4096  # sampled words of a tensor
_SLICES = 4  # sampled slices of a tensor
_KEPT = 2  # samples on disk, as many as cached bases
_HASH_BYTES = 32


def sampled(words: int) -> tuple[Sequence[int], int]:
    """Return the sampled slices of a tensor of `words` words, and the sampled words of each."""
    numbers = slices_of(words)
    picked = numbers[:: max(1, len(numbers) // _SLICES)][:_SLICES]
    size = min(max(words // _SHARE, _LEAST), _MOST)
    return picked, size // max(1, len(picked))


def _length(words: int) -> int:
    picked, size = sampled(words)
    return sum(min(size, slice_size(words, number)) for number in picked)


class ErrorSample:
    """Collects the sample of a commit; a weight without errors gets none."""

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        """`infos` are the stored tensors of the part `model`."""
        self._infos = infos
        self._found: dict[int, dict[int, Floats]] = {}

    def add(self, position: int, number: int, near: Words, exact: Words, dtype: str) -> None:
        """Take the errors of one slice of a weight."""
        picked, size = sampled(self._infos[position].words)
        if number in picked:
            with np.errstate(over="ignore", invalid="ignore"):
                errors = to_float32(sample(near, size), dtype) - to_float32(
                    sample(exact, size), dtype
                )
            self._found.setdefault(position, {})[number] = errors

    def keep(self, folder: Path, memory: MemoryBase | None, values: ObjectId) -> None:
        """Keep the sample for the next commit, in memory if the base is there."""
        rows = {position: _joined(slices) for position, slices in self._found.items()}
        if memory is not None:
            memory.errors = {self._infos[at].name: row for at, row in rows.items()}
            return
        lengths = _lengths(self._infos)
        data = np.concatenate(
            [np.zeros(0, np.float32)]
            + [rows.get(at, np.zeros(length, np.float32)) for at, length in lengths.items()]
        )
        with contextlib.suppress(OSError):  # the next commit does without it
            folder.mkdir(parents=True, exist_ok=True)
            if has_room(folder, data.nbytes):
                _write(folder, values, data)


def _joined(slices: Mapping[int, Floats]) -> Floats:
    return np.concatenate([slices[number] for number in sorted(slices)])


def _lengths(infos: Iterable[TensorInfo]) -> dict[int, int]:
    """Return the number of sampled words of each weight by position."""
    weights = ((at, info) for at, info in enumerate(infos) if info.role == WEIGHT)
    return {at: _length(info.words) for at, info in weights}


def _write(folder: Path, values: ObjectId, data: Floats) -> None:
    temporary = folder / f".{os.urandom(8).hex()}"
    try:
        temporary.write_bytes(hash_of(octets(data)) + octets(data))
        temporary.rename(folder / values)
    finally:
        temporary.unlink(missing_ok=True)
    kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in kept[_KEPT:]:
        path.unlink(missing_ok=True)


def read_sample(
    folder: Path, memory: MemoryBase | None, values: ObjectId, infos: Sequence[TensorInfo]
) -> dict[int, Floats]:
    """Return the sampled errors of the weights of a hash table by position, as far as known."""
    if memory is not None and memory.values == values:
        return {
            at: memory.errors[info.name]
            for at, info in enumerate(infos)
            if info.name in memory.errors
        }
    lengths = _lengths(infos)
    size = 4 * sum(lengths.values())
    try:
        data = read_small(folder / values, _HASH_BYTES + size)
    except (OSError, ValueError):
        return {}
    content = data[_HASH_BYTES:]
    if len(content) != size or hash_of(content) != data[:_HASH_BYTES]:
        return {}
    ends = np.cumsum([*lengths.values()], dtype=np.int64)
    rows = np.split(np.frombuffer(content, np.float32), ends[:-1]) if lengths else []
    return dict(zip(lengths, rows, strict=True))
