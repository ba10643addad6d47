"""Files that are cut off or damaged are refused; what torch wrote, and is not mapped, is not."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from ckptvcs import InvalidInputError, Repo
from ckptvcs.checkpoint.conventions import TORCH_SUFFIXES
from ckptvcs.checkpoint.intact import HINT, require_whole
from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.torch_writer import MemorySource
from tests.helpers.training import train


def saved(**options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(train(1)[0], out, **options)
    return out.getvalue()


def tarred() -> bytes:
    """What torch wrote before 0.2: a tar file of pickles and of storages."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        members = {
            "sys_info": pickle.dumps({}),
            "storages": os.urandom(3000),
            "tensors": os.urandom(100),
            "pickle": pickle.dumps([1]),
        }
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Plus(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def scripted() -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Plus()), out)
    return out.getvalue()


ZIP, LEGACY = saved(), saved(_use_new_zipfile_serialization=False)
TENSORS = save_safetensors({f"w{n}": torch.randn(40, n + 1) for n in range(5)})
PLAIN = pickle.dumps({"epoch": 3, "names": [f"n{k}" for k in range(500)]})
WHOLE = {
    "zip": ZIP,
    "legacy": LEGACY,
    "script": scripted(),
    "tar": tarred(),
    "pickle": PLAIN,
    "old pickle": pickle.dumps([1, {"a": "b"}], protocol=0),
    "none": pickle.dumps(None),
    "large pickle": pickle.dumps(os.urandom(1 << 23)),
}


