"""Tensors of every type come back as such in Python, and what is said of them is true of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.safetensors import parse
from ckptvcs.decode.part_reader import PartReader, windows
from ckptvcs.errors import InvalidInputError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo

IN_SAFETENSORS = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
]
IN_TORCH = [*IN_SAFETENSORS, "complex32", "complex128", "bits8", "bits16", "bits1x8", "bits2x4"]
IN_OLD_FILES = {
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
}
SHAPES = [(64, 32), (7,), (3, 1), (0, 4), (2, 3, 5)]

needs_types = pytest.mark.skipif(
    not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no 4-bit floats"
)


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits, as far as every bit pattern is a value."""
    dtype: torch.dtype = getattr(torch, name)
    size = torch.empty(0, dtype=dtype).element_size()
    draw = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape)) * size
    data = torch.randint(0, 2 if name == "bool" else 256, (count,), generator=draw)
    flat = torch.empty(0, dtype=dtype).set_(data.to(torch.uint8).untyped_storage())
    return flat.reshape(shape)


def bits(value: torch.Tensor) -> bytes:
    flat = torch.empty(0, dtype=torch.uint8).set_(value.contiguous().untyped_storage())
    return flat.numpy().tobytes()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))


@needs_types
@pytest.mark.parametrize("codec", ["lossless", "near"])
def test_every_type_of_safetensors(codec: str, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo", codec=codec)
    state = {f"{n}.{k}": tensor(n, s) for n in IN_SAFETENSORS for k, s in enumerate(SHAPES)}
    save_file(state, tmp_path / "a.safetensors")
    result = repo.commit_path(tmp_path / "a.safetensors", message="", step=1)
    assert not any("not readable" in note for note in result.notes)
    back = repo.checkout(1)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert same(back[name], value), name
    for name in ("float4_e2m1fn_x2.0", "float8_e8m0fnu.4", "bool.1"):
        assert same(repo.tensor(name, at=1), state[name])
    ((_, trajectory),) = repo.trajectory("*")
    assert all(same(trajectory[name], value) for name, value in state.items())


@needs_types
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("zipped", [True, False])
def test_every_type_of_torch(zipped: bool, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    state = {f"{n}.{k}": tensor(n, s) for n in IN_TORCH for k, s in enumerate(SHAPES)}
    state["window"] = tensor("float4_e2m1fn_x2", (64, 32))[8:16, 4:]
    if not zipped:  # torch does not load others from its older files
        state = {n: t for n, t in state.items() if n.split(".")[0] in IN_OLD_FILES}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    repo.commit_path(tmp_path / "a.pt", message="", step=1)
    back = repo.checkout(1)
    expected = torch.load(tmp_path / "a.pt", weights_only=True)
    for name, value in state.items():
        assert same(back[name], expected[name]), name
        assert back[name].stride() == expected[name].stride()
        assert name.startswith("bits") or value.dtype == back[name].dtype


@needs_types
def test_fp4_of_older_commits_comes_back_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have it as bytes; the file itself says what it is."""
    from ckptvcs.checkpoint import layout

    value = tensor("float4_e2m1fn_x2", (64, 32))
    save_file({"w": value}, tmp_path / "a.safetensors")
    repo = Repo.init(tmp_path / "repo")

    def older(source: Any) -> Any:
        made = parse(source)
        for found in made.tensors if made else ():
            found.dtype, found.shape = "U8", (found.size,)
        return made

    with monkeypatch.context() as patch:
        patch.setattr("ckptvcs.checkpoint.safetensors.parse", older)
        repo.commit_path(tmp_path / "a.safetensors", message="", step=1)
    (info,) = handle(repo).catalog.schema(repo.entry(repo.resolve(1)).commit.schema).tensors
    assert info.dtype == "U8"
    assert same(repo.checkout(1)["w"], value)
    assert layout.INLINE_BYTES >= 2048


def unknown(path: Path, dtype: str, shape: list[int], data: bytes) -> None:
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "F3_E1M1"])
def test_types_that_torch_lacks_are_bytes_and_that_is_said(dtype: str, tmp_path: Path) -> None:
    path, data = tmp_path / "a.safetensors", bytes(range(240)) * 4
    unknown(path, dtype, [4, 320], data)
    repo = Repo.init(tmp_path / "repo")
    (note,) = repo.commit_path(path, message="", step=1).notes
    assert note.startswith(f"a.safetensors: 1 tensor of type {dtype}, which torch lacks")
    assert repo.checkout(1)["w"].numpy().tobytes() == data
    repo.checkout_files(repo.resolve(1), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_pairs_of_fp4_that_cross_rows_are_bytes(tmp_path: Path) -> None:
    unknown(tmp_path / "a.safetensors", "F4", [2, 3], b"abc")
    made = open_checkpoint(tmp_path / "a.safetensors")
    assert (made.schema.tensors[0].dtype, made.schema.tensors[0].shape) == ("U8", (3,))


@needs_types
def test_exports_can_be_read(tmp_path: Path) -> None:
    from safetensors import deserialize

    value = tensor("float4_e2m1fn_x2", (6, 4))
    repo = Repo.init(tmp_path / "repo")
    wide = torch.randn(5, 5, dtype=torch.complex128)
    torch.save({"model": {"four": value, "t": value.T}, "wide": wide}, tmp_path / "a.pt")
    repo.commit_path(tmp_path / "a.pt", message="", step=1)
    reader = PartReader(handle(repo).restorer(repo.resolve(1)))
    rows = reader.named("model")
    reader.save_tensor("four", rows["model.four"], tmp_path / "four.safetensors")
    data = (tmp_path / "four.safetensors").read_bytes()
    ((name, found),) = deserialize(data)  # type: ignore[no-untyped-call]
    assert (name, found["dtype"], found["shape"]) == ("four", "F4", [6, 8])
    assert bytes(found["data"]) == bits(value)
    reader.save_tensor("four", rows["model.four"], tmp_path / "four.pt")
    assert same(torch.load(tmp_path / "four.pt", weights_only=True), value)
    with pytest.raises(InvalidInputError, match="C128") as refused:
        reader.save_tensor("wide", rows["wide"], tmp_path / "wide.safetensors")
    assert refused.value.hint == "use a file name that ends in .pt"
    assert not (tmp_path / "wide.safetensors").exists()


def test_what_is_said_of_a_tensor_of_a_near_commit_is_true_of_it(tmp_path: Path) -> None:
    repo, draw = Repo.init(tmp_path), torch.Generator().manual_seed(0)
    weight = torch.randn(80, 80, generator=draw)
    states: dict[int, dict[str, Any]] = {}
    frozen = torch.randn(80, 80, generator=draw)
    for step in range(1, 5):
        weight = weight + 0.01 * torch.randn(80, 80, generator=draw)
        states[step] = {
            "model": {
                "w": weight,
                "copy": weight.clone(),
                "frozen": frozen,
                "codes": torch.randint(0, 255, (80, 80), dtype=torch.uint8, generator=draw),
                "small": torch.randn(5, generator=draw),
            },
            "ids": torch.randint(0, 1 << 40, (800,), generator=draw),
        }
        repo.commit(states[step], step=step)
    reader = PartReader(handle(repo).restorer(repo.resolve(2)))
    state = repo.checkout(2)
    told = {name: reader.fidelity(window) for name, window in windows(reader.schema).items()}
    flat = {f"model.{name}": value for name, value in state["model"].items()}
    true = {f"model.{name}": value for name, value in states[2]["model"].items()}
    assert told["model.codes"] == told["model.small"] == "exact"
    for name, form in told.items():
        if name in flat:
            assert (form == "exact") == same(flat[name], true[name]), name
    assert "near" in told.values()
