"""The compared methods: each stores a sequence of checkpoints and reports sizes and times."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import zstandard

from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.repo import Repo
from scripts.bench.quality import Quality, State, compare


@dataclass
class Kept:
    """Bytes and seconds of each checkpoint with one method."""

    name: str
    stored: list[int] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    checkout_s: list[float] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)

    def later(self, values: list[float] | list[int]) -> float:
        """Return the median over all checkpoints but the first."""
        return statistics.median(values[1:] or values)


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def load(path: Path) -> State:
    """Load a training state."""
    state: State = torch.load(path, weights_only=True, mmap=False)
    return state


def keep_torch(paths: list[Path], scratch: Path) -> Kept:
    """Use torch.save with an fsync, and torch.load with a warm page cache."""
    kept = Kept("torch.save")
    target = scratch / "saved.pt"

    def save(state: State) -> None:
        with target.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    for path in paths:
        state = load(path)
        kept.commit_s.append(timed(lambda state=state: save(state)))  # type: ignore[misc]
        kept.stored.append(path.stat().st_size)
        kept.checkout_s.append(timed(lambda: load(target)))
    return kept


def keep_zstd(paths: list[Path], scratch: Path) -> Kept:
    """Compress the file with zstd level 3."""
    kept = Kept("zstd -3")
    target = scratch / "file.zst"

    def pack(path: Path) -> None:
        with target.open("wb") as file:
            file.write(zstandard.ZstdCompressor(level=3).compress(path.read_bytes()))
            file.flush()
            os.fsync(file.fileno())

    def unpack() -> None:
        data = zstandard.ZstdDecompressor().decompress(target.read_bytes())
        (scratch / "back.pt").write_bytes(data)

    for path in paths:
        kept.commit_s.append(timed(lambda path=path: pack(path)))  # type: ignore[misc]
        kept.stored.append(target.stat().st_size)
        kept.checkout_s.append(timed(unpack))
    return kept


def keep_zipnn(paths: list[Path]) -> Kept | None:
    """Compress the XOR of each float32 tensor with its predecessor by ZipNN."""
    try:
        from zipnn import ZipNN  # noqa: PLC0415  an extra
    except ImportError:
        return None
    kept = Kept("ZipNN over XOR")
    before: dict[str, np.ndarray[tuple[int], np.dtype[np.uint32]]] = {}
    for path in paths:
        checkpoint = open_checkpoint(path)
        source = checkpoint.files[0].source
        packed_bytes, raw, now = 0, 0, {}
        started = time.perf_counter()
        for info, (_, offset) in zip(checkpoint.schema.tensors, checkpoint.places, strict=True):
            if info.dtype == "F32" and not info.inline:
                words = np.frombuffer(source.read(offset, info.size_bytes), np.uint32)
                now[info.name] = words
                data = words ^ before[info.name] if info.name in before else words
                packer = ZipNN(bytearray_dtype="float32", input_format="byte")
                packed_bytes += len(packer.compress(bytearray(data.tobytes())))
                raw += info.size_bytes
        kept.commit_s.append(time.perf_counter() - started)
        kept.stored.append(packed_bytes + path.stat().st_size - raw)
        before = now
    return kept


def keep_ckpt(paths: list[Path], scratch: Path, codec: str) -> Kept:
    """Commit each checkpoint, check it out, and measure its quality."""
    kept = Kept(f"ckpt {codec}")
    repo = Repo.init(scratch / codec.replace(":", "-"))
    repo.configure("keep-exact", "0")  # measure without exact patches
    target = scratch / "back.pt"
    base: State | None = None
    true: State = {}
    for path in paths:
        started = time.perf_counter()
        result = repo.commit_path(path, message=path.stem, codec=codec)
        kept.commit_s.append(time.perf_counter() - started)
        kept.stored.append(result.stored_bytes)
        kept.checkout_s.append(
            timed(lambda name=result.id: repo.checkout_files(name, target, force=True))  # type: ignore[misc]
        )
        restored, parent, true = load(target), true, load(path)
        if base is not None:
            kept.quality.append(compare(true, restored, base, parent))
        base = restored
    return kept
