"""Frames on their way into packs."""

from __future__ import annotations

import time

import pytest

from ckptvcs.encode.exact import SAME
from ckptvcs.encode.frame_writer import PatchWriter
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.ids import ObjectId


class SlowPack:
    """A pack that takes its time, and sees it when two write at once."""

    def __init__(self) -> None:
        self.data, self.busy = bytearray(), False

    def append_region(self, data: bytes | memoryview) -> None:
        assert not self.busy, "two threads write one region"
        self.busy = True
        time.sleep(0.005)
        self.data += data
        self.busy = False

    def abort(self) -> None:
        return


class SlowStore:
    def __init__(self) -> None:
        self.pack = SlowPack()

    def new_pack(self, folder: str) -> SlowPack:
        assert folder == "packs"
        return self.pack


@pytest.mark.parametrize("changed", [1, 5])
def test_slices_that_are_the_same_are_written_after_those_that_wait(changed: int) -> None:
    store = SlowStore()
    writer = PatchWriter(store)  # type: ignore[arg-type]
    for number in range(1, changed + 1):
        writer.append([number], 0, (b"head", bytes([number]) * 9))
    base = (ObjectId("0" * 64), 0)
    info = TensorInfo("w", "F32", (4,), "model", "weight")
    frames = [writer.frame(number, info, base, 1) for number in range(changed + 1)]
    writer.abort()
    wanted = [SAME, *(b"head" + bytes([n]) * 9 for n in range(1, changed + 1))]
    places = [frame.slices[0][:2] for frame in frames]
    assert [bytes(store.pack.data[at : at + length]) for at, length in places] == wanted
