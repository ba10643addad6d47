"""A copy of a state in shared memory, and what another process is sent to read it.

Staging   room for the bytes of a state; it is used again, since new memory costs more than copying
StateMessage    a checkpoint whose tensors are (start, length) in that room; all else is copied
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptvcs.checkpoint.layout import Piece
from ckptvcs.checkpoint.open import Checkpoint, InputFile
from ckptvcs.checkpoint.torch_writer import DeviceBytes, MemorySource
from ckptvcs.parallel import ordered_map

_ALIGNED = 64  # bytes
_BLOCK = 1 << 24

Bytes = NDArray[np.uint8]


class Staging:
    """Room for one state.  It grows to what is asked for and stays: to be given new memory costs
    several times what copying does.
    """

    def __init__(self) -> None:
        self._room: Bytes = np.empty(0, np.uint8)
        self._memory: mmap.mmap | None = None
        self._file, self.pinned = -1, False
        self._close: Callable[[], object] = int

    def handle(self) -> tuple[int, int]:
        """What another process needs to see the room: a file descriptor, and how large it is.

        Raises:
            OSError: there is no room.
        """
        self._make(_ALIGNED, pinned=False)
        return self._file, self._room.size

    @property
    def memory(self) -> memoryview:
        """The room as this process sees it."""
        return self._room.data

    def place(self, block: memoryview | DeviceBytes) -> int | None:
        """Where in the room a block is, if it is one of the copies."""
        if isinstance(block, DeviceBytes) or not len(block) or not self._room.size:
            return None
        start = np.frombuffer(block, np.uint8).ctypes.data - self._room.ctypes.data
        return start if 0 <= start < self._room.size else None

    def copies(self, blocks: Sequence[memoryview | DeviceBytes]) -> list[memoryview]:
        """The bytes of each block, which may change from now on; valid until this is called again.

        Raises:
            MemoryError, OSError: there is no room.
        """
        starts, end = [], 0
        for block in blocks:
            starts.append(end)
            end += -(-len(block) // _ALIGNED) * _ALIGNED
        self._make(end, pinned=any(isinstance(block, DeviceBytes) for block in blocks))
        rooms = [self._room[a : a + len(b)] for a, b in zip(starts, blocks, strict=True)]
        far = [(r, b) for r, b in zip(rooms, blocks, strict=True) if isinstance(b, DeviceBytes)]
        near = [(r, b) for r, b in zip(rooms, blocks, strict=True) if isinstance(b, memoryview)]
        devices = {_send(room, block) for room, block in far}
        for _ in ordered_map(_copy, _cut(near)):  # while those of devices are under way
            pass
        for device in devices:
            sys.modules["torch"].cuda.current_stream(device).synchronize()
        return [room.data for room in rooms]

    def _make(self, size: int, *, pinned: bool) -> None:
        if size > self._room.size:
            self._let_go()  # first: there may be no room for both
            file = _shared_file(size)
            self._close = weakref.finalize(self, os.close, file)
            self._memory = mmap.mmap(file, size)
            self._room, self._file = np.frombuffer(self._memory, np.uint8), file
        if pinned and not self.pinned and self._memory is not None:
            _pin(self._room, self._memory)
            self.pinned = True

    def _let_go(self) -> None:
        """Have no room any more; whoever still reads the old one keeps it."""
        self._close()
        self._close, self._file, self.pinned = int, -1, False
        self._memory, self._room = None, np.empty(0, np.uint8)


def _shared_file(size: int) -> int:
    """A descriptor of a file without a name: in memory, or on a disk where the system has no other.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("ckpt")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    try:
        os.ftruncate(file, size)
        if not hasattr(os, "memfd_create") and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)  # a full disk would kill whoever writes to the map
    except BaseException:
        os.close(file)
        raise
    return file


def _pin(room: Bytes, memory: mmap.mmap) -> None:
    """Let devices copy there by themselves until it is let go; without it they are slower."""
    runtime = sys.modules["torch"].cuda.cudart()
    start = room.ctypes.data
    if int(runtime.cudaHostRegister(start, room.size, 0)) == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, start)


def _send(room: Bytes, block: DeviceBytes) -> Any:
    """Begin to copy what is on a device: which one."""
    sys.modules["torch"].from_numpy(room).copy_(block.flat, non_blocking=True)
    return block.flat.device


def _cut(pairs: list[tuple[Bytes, memoryview]]) -> Iterator[tuple[Bytes, Bytes]]:
    for room, block in pairs:
        source = np.frombuffer(block, np.uint8)
        for at in range(0, len(source), _BLOCK):
            yield room[at : at + _BLOCK], source[at : at + _BLOCK]


def _copy(pair: tuple[Bytes, Bytes]) -> None:
    np.copyto(*pair)


@dataclass(frozen=True)
class StateMessage:
    """A checkpoint of one file, whose blocks are bytes, or (start, length) in a room."""

    checkpoint: Checkpoint
    path: str
    format: str
    pieces: tuple[Piece, ...]
    blocks: tuple[bytes | tuple[int, int], ...]


def pack(checkpoint: Checkpoint, staging: Staging) -> StateMessage:
    """A state to be sent; its tensors stay where they are in the room of `staging`."""
    (file,) = checkpoint.files
    assert isinstance(file.source, MemorySource)
    blocks: list[bytes | tuple[int, int]] = []
    for block in file.source.blocks:
        assert not isinstance(block, DeviceBytes)  # all of these were copied
        start = staging.place(block)
        blocks.append(bytes(block) if start is None else (start, len(block)))
    bare = replace(checkpoint, files=())
    return StateMessage(bare, file.path, file.format, file.pieces, tuple(blocks))


def unpack(parcel: StateMessage, room: memoryview) -> Checkpoint:
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