@pytest.mark.parametrize("suffix", [*TORCH_SUFFIXES, ".PT"])
@pytest.mark.parametrize("kind", WHOLE)
def test_what_torch_or_pickle_wrote_is_taken(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(WHOLE[kind])
    opened = open_checkpoint(path)
    assert (opened.files[0].format == "raw") == (kind not in ("zip", "legacy", "script"))


def lengths(data: bytes) -> list[int]:
    """Where a file may be cut: near its ends, and in between."""
    step = max(1, len(data) // 40)
    return sorted({*range(1, 20), *range(20, len(data), step), *range(len(data) - 25, len(data))})


@pytest.mark.parametrize("suffix", [*TORCH_SUFFIXES, ".PT"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "script", "pickle"])
def test_what_is_cut_off_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    for length in lengths(WHOLE[kind]):
        path.write_bytes(WHOLE[kind][:length])
        with pytest.raises(InvalidInputError) as refused:
            open_checkpoint(path)
        assert str(path) in refused.value.message
        assert refused.value.hint == HINT
        assert open_checkpoint(path, raw=True).size_bytes == length


def test_a_tar_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    data = WHOLE["tar"]
    path = tmp_path / "m.pt"
    for length in range(1, 4000, 177):  # within the second member
        path.write_bytes(data[:length])
        with pytest.raises(InvalidInputError):
            open_checkpoint(path)


def test_safetensors_that_are_cut_off_or_damaged_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    damaged = [TENSORS[:length] for length in lengths(TENSORS)]
    damaged += [
        b"junk\n",
        os.urandom(5000),
        TENSORS[8:],
        b"\0" * 100,
        TENSORS.replace(b"F32", b'F"2'),
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(InvalidInputError) as refused:
            open_checkpoint(path)
        assert refused.value.hint == HINT
    path.write_bytes(TENSORS)
    assert open_checkpoint(path).files[0].format == "safetensors"


@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_junk_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    end_alone = b"PK\x03\x04" + b"\0" * 100 + b"PK\x05\x06" + b"\0" * 18
    for data in (
        b"",
        b"x",
        b"junk\n",
        b"." * 9,
        os.urandom(100_000),
        b"\0" * 4096,
        end_alone,
        ZIP[4:],
        b"\x80\x04junk",
        b"\x80",
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        path.write_bytes(data)
        with pytest.raises(InvalidInputError) as refused:
            open_checkpoint(path)
        assert refused.value.hint == HINT
        assert "\n" not in refused.value.message


def test_a_zip_file_whose_directory_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    start = ZIP.index(b"PK\x01\x02")
    far = bytearray(ZIP)
    far[start + 42 : start + 46] = (len(ZIP) + 9).to_bytes(4, "little")  # a record beyond the end
    for data in (bytes(far), ZIP[: start // 2] + ZIP[start:], ZIP[:start] + ZIP[start + 1 :]):
        path.write_bytes(data)
        with pytest.raises(InvalidInputError):
            open_checkpoint(path)


def directory(root: Path, **files: bytes) -> Path:
    root.mkdir(exist_ok=True)
    for name, data in files.items():
        (root / name.replace("__", ".")).write_bytes(data)
    return root


def test_in_a_directory_only_weights_that_are_cut_are_refused(tmp_path: Path) -> None:
    fine = {
        "model__safetensors": TENSORS,
        "optimizer__pt": ZIP,
        "training_args__bin": PLAIN,
        "tokenizer__bin": os.urandom(3000),
        "vocab__bin": b"junk\n",
        "old__pth": LEGACY,
        "cut_pickle__bin": PLAIN[:-9],
        "letter": b"P",
        "part__zip": ZIP[:2000],
        "note__txt": b"",
    }
    opened = open_checkpoint(directory(tmp_path / "run", **fine))
    assert len(opened.files) == len(fine)
    for name, data in {
        "model__safetensors": TENSORS[:-3],
        "optimizer__pt": ZIP[:-100],
        "model__bin": ZIP[:5000],
        "old__pth": LEGACY[:-50],
        "pytorch_model__bin": LEGACY[: len(LEGACY) // 2],
        "a__ckpt": b"",
        "b__safetensors": b"",
        "c__safetensors": b"junk" * 9,
    }.items():
        folder = directory(tmp_path / "run", **fine | {name: data})
        with pytest.raises(InvalidInputError) as refused:
            open_checkpoint(folder)
        assert name.replace("__", ".") in refused.value.message
        assert open_checkpoint(folder, raw=True).size_bytes
        (folder / name.replace("__", ".")).unlink()


def test_shards_that_are_cut_are_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(  # type: ignore[attr-defined]
            {"w": torch.randn(300, 30)}, checkpoint_id=tmp_path / "run", no_dist=True
        )
    (shard,) = (tmp_path / "run").glob("*.distcp")
    assert open_checkpoint(tmp_path / "run").schema.tensors
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(InvalidInputError, match=r"\.distcp is incomplete"):
        open_checkpoint(tmp_path / "run")


@given(st.binary(max_size=3000), st.sampled_from([*TORCH_SUFFIXES, ".safetensors"]))
def test_any_bytes_are_taken_or_refused(data: bytes, suffix: str) -> None:
    source = MemorySource()
    source.append(data)
    for alone in (False, True):
        try:
            require_whole(source, f"m{suffix}", alone=alone)
        except InvalidInputError as error:
            assert error.hint == HINT  # noqa: PT017  it may be fine, too


def test_any_cut_or_change_is_taken_or_refused() -> None:
    for data in (ZIP, LEGACY, PLAIN, WHOLE["tar"]):
        for at in range(0, len(data), max(1, len(data) // 60)):
            source = MemorySource()
            source.append(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
            try:
                require_whole(source, "m.pt", alone=True)
            except InvalidInputError as error:
                assert error.hint == HINT  # noqa: PT017


@pytest.mark.parametrize("name", ["cut.safetensors", "j.pt", "j.bin", "run"])
def test_commit_refuses_in_one_line_and_takes_raw(
    name: str, tmp_path: Path, make: Callable[[], Repo]
) -> None:
    repo = make()
    path = tmp_path / name
    if name == "run":
        directory(path, model__safetensors=TENSORS[:-3], config__json=b"{}")
    else:
        path.write_bytes(TENSORS[:-100] if "cut" in name else b"junk\n")
    with pytest.raises(InvalidInputError):
        repo.commit_path(path, message="x")
    assert not repo.log()
    made = repo.commit_path(path, message="x", raw=True)
    assert made.commit.exact
    assert {file.format for file in made.commit.files} == {"raw"}
    repo.checkout_files(made.id, tmp_path / "back")
    files = [path] if path.is_file() else sorted(path.iterdir())
    back = [tmp_path / "back"] if path.is_file() else sorted((tmp_path / "back").iterdir())
    assert [one.read_bytes() for one in files] == [one.read_bytes() for one in back]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Repo]:
    return lambda: Repo.init(tmp_path / "repo")


@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_a_zip_file_of_another_program_is_refused(suffix: str, tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / f"m{suffix}"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights.npy", b"x" * 1000)
    with pytest.raises(InvalidInputError, match="a zip file that torch did not write"):
        open_checkpoint(path)
    assert open_checkpoint(path, raw=True).files[0].format == "raw"


@pytest.mark.parametrize("suffix", [".th", ".pyth", ".torch", ".pth.tar", ".pt.tar"])
def test_rare_suffixes_of_torch_are_checked_too(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    for data in (b"junk\n" * 100, LEGACY[: len(LEGACY) // 2], ZIP[:-1]):
        path.write_bytes(data)
        with pytest.raises(InvalidInputError):
            open_checkpoint(path)
    path.write_bytes(ZIP)
    assert open_checkpoint(path).files[0].format == "torch-zip"
