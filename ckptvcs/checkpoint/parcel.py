"""A state in shared memory, as it is passed to another process: all but its tensors is copied."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ckptvcs.checkpoint.layout import Piece
from ckptvcs.checkpoint.open import Checkpoint, InputFile
from ckptvcs.checkpoint.staging import Staging
from ckptvcs.checkpoint.torch_writer import DeviceBytes, MemorySource


@dataclass(frozen=True)
class Parcel:
    """A checkpoint of one file, whose blocks are bytes, or (start, length) in a room."""

    checkpoint: Checkpoint
    path: str
    format: str
    pieces: tuple[Piece, ...]
    blocks: tuple[bytes | tuple[int, int], ...]


def pack(checkpoint: Checkpoint, staging: Staging) -> Parcel:
    """A state to be sent; its tensors stay where they are in the room of `staging`."""
    (file,) = checkpoint.files
    assert isinstance(file.source, MemorySource)
    blocks: list[bytes | tuple[int, int]] = []
    for block in file.source.blocks:
        assert not isinstance(block, DeviceBytes)  # all of these were copied
        start = staging.place(block)
        blocks.append(bytes(block) if start is None else (start, len(block)))
    bare = replace(checkpoint, files=())
    return Parcel(bare, file.path, file.format, file.pieces, tuple(blocks))


def unpack(parcel: Parcel, room: memoryview) -> Checkpoint:
    """The state, read where it is.

    Raises:
        ValueError: the room is smaller than what was put there.
    """
    source = MemorySource()
    for block in parcel.blocks:
        if isinstance(block, bytes):
            source.append(block)
            continue
        start, length = block
        if start + length > len(room):
            raise ValueError(f"a copy of {len(room)} bytes lacks those at {start}")
        source.append(room[start : start + length])
    file = InputFile(parcel.path, source, parcel.format, parcel.pieces, 0o644, 0)
    return replace(parcel.checkpoint, files=(file,))
