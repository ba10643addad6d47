"""The tensors of a checkpoint as they are read for coding, and their hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ckptvcs.checkpoint.layout import BLOCK_BYTES, FileSource, changed_while_read
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.roles import LOSSY, WEIGHT
from ckptvcs.codec.dtypes import WEIGHT_DTYPES
from ckptvcs.codec.frame import SLICE_WORDS, slice_counts
from ckptvcs.codec.kernels import on_torch
from ckptvcs.codec.words import Words, from_float32, octets, to_float32, word_type
from ckptvcs.hashing import hash_of, hasher
from ckptvcs.parallel import Progress, ordered_map

"""Called with a number of bytes that have been dealt with."""


class SourceTensor:
    """A tensor of the checkpoint that is read slice by slice."""

    def __init__(self, checkpoint: Checkpoint, number: int) -> None:
        file, self._offset = checkpoint.places[number]
        self._source = checkpoint.files[file].source
        self.info = checkpoint.schema.tensors[number]

    def slice(self, number: int) -> Words:
        word = self.info.type.word
        count = slice_counts(self.info.words)[number]
        data = self._source.view(self._offset + number * SLICE_WORDS * word, count * word)
        return np.frombuffer(data, word_type(word))

    def on_device(self, number: int) -> Any:
        """The bytes of a slice as a flat tensor, where they are on a device; else None."""
        word = self.info.type.word
        count = slice_counts(self.info.words)[number]
        return self._source.on_device(self._offset + number * SLICE_WORDS * word, count * word)

    @property
    def steady(self) -> bool:
        """Return whether the source cannot change while it is read, as a state in memory."""
        return not isinstance(self._source, FileSource)

    def changed(self) -> Exception:
        path = self._source.path if isinstance(self._source, FileSource) else Path(self.info.name)
        return changed_while_read(path)


def scan(
    checkpoint: Checkpoint, progress: Progress, *, stay: bool
) -> tuple[list[str | None], dict[int, bytes]]:
    """Hash every file (hex) and every stored tensor (by number) in one pass over the bytes.

    A state is no file and has no hash as a whole.  Tensors on a device that are to `stay` there are
    not moved: a fingerprint stands for their hash.
    """
    if checkpoint.kind == "state":
        return [None], _scan_state(checkpoint, stay=stay)
    file_hashes: list[str | None] = []
    hashes: dict[int, bytes] = {}
    for file in checkpoint.files:
        digest = hasher()
        for piece in file.pieces:
            stored = piece.tensor is not None and not piece.checksum
            tensor = hasher()
            for at in range(piece.offset, piece.offset + piece.size, BLOCK_BYTES):
                length = min(BLOCK_BYTES, piece.offset + piece.size - at)
                block = file.source.read(at, length)
                digest.update(block)
                if stored:
                    tensor.update(block)
            if stored and piece.tensor is not None:
                hashes[piece.tensor] = tensor.digest()
            progress(0)
        file_hashes.append(digest.hexdigest())
    for number in range(len(checkpoint.schema.tensors)):
        hashes.setdefault(number, hash_of(b""))
    return file_hashes, hashes


def stays(checkpoint: Checkpoint, number: int) -> bool:
    """Return whether a tensor is on a device and will be encoded there."""
    info = checkpoint.schema.tensors[number]
    lossy = info.role in LOSSY and info.dtype in WEIGHT_DTYPES and info.words > 0
    return lossy and SourceTensor(checkpoint, number).on_device(0) is not None


def _scan_state(checkpoint: Checkpoint, *, stay: bool) -> dict[int, bytes]:
    def hash_tensor(number: int) -> bytes:
        tensor = SourceTensor(checkpoint, number)
        if stay and stays(checkpoint, number):
            slices = range(len(slice_counts(tensor.info.words)))
            marks = [on_torch.fingerprint(tensor.on_device(index)) for index in slices]
            return hash_of(b"".join(marks))
        digest = hasher()
        for index in range(len(slice_counts(tensor.info.words))):
            digest.update(octets(tensor.slice(index)))
        return digest.digest()

    numbers = [n for n, info in enumerate(checkpoint.schema.tensors) if not info.inline]
    return dict(zip(numbers, ordered_map(hash_tensor, numbers), strict=True))


def find_masters(checkpoint: Checkpoint) -> dict[int, int]:
    """16-bit weights that are the rounding of float32 weights of the checkpoint -> these, by
    position in the schema.

    A master has the shape of its copy and, but for the first steps, its name; or it is state of the
    optimizer that is paired with it.
    """
    masters: dict[object, int] = {}
    weights = [
        n
        for n, info in enumerate(checkpoint.schema.tensors)
        if info.role == WEIGHT and info.part == "model" and not info.inline
    ]
    for number in weights:
        info = checkpoint.schema.tensors[number]
        if info.dtype == "F32":
            key = info.pair if info.pair is not None else (info.name.partition(".")[2], info.shape)
            masters.setdefault(key, number)
    found = {}
    for number in weights:
        info = checkpoint.schema.tensors[number]
        if info.dtype in ("BF16", "F16"):
            master = masters.get(number, masters.get((info.name.partition(".")[2], info.shape)))
            if master is not None and _is_rounding(checkpoint, number, master):
                found[number] = master
    return found


def _is_rounding(checkpoint: Checkpoint, copy: int, master: int) -> bool:
    near, exact = SourceTensor(checkpoint, copy), SourceTensor(checkpoint, master)
    for index in range(len(slice_counts(near.info.words))):
        values = to_float32(exact.slice(index), "F32")
        with np.errstate(over="ignore"):
            if not np.array_equal(from_float32(values, near.info.dtype), near.slice(index)):
                return False
    return True
