"""A copy of a state in shared memory, and the message by which another process reads it.

Staging         shared memory for the bytes of a state; reused, since new memory costs more than
                copying
StateMessage    a checkpoint whose tensors are (start, length) in that memory; it holds a copy of
                everything else
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

_ALIGNMENT = 64  # bytes
_BLOCK = 1 << 24

Bytes = NDArray[np.uint8]


class Staging:
    """Shared memory for one state.

    It grows to the largest state and is kept: new memory costs several times as much as copying.
    """

    def __init__(self) -> None:
        self._bytes: Bytes = np.empty(0, np.uint8)
        self._memory: mmap.mmap | None = None
        self._file, self.pinned = -1, False
        self._close: Callable[[], object] = int

    def handle(self) -> tuple[int, int]:
        """Return a file descriptor of the memory, and its size in bytes.

        Raises:
            OSError: The system has no memory left.
        """
        self._reserve(_ALIGNMENT, pinned=False)
        return self._file, self._bytes.size

    @property
    def memory(self) -> memoryview:
        """The memory as this process sees it."""
        return self._bytes.data

    def place(self, block: memoryview | DeviceBytes) -> int | None:
        """Return the offset of a block in the memory; None if it is not a copy."""
        if isinstance(block, DeviceBytes) or not len(block) or not self._bytes.size:
            return None
        start = np.frombuffer(block, np.uint8).ctypes.data - self._bytes.ctypes.data
        return start if 0 <= start < self._bytes.size else None

    def copies(self, blocks: Sequence[memoryview | DeviceBytes]) -> list[memoryview]:
        """Return a copy of each block; the copies are valid until the next call.

        Raises:
            MemoryError, OSError: The system has no memory left.
        """
        starts, end = [], 0
        for block in blocks:
            starts.append(end)
            end += -(-len(block) // _ALIGNMENT) * _ALIGNMENT
        self._reserve(end, pinned=any(isinstance(block, DeviceBytes) for block in blocks))
        targets = [self._bytes[a : a + len(b)] for a, b in zip(starts, blocks, strict=True)]
        pairs = list(zip(targets, blocks, strict=True))
        devices = {_send(target, b) for target, b in pairs if isinstance(b, DeviceBytes)}
        host = [(target, b) for target, b in pairs if isinstance(b, memoryview)]
        for _ in ordered_map(_copy, _cut(host)):  # meanwhile the devices copy, too
            pass
        for device in devices:
            sys.modules["torch"].cuda.current_stream(device).synchronize()
        return [target.data for target in targets]

    def _reserve(self, size: int, *, pinned: bool) -> None:
        if size > self._bytes.size:
            self._free()  # before the allocation: memory may not suffice for both
            file = _shared_file(size)
            self._close = weakref.finalize(self, os.close, file)
            self._memory = mmap.mmap(file, size)
            self._bytes, self._file = np.frombuffer(self._memory, np.uint8), file
        if pinned and not self.pinned and self._memory is not None:
            _pin(self._bytes, self._memory)
            self.pinned = True

    def _free(self) -> None:
        """Give up the memory; the system frees it after its last reader."""
        self._close()
        self._close, self._file, self.pinned = int, -1, False
        self._memory, self._bytes = None, np.empty(0, np.uint8)


def _shared_file(size: int) -> int:
    """Return a descriptor of a file without a name, in memory; on disk if the system has no memfd.

    Raises:
        OSError: Memory or disk is full.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("ckpt")
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    try:
        os.ftruncate(file, size)
        if not hasattr(os, "memfd_create") and hasattr(os, "posix_fallocate"):
            # Without this, a write to the map kills the process if the disk is full.
            os.posix_fallocate(file, 0, size)
    except BaseException:
        os.close(file)
        raise
    return file


def _pin(target: Bytes, memory: mmap.mmap) -> None:
    """Pin the memory, so that devices copy to it faster, until it is freed."""
    runtime = sys.modules["torch"].cuda.cudart()
    start = target.ctypes.data
    if int(runtime.cudaHostRegister(start, target.size, 0)) == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, start)


def _send(target: Bytes, block: DeviceBytes) -> Any:
    """Begin to copy a block of a device, and return the device."""
    sys.modules["torch"].from_numpy(target).copy_(block.flat, non_blocking=True)
    return block.flat.device


def _cut(pairs: list[tuple[Bytes, memoryview]]) -> Iterator[tuple[Bytes, Bytes]]:
    for target, block in pairs:
        source = np.frombuffer(block, np.uint8)
        for at in range(0, len(source), _BLOCK):
            yield target[at : at + _BLOCK], source[at : at + _BLOCK]


def _copy(pair: tuple[Bytes, Bytes]) -> None:
    np.copyto(*pair)


@dataclass(frozen=True)
class StateMessage:
    """A checkpoint of one file; each block is bytes, or (start, length) in shared memory."""

    checkpoint: Checkpoint
    path: str
    format: str
    pieces: tuple[Piece, ...]
    blocks: tuple[bytes | tuple[int, int], ...]


def pack(checkpoint: Checkpoint, staging: Staging) -> StateMessage:
    """Return the message for a state whose tensors are in `staging`."""
    (file,) = checkpoint.files
    assert isinstance(file.source, MemorySource)
    blocks: list[bytes | tuple[int, int]] = []
    for block in file.source.blocks:
        assert not isinstance(block, DeviceBytes)  # `Staging.copies` has copied these
        start = staging.place(block)
        blocks.append(bytes(block) if start is None else (start, len(block)))
    bare = replace(checkpoint, files=())
    return StateMessage(bare, file.path, file.format, file.pieces, tuple(blocks))


def unpack(message: StateMessage, memory: memoryview) -> Checkpoint:
    """Return the state of a message; its tensors are views of `memory`.

    Raises:
        ValueError: `memory` is smaller than the state.
    """
    source = MemorySource()
    for block in message.blocks:
        if isinstance(block, bytes):
            source.append(block)
            continue
        start, length = block
        if start + length > len(memory):
            raise ValueError(f"shared memory of {len(memory)} bytes ends before a block at {start}")
        source.append(memory[start : start + length])
    file = InputFile(message.path, source, message.format, message.pieces)
    return replace(message.checkpoint, files=(file,))
