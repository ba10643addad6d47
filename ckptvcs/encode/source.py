"""Read and hash the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ckptvcs.checkpoint.layout import BLOCK_BYTES, FileSource, changed_while_read
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.roles import LOSSY, WEIGHT
from ckptvcs.codec.dtypes import WEIGHT_DTYPES
from ckptvcs.codec.frame import SLICE_WORDS, slice_size, slices_of
from ckptvcs.codec.kernels import on_torch
from ckptvcs.codec.words import Words, from_float32, octets, to_float32, word_type
from ckptvcs.hashing import hash_of, hasher
from ckptvcs.parallel import Progress, ordered_map, reading


class SourceTensor:
    """A tensor of the checkpoint that is read slice by slice."""

    def __init__(self, checkpoint: Checkpoint, number: int) -> None:
        file, self._offset = checkpoint.places[number]
        self._source = checkpoint.files[file].source
        self.info = checkpoint.schema.tensors[number]

    def _place(self, number: int) -> tuple[int, int]:
        """Return the offset and the length of a slice in its source."""
        word = self.info.type.word
        count = slice_size(self.info.words, number)
        return self._offset + number * SLICE_WORDS * word, count * word

    def slice(self, number: int) -> Words:
        """Return the words of one slice."""
        return np.frombuffer(
            self._source.view(*self._place(number)), word_type(self.info.type.word)
        )

    def slices(self) -> Iterator[Words]:
        """Yield the words of each slice."""
        return map(self.slice, slices_of(self.info.words))

    def on_device(self, number: int) -> Any:
        """Return a slice on its device, as a flat uint8 tensor; None if it is in host memory."""
        return self._source.on_device(*self._place(number))

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

    A state in memory has no file hash. If `stay` is set, tensors that will be encoded on their
    device are not copied to the host: a fingerprint replaces their hash.
    """
    if checkpoint.kind == "state":
        return [None], _scan_state(checkpoint, stay=stay)
    file_hashes: list[str | None] = []
    read = reading(progress)
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
                read(length)
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
            slices = map(tensor.on_device, slices_of(tensor.info.words))
            return hash_of(b"".join(map(on_torch.fingerprint, slices)))
        digest = hasher()
        for words in tensor.slices():
            digest.update(octets(words))
        return digest.digest()

    infos = checkpoint.schema.tensors
    numbers = [n for n, info in enumerate(infos) if not info.inline]
    hashes = ordered_map(hash_tensor, numbers, lambda number: infos[number].words)
    return dict(zip(numbers, hashes, strict=True))


def find_masters(checkpoint: Checkpoint) -> dict[int, int]:
    """Map 16-bit weights to the float32 master weights that they round, by number.

    A master has the shape and name of its copy, apart from the first component of the name, or is
    optimizer state that is paired with the copy.
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
    copies = {}
    for number in weights:
        info = checkpoint.schema.tensors[number]
        if info.dtype in ("BF16", "F16"):
            master = masters.get(number, masters.get((info.name.partition(".")[2], info.shape)))
            if master is not None and _is_rounding(checkpoint, number, master):
                copies[number] = master
    return copies


def _is_rounding(checkpoint: Checkpoint, copy: int, master: int) -> bool:
    near, exact = SourceTensor(checkpoint, copy), SourceTensor(checkpoint, master)
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(from_float32(to_float32(master, "F32"), near.info.dtype), words)
            for master, words in zip(exact.slices(), near.slices(), strict=True)
        )
