"""Skeletons, the templates of files: make them from a checkpoint, and read their structure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np

from ckptvcs.checkpoint.layout import Source
from ckptvcs.checkpoint.open import Checkpoint, InputFile
from ckptvcs.errors import CorruptionError
from ckptvcs.history.schema import Op, Schema, Segment, Skeleton, dump_skeleton

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class SkeletonSource(Source):
    """A file's bytes with zeros in place of its stored tensors.

    Tensors of the part `rest` are included; `tensor` returns their bytes by number.
    """

    def __init__(self, schema: Schema, skeleton: Skeleton, tensor: Callable[[int], Bytes]) -> None:
        self._schema, self._tensor = schema, tensor
        self._spans: list[tuple[int, int, Op, int, memoryview]] = []
        self._bytes: dict[int, bytes] = {}
        at = 0
        for op, argument, data in skeleton.walk(schema):
            length = 4 if op == Op.CRC32 else len(data)
            if op == Op.TENSOR:
                length = schema.tensors[argument].size_bytes
            self._spans.append((at, at + length, op, argument, data))
            at += length
        self.size = at
        self._starts = [span[0] for span in self._spans]

    def owner(self, offset: int, size: int) -> int:
        """Return the number of the tensor at this offset and size, or -1."""
        at = bisect_right(self._starts, offset) - 1
        start, end, op, argument, _ = self._spans[at]
        here = size and (start, end - start) == (offset, size)
        return argument if here and op in (Op.TENSOR, Op.INLINE) else -1

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise CorruptionError("a skeleton is shorter than the file it describes")
        parts = []
        for at in range(bisect_right(self._starts, offset) - 1, len(self._spans)):
            start, end, op, argument, data = self._spans[at]
            low, high = max(start, offset), min(end, offset + length)
            if low >= high:
                break
            if op == Op.TENSOR and self._schema.tensors[argument].part == "rest":
                data = memoryview(self._plain(argument))
            if op == Op.CRC32 or not len(data):
                parts.append(bytes(high - low))
            else:
                parts.append(bytes(data[low - start : high - start]))
        return b"".join(parts)

    def overwrite(self, offset: int, data: bytes) -> None:
        """Change literal bytes; the literals of the skeleton must be writable."""
        start, end, op, _, literal = self._spans[bisect_right(self._starts, offset) - 1]
        if op == Op.LITERAL and offset + len(data) <= end:
            literal[offset - start :][: len(data)] = data

    def _plain(self, number: int) -> bytes:
        if number not in self._bytes:
            self._bytes[number] = self._tensor(number).tobytes()
        return self._bytes[number]


def skeleton_of(checkpoint: Checkpoint, file: InputFile) -> bytes:
    """Return the skeleton of a file."""
    segments: list[Segment] = []
    literals = bytearray()
    for piece in file.pieces:
        info = None if piece.tensor is None else checkpoint.schema.tensors[piece.tensor]
        if piece.tensor is None or info is None:
            segments.append((Op.LITERAL, piece.size))
            literals += file.source.read(piece.offset, piece.size)
        elif piece.checksum:
            segments.append((Op.CRC32, piece.tensor))
        elif info.inline:
            segments.append((Op.INLINE, piece.tensor))
            literals += file.source.read(piece.offset, piece.size)
        else:
            segments.append((Op.TENSOR, piece.tensor))
    return dump_skeleton(segments, bytes(literals))
