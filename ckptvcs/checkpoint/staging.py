"""Staging: a copy of a state's bytes, at the speed of memory, in room that is used again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptvcs.checkpoint.emit import DeviceBytes
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
        self._pinned = False

    def copies(self, blocks: Sequence[memoryview | DeviceBytes]) -> list[memoryview]:
        """The bytes of each block, which may change from now on; valid until this is called again.

        Raises:
            MemoryError: there is no room.
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
        if size <= self._room.size and pinned <= self._pinned:
            return
        if pinned:
            torch = sys.modules["torch"]
            self._room = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            self._room = np.empty(size, np.uint8)
        self._pinned = pinned


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
