"""More than 4 GiB in one tensor and behind one offset; a hundred thousand tensors in one file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from ckptvcs.ops.checkout import hash_file
from ckptvcs.repo import Repo

GiB = 1 << 30
MANY = 100_000


@pytest.fixture(autouse=True)
def compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have them for what is that large."""
    monkeypatch.setenv("CKPT_COMPILED", "")


def sparse(path: Path) -> None:
    """A file of a tensor of 4 GiB and a bit, and of another behind it; zeros but for a few."""
    large, small = 4 * GiB + 4096, 4000
    header = json.dumps(
        {
            "large": {"dtype": "F32", "shape": [large // 4], "data_offsets": [0, large]},
            "small": {
                "dtype": "F32",
                "shape": [small // 4],
                "data_offsets": [large, large + small],
            },
        }
    ).encode()
    draw = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        start = file.tell()
        for at in (0, 4 * GiB - 2000, 4 * GiB + 2000, large):
            file.seek(start + at)
            values = draw.standard_normal(500 if at != large else small // 4, np.float32)
            file.write(values.tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["lossless", "near", "raw"])
def test_more_than_4_gib(codec: str, cut_folder: Path) -> None:
    path, back = cut_folder / "model.safetensors", cut_folder / "back"
    sparse(path)
    repo = Repo.init(cut_folder / "repo")
    made = repo.commit_path(
        path, message="", codec=None if codec == "raw" else codec, raw=codec == "raw"
    )
    repo.checkout_files(made.id, back)
    assert hash_file(back) == hash_file(path)
    if codec == "lossless":
        back.unlink()
        tensor = repo.tensor("large", at=made.id)
        with path.open("rb") as file:
            header = struct.unpack("<Q", file.read(8))[0]
            file.seek(8 + header + 4 * GiB - 2000)
            assert tensor[GiB - 500 : GiB].numpy().tobytes() == file.read(2000)


def many(path: Path, count: int, shape: list[int]) -> bytes:
    size = 4 * int(np.prod(shape))
    header = json.dumps(
        {
            f"block.{number}.weight": {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [number * size, (number + 1) * size],
            }
            for number in range(count)
        }
    ).encode()
    data = np.random.default_rng(0).standard_normal(count * size // 4, np.float32).tobytes()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return data


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["lossless", "near"])
def test_a_hundred_thousand_tensors(codec: str, cut_folder: Path) -> None:
    path, back = cut_folder / "model.safetensors", cut_folder / "back"
    data = many(path, MANY, [4])
    repo = Repo.init(cut_folder / "repo")
    made = repo.commit_path(path, message="", codec=codec)
    repo.checkout_files(made.id, back)
    assert back.read_bytes() == path.read_bytes()
    tensor = repo.tensor("block.77777.weight", at=made.id)
    assert tensor.shape == (4,)
    if codec == "lossless":
        assert tensor.numpy().tobytes() == data[77777 * 16 : 77778 * 16]


@pytest.mark.slow
def test_two_hundred_thousand_empty_tensors(cut_folder: Path) -> None:
    path, back = cut_folder / "model.safetensors", cut_folder / "back"
    many(path, 2 * MANY, [0])
    repo = Repo.init(cut_folder / "repo")
    made = repo.commit_path(path, message="")
    repo.checkout_files(made.id, back)
    assert back.read_bytes() == path.read_bytes()
