"""Names with every oddity: committed and checked out as they are, and printed without driving the
terminal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptvcs.errors import NotFoundError
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import set_ref
from ckptvcs.repo import Repo
from tests.helpers.command_line import Ckpt
from tests.helpers.profiles import short

NAMES = [
    "e\u0301",
    "\u00e9",
    "\u05d0\u05d1\u05d2",
    "\u202eevil\u202c",
    "\u200bzero",
    "\u200b",
    "\U0001f600\U0001f468\u200d\U0001f469",
    "a\nb",
    "\x1b[31mred",
    "\x07bell",
    "A",
    "a",
    "\ufb01",
    "tab\there",
    "\ufeffbom",
    "x" * 255,
    "\u00fc" * 127,
    "\u2028line",
    "\x7f",
    " lead",
    "trail ",
    "con",
    "..x",
    "-dash",
    "%41",
    "\\back",
    '"q"',
    "\x9b31m",
]
RAW = [b"\xff\xfe", b"caf\xe9", b"x" * 254 + b"\xff"]  # file names that are not UTF-8
DRIVING = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u202e\u202c\u200b\u2028\ufeff"}
DRIVING -= {"\n"}


def test_tensors_of_a_state(repo: Repo) -> None:
    state = {name: torch.randn(3) for name in [*NAMES, "nul\0in", "", "lone\udcff"]}
    repo.commit({"model": state}, step=1)
    back = repo.checkout(1)["model"]
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    for name in ("\x1b[31mred", "e\u0301", "\u00e9"):
        assert torch.equal(repo.tensor(f"model.{name}", at=1), state[name])


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_tensors_of_a_file(kind: str, repo: Repo, tmp_path: Path) -> None:
    tensors = {name: torch.randn(3) for name in [*NAMES, "nul\0in"]}
    path, back = tmp_path / f"model.{kind}", tmp_path / "back"
    (torch.save if kind == "pt" else save_file)(tensors, path)
    made = repo.commit_path(path, message="")
    repo.checkout_files(made.id, back)
    assert back.read_bytes() == path.read_bytes()
    found = {tensor.name for tensor in handle(repo).catalog.schema(made.commit.schema).tensors}
    assert {
        name for name in tensors if len(name) <= 200
    } <= found  # longer ones are cut to be shown


def _walk(folder: bytes) -> dict[bytes, bytes]:
    found = {}
    for base, folders, files in os.walk(folder):
        for name in files:
            path = base + b"/" + name
            below = path[len(folder) :]
            if os.path.islink(path):  # noqa: PTH114  bytes
                found[below] = b"-> " + os.readlink(path)  # noqa: PTH115  bytes
            else:
                found[below] = Path(os.fsdecode(path)).read_bytes()
        found |= {(base + b"/" + name)[len(folder) :]: b"/" for name in folders}
    return found


def test_files_with_odd_names_come_back(repo: Repo, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "many")
    (tmp_path / "many").mkdir()
    for number, name in enumerate([*map(os.fsencode, NAMES), *RAW]):
        Path(os.fsdecode(folder + b"/" + name)).write_text(str(number))
    Path(os.fsdecode(folder + b"/dir\xff")).mkdir()
    Path(os.fsdecode(folder + b"/dir\xff/in\n")).write_text("in")
    Path(os.fsdecode(folder + b"/link\xfe")).symlink_to(os.fsdecode(b"\xff\xfe"))
    made = repo.commit_path(tmp_path / "many", message="")
    repo.checkout_files(made.id, tmp_path / "back")
    assert _walk(os.fsencode(tmp_path / "back")) == _walk(folder)
    assert repo.verify().damage == []


@pytest.mark.parametrize("encoding", short(["utf-8", "ascii"], ["ascii"]))
def test_what_is_printed(encoding: str, ckpt_process: Ckpt, tmp_path: Path) -> None:
    odd = "\x1b[2J\u202e\u200b\x9b\U0001f600\udcff\nnext"
    repo = Repo.init(tmp_path)
    path = tmp_path / os.fsdecode(b"\x1b[31m\xff\xe2\x80\xae.pt")
    torch.save({f"w{odd[:-6]}": torch.ones(3)}, path)
    repo.commit_path(path, message=odd, metrics={f"loss{odd}": 1.0})
    path.unlink()
    for command in (
        ["log"],
        ["log", "--graph"],
        ["show"],
        ["status"],
        ["checkout", "HEAD"],
        ["show", odd],
        ["tag", odd],
        ["branch", odd],
        ["commit", odd],
        ["checkout", "HEAD", "-o", odd],
        ["log", "--json"],
        ["show", "--json"],
    ):
        env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = ckpt_process(*command, code=None, **env)
        assert done.code in (0, 2, 3), done.err
        assert not DRIVING & {*done.out, *done.err}, command
        if command == ["log", "--json"]:
            assert json.loads(done.out)[0]["message"] == odd


def test_names_of_refs(repo: Repo) -> None:
    repo.commit({"w": torch.ones(3)}, step=1)
    for name in [n for n in NAMES if n.isascii() and n.isalnum() and len(n) <= 200]:
        set_ref(handle(repo), "tags", name, repo.resolve(1), "tag")
        assert repo.resolve(name) == repo.resolve(1)
    set_ref(handle(repo), "tags", "A" * 85, repo.resolve(1), "tag")
    with pytest.raises(ValueError, match="cannot name"):
        set_ref(handle(repo), "tags", "A" * 86, repo.resolve(1), "tag")
    for name in ("\udcff", "x" * 300, "A" * 100, "a\0b"):
        with pytest.raises(NotFoundError):
            repo.resolve(name)
    assert {"A", "a"} <= set(handle(repo).refs.names("tags"))
    for name in [n for n in NAMES if not n.isascii()]:
        with pytest.raises(ValueError, match="cannot name"):
            set_ref(handle(repo), "tags", name, repo.resolve(1), "tag")
