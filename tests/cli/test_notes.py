"""What is not understood is said when it is committed, in one line on stderr, with its cost."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptvcs.repo import Repo
from tests.helpers.checkpoints import save_big, trainer_directory
from tests.helpers.command_line import Ckpt
from tests.helpers.training import train

STATE = {"w": torch.arange(60_000.0)}


def saved() -> bytes:
    out = io.BytesIO()
    torch.save(STATE, out)
    return out.getvalue()


def deflated() -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved())) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def unreadable_pickle() -> bytes:
    """All is there, but for one opcode that is none."""
    data = saved()
    at = data.index(b"}q\x00")
    return data[:at] + b"\xfe" + data[at + 1 :]


def half_deflated() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED
            new.writestr(name, old.read(name), compress_type=kind)
    return out.getvalue()


def other_zip() -> bytes:
    out = io.BytesIO()
    np.savez(out, w=np.arange(10_000.0))
    return out.getvalue()


OPAQUE: dict[str, tuple[Callable[[], bytes], str]] = {
    "deflated": (deflated, "not readable as tensors (its records are compressed)"),
    "half deflated": (half_deflated, "(1 of its records are compressed)"),
    "pickle": (unreadable_pickle, "its objects are not readable ("),
    "gzip": (lambda: gzip.compress(saved()), "(it is compressed by gzip)"),
    "bare pickle": (lambda: pickle.dumps(STATE), "(it is a pickle, not a torch.save file)"),
    "another zip": (other_zip, "(it is a zip file without a torch.save pickle)"),
    "npy": (lambda: b"\x93NUMPY" + bytes(5000), "(it is a numpy file)"),
    "text": (lambda: b"hello " * 1000, "(no structure of torch or safetensors was found)"),
}


REFUSED_BY_IMPORT = ("deflated", "another zip")  # as cut off


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        *(("directory", kind) for kind in OPAQUE),
        *(
            (where, kind)
            for where in ("import", "watch")
            for kind in OPAQUE
            if kind not in REFUSED_BY_IMPORT
        ),
    ],
)
def test_a_file_that_is_not_understood(kind: str, where: str, ckpt: Ckpt, tmp_path: Path) -> None:
    make, said = OPAQUE[kind]
    ckpt("init")
    folder = trainer_directory(tmp_path / "run", train(1)[0], 100)
    (folder / "extra.bin").write_bytes(make())
    if where == "directory":
        done = ckpt("commit", folder, "--json")
    elif where == "import":
        done = ckpt("import", tmp_path / "run", "--json")
    else:
        done = ckpt("watch", tmp_path / "run", "--once", "--settle", 0, "--json")
    if where == "watch":
        assert any(said in note for note in done.json["notes"])
        return
    (line,) = [line for line in done.err.splitlines() if "extra.bin" in line]
    assert line.startswith("note: ")
    assert said in line
    assert "stored exactly" in line
    assert any(unit in line for unit in (" kB ", " MB "))
    json.loads(done.out)


@pytest.mark.parametrize("kind", ["deflated", "pickle"])
def test_it_comes_back_all_the_same(kind: str, tmp_path: Path) -> None:
    data = OPAQUE[kind][0]()
    (tmp_path / "a.bin").write_bytes(data)
    repo = Repo.init(tmp_path / "repo")
    made = repo.commit_path(tmp_path / "a.bin", message="", step=1)
    assert len(made.notes) == 1
    repo.checkout_files(made.id, tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == data
    assert repo.checkout(1) == data


def test_what_is_understood_is_not_worth_a_line(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    folder = trainer_directory(tmp_path, train(1)[0], 100)
    (folder / "tokenizer.json").write_text("{}" * 100_000)
    (folder / "empty.dat").touch()
    torch.save(None, folder / "nothing.pt")
    assert "not readable" not in (said := ckpt("commit", folder).err)
    # One line says that the weights are not paired, two explain the first commit.
    assert said.count("\n") == 3


def test_large_files_of_any_name_and_of_none_with_raw(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.gguf").write_bytes(b"GGUF" + bytes(20_000_000))
    done = ckpt("commit", "run")
    assert done.err == (
        "note: model.gguf: not readable as tensors (it is a GGUF file); "
        "20 MB stored exactly, as bytes\n"
    )
    assert ckpt("commit", "run", "--raw").err == ""


def test_other_orders_and_links(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    (tmp_path / "run").mkdir()
    save_big(STATE, tmp_path / "run" / "big.pt")
    torch.save(STATE, tmp_path / "outside.pt")
    (tmp_path / "run" / "link\x1b[2J.pt").symlink_to(tmp_path / "outside.pt")
    lines = ckpt("commit", "run").err.splitlines()
    assert lines[0] == (
        "note: big.pt: big-endian numbers; 240 kB of tensors stored exactly, not near"
    )
    assert lines[1].startswith(
        "note: link\N{REPLACEMENT CHARACTER}[2J.pt: a link that leads out of"
    )
    assert "without its content (24" in lines[1]
    assert len(lines) == 2


def test_cat_and_export_of_big_endian_files(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    save_big({"model": STATE}, tmp_path / "big.pt")
    ckpt("commit", "big.pt", "--step", 1)
    found = ckpt("cat", "1:model.w", "--json").json
    assert found["values"] == STATE["w"].tolist()
    ckpt("export", 1, "out.safetensors")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], STATE["w"])
