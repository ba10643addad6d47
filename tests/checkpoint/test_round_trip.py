"""Byte-identical round trips of every kind of file that trainers write."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptvcs.repo import Repo
from tests.helpers.checkpoints import every_dtype, odd_objects, trainer_directory, views
from tests.helpers.training import train

pytestmark = pytest.mark.any_backend

RoundTrip = Callable[[Path], None]


def tied_model() -> dict[str, Any]:
    model = nn.ModuleDict({"wte": nn.Embedding(100, 32), "head": nn.Linear(32, 100, bias=False)})
    model["head"].weight = model["wte"].weight
    return {"model": model.state_dict(), "step": 7}


SAVED: dict[str, Callable[[], Any]] = {
    "training": lambda: train(2)[-1],
    "dtypes": every_dtype,
    "views": views,
    "tied": tied_model,
    "objects": odd_objects,
    "module": lambda: nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40)),
    "lone tensor": lambda: torch.randn(500),
    "nothing": dict,
    "sparse": lambda: {"s": torch.eye(200).to_sparse(), "csr": torch.eye(200).to_sparse_csr()},
    "parameters": lambda: [nn.Parameter(torch.randn(20, 20)), nn.ParameterList([torch.ones(300)])],
    "many": lambda: {f"layer.{i}.weight": torch.randn(140) for i in range(300)},
    "megabytes of pickle": lambda: {"data": np.random.default_rng(1).bytes(1 << 20)},
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}],
    ids=["zip", "legacy", "protocol 5"],
)
def test_torch_files(
    name: str, options: dict[str, Any], tmp_path: Path, round_trip: RoundTrip
) -> None:
    torch.manual_seed(0)
    path = tmp_path / "step.100.ckpt"
    try:
        torch.save(SAVED[name](), path, **options)
    except (pickle.PicklingError, AttributeError, RuntimeError) as error:
        pytest.skip(f"torch does not save this: {error}")
    round_trip(path)


@pytest.mark.parametrize("stem", ["a.b.c", "modèle", "x" * 100, "name with spaces"])
def test_file_names(stem: str, tmp_path: Path, round_trip: RoundTrip) -> None:
    torch.save(train(1)[0], tmp_path / f"{stem}.pt")
    round_trip(tmp_path / f"{stem}.pt")


def test_saved_through_a_buffer(tmp_path: Path, round_trip: RoundTrip) -> None:
    buffer = io.BytesIO()
    torch.save(train(1)[0], buffer)
    (tmp_path / "archive.ckpt").write_bytes(buffer.getvalue())
    round_trip(tmp_path / "archive.ckpt")


def test_other_save_settings(tmp_path: Path, round_trip: RoundTrip) -> None:
    from torch.utils.serialization import config

    torch.save(train(1)[0], tmp_path / "plain.pt", _disable_byteorder_record=True)
    round_trip(tmp_path / "plain.pt")
    config.save.storage_alignment = 4096
    try:
        torch.save(train(1)[0], tmp_path / "aligned.pt")
    finally:
        config.save.storage_alignment = 64
    round_trip(tmp_path / "aligned.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(train(1)[0], tmp_path / "nocrc.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    round_trip(tmp_path / "nocrc.pt")


def test_files_that_only_look_like_checkpoints(tmp_path: Path, round_trip: RoundTrip) -> None:
    buffer = io.BytesIO()
    torch.save(train(1)[0], buffer)
    saved = buffer.getvalue()
    cases = {
        "text.txt": b"hello\n" * 1000,
        "one": b"x",
        "random.dat": os.urandom(300_000),
        "gzipped.pt.gz": gzip.compress(saved),
        "prefixed.pt": b"\x80\x02K\x05." + saved,
        "trailing.pt": saved + b"garbage behind the end",
        "twice.pt": saved + saved,
        "pickle.pkl": pickle.dumps({"a": [1, 2, 3]}),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        round_trip(tmp_path / name)


SAFETENSORS_TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
]


def test_safetensors_come_back_byte_for_byte(tmp_path: Path, round_trip: RoundTrip) -> None:
    tensors = {f"t.{t}": (torch.rand(300) * 3).to(t) for t in SAFETENSORS_TYPES}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.empty(0, 5), "é": torch.ones(3)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "b": "2", "a": "1", "c": '{"x": 1}'})
    round_trip(path)
    save_file({}, path)
    round_trip(path)


def test_safetensors_with_a_type_of_the_future(tmp_path: Path, round_trip: RoundTrip) -> None:
    header = json.dumps({"x": {"dtype": "F3_E1M1", "shape": [8], "data_offsets": [0, 300]}})
    data = struct.pack("<Q", len(header)) + header.encode() + os.urandom(300)
    (tmp_path / "future.safetensors").write_bytes(data)
    round_trip(tmp_path / "future.safetensors")


def test_trainer_directory(tmp_path: Path, round_trip: RoundTrip) -> None:
    folder = trainer_directory(tmp_path, train(1)[0], 500)
    (folder / "nested" / "deeper").mkdir(parents=True)
    (folder / "nested" / "empty.txt").touch()
    (folder / "nothing").mkdir()
    (folder / "latest").symlink_to("nested")
    (folder / "tokenizer.json").write_bytes(os.urandom(600_000))
    (folder / "w\u00e9ird \U0001f600 name").write_text("x")
    round_trip(folder)


def rewritten(saved: bytes, target: Path, order: Callable[[list[str]], list[str]]) -> None:
    """The records of a saved file in another order, by a writer that knows checksums first."""
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(target, "w") as new:
        for name in order(old.namelist()):
            if not name.endswith((".format_version", "serialization_id", ".storage_alignment")):
                new.writestr(name, old.read(name))


@pytest.mark.parametrize("codec", ["lossless", "excp-max"])
def test_zip_files_of_other_writers_and_older_orders(
    codec: str, repo: Repo, tmp_path: Path
) -> None:
    for state in train(3):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path, back = tmp_path / "old.pt", tmp_path / "back.pt"
        rewritten(buffer.getvalue(), path, sorted)
        result = repo.commit_path(path, message="x", codec=codec)
        repo.checkout_files(result.id, back, force=True)
        if result.commit.exact:
            assert back.read_bytes() == path.read_bytes()
        with zipfile.ZipFile(back) as restored:
            assert restored.testzip() is None  # every checksum is right, also of near tensors
        loaded = torch.load(back, weights_only=True)
        assert loaded["step"] == state["step"]
    assert result.commit.exact == (codec == "lossless")


@pytest.mark.parametrize("name", [".ckpt", ".Ckpt", ".CKPT"])
def test_a_folder_of_a_repository_is_left_out_in_any_case(
    name: str, repo: Repo, tmp_path: Path
) -> None:
    """Else it would be committed, and no checkout of it would be allowed."""
    source, target = tmp_path / "checkpoint-1", tmp_path / "out"
    (source / name).mkdir(parents=True)
    (source / name / "note.txt").write_text("mine")
    (source / "config.json").write_text("{}")
    made = repo.commit_path(source, message="")
    repo.checkout_files(made.id, target)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert not repo.verify().damage
