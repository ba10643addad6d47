"""The tensors of a checkpoint as they are read for coding, and their hashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

from ckptvcs.checkpoint.checkpoint import Checkpoint
from ckptvcs.checkpoint.layout import BLOCK_BYTES, FileSource, changed_while_read
from ckptvcs.codec.frame import SLICE_WORDS, slice_counts
from ckptvcs.codec.words import Words, octets, word_type
from ckptvcs.parallel import ordered_map

Progress = Callable[[int], None]
"""Called with a number of bytes that have been dealt with."""


class SourceTensor:
    """A tensor of the checkpoint, read slice by slice."""

    def __init__(self, checkpoint: Checkpoint, number: int) -> None:
        file, self._offset = checkpoint.places[number]
        self._source = checkpoint.files[file].source
        self.info = checkpoint.schema.tensors[number]

    def slice(self, number: int) -> Words:
        word = self.info.type.word
        count = slice_counts(self.info.words)[number]
        data = self._source.view(self._offset + number * SLICE_WORDS * word, count * word)
        return np.frombuffer(data, word_type(word))

    @property
    def steady(self) -> bool:
        """Whether it cannot change while it is read: a state in memory is its owner's care."""
        return not isinstance(self._source, FileSource)

    def changed(self) -> Exception:
        path = self._source.path if isinstance(self._source, FileSource) else Path(self.info.name)
        return changed_while_read(path)


def scan(checkpoint: Checkpoint, progress: Progress) -> tuple[list[str | None], dict[int, bytes]]:
    """Hash every file (hex) and every stored tensor (by number) in one pass over the bytes.

    A state is no file and has no hash as a whole.
    """
    if checkpoint.kind == "state":
        return [None], _scan_state(checkpoint)
    file_hashes: list[str | None] = []
    hashes: dict[int, bytes] = {}
    for file in checkpoint.files:
        digest = blake3(max_threads=1)
        for piece in file.pieces:
            stored = piece.tensor is not None and not piece.checksum
            tensor = blake3(max_threads=1)
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
        hashes.setdefault(number, blake3(b"").digest())
    return file_hashes, hashes


def _scan_state(checkpoint: Checkpoint) -> dict[int, bytes]:
    def hash_tensor(number: int) -> bytes:
        digest = blake3(max_threads=1)
        tensor = SourceTensor(checkpoint, number)
        for index in range(len(slice_counts(tensor.info.words))):
            digest.update(octets(tensor.slice(index)))
        return digest.digest()

    numbers = [n for n, info in enumerate(checkpoint.schema.tensors) if not info.inline]
    return dict(zip(numbers, ordered_map(hash_tensor, numbers), strict=True))
