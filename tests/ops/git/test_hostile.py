"""What a hostile clone holds is neither executed nor believed, and takes little time and memory."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path

import pytest

from ckptvcs import CodeState, Repo
from ckptvcs.ops.git.difference import difference
from ckptvcs.ops.git.head import find_clone
from ckptvcs.ops.git.ignore import Ignored
from ckptvcs.ops.git.objects import MAX_BYTES, Objects, UnreadableError
from ckptvcs.ops.git.state import read_code
from tests.helpers.git import git


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    (folder / "b").mkdir(parents=True)
    git(folder, "init", "-q")
    for name in ("a.py", "b/c.py"):
        (folder / name).write_text(f"{name}\n" * 30)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    return folder


def state(folder: Path) -> CodeState:
    found = find_clone(folder)
    assert found is not None
    return read_code(found, diff=True)


TRAPS = {
    "fsmonitor": "[core]\n\tfsmonitor = {trap}\n",
    "hooks": "[core]\n\thooksPath = {folder}\n",
    "pager": "[core]\n\tpager = {trap}\n[pager]\n\tdiff = {trap}\n\tstatus = {trap}\n",
    "external diff": "[diff]\n\texternal = {trap}\n",
    "driver": '[diff "x"]\n\tcommand = {trap}\n',
    "textconv": '[diff "x"]\n\ttextconv = {trap}\n',
    "clean": '[filter "x"]\n\tclean = {trap}\n\trequired = true\n',
    "smudge": '[filter "x"]\n\tsmudge = {trap}\n',
    "process": '[filter "x"]\n\tprocess = {trap}\n',
    "alias": "[alias]\n\tstatus = !{trap}\n\tdiff = !{trap}\n\trev-parse = !{trap}\n",
    "credentials": "[credential]\n\thelper = !{trap}\n[core]\n\taskPass = {trap}\n",
    "a remote": '[extensions]\n\tpartialClone = o\n[remote "o"]\n\turl = ext::{trap}\n'
    "\tpromisor = true\n\tuploadpack = {trap}\n[protocol]\n\tallow = always\n",
    "ssh": '[core]\n\tsshCommand = {trap}\n[remote "o"]\n\turl = ssh://x/y\n\tpromisor = true\n',
    "an include": "[include]\n\tpath = {folder}/more\n",
}
GIT_FALLS_FOR = {
    "fsmonitor": ["status"],
    "hooks": ["status"],
    "external diff": ["diff"],
    "driver": ["diff"],
    "textconv": ["diff"],
    "clean": ["diff"],
    "process": ["diff"],
    "an include": ["status"],
}
"""The traps that git steps into with this command; the others need a terminal or a network."""


@pytest.mark.parametrize("kind", TRAPS)
def test_nothing_is_executed(kind: str, clone: Path, tmp_path: Path) -> None:
    proof, hooks = tmp_path / "executed", tmp_path / "hooks"
    hooks.mkdir()
    (clone / ".gitattributes").write_text("* diff=x filter=x\n")
    git(clone, "add", ".gitattributes")
    git(clone, "commit", "-qm", "attributes")
    trap = tmp_path / "trap"
    for path in (trap, *(hooks / name for name in ("post-index-change", "fsmonitor-watchman"))):
        path.write_text(f"#!/bin/sh\necho \"$0 $*\" >> '{proof}'\n")
        path.chmod(0o755)
    (hooks / "more").write_text(f"[core]\n\tfsmonitor = {trap}\n")
    with (clone / ".git" / "config").open("a") as config:
        config.write(TRAPS[kind].format(trap=trap, folder=hooks))
    (clone / "a.py").write_text("changed\n")
    os.utime(clone / "b" / "c.py", (1, 1))  # would be compared again, through the filter
    (clone / ".git" / "objects" / "aa").mkdir(exist_ok=True)
    found = state(clone)
    assert found.changed == ("a.py",)
    assert "+changed" in (found.diff or "")
    made = Repo.init(tmp_path / "repo")
    made.configure("provenance", "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        made.commit({"x": 1})
    assert made.provenance() is not None
    assert not proof.exists()
    if kind in GIT_FALLS_FOR:  # the trap is one
        subprocess.run(
            ["git", *GIT_FALLS_FOR[kind]], cwd=clone, capture_output=True, check=False, timeout=60
        )
        assert proof.exists()


def test_a_missing_object_is_not_fetched(clone: Path, tmp_path: Path) -> None:
    name = git(clone, "rev-parse", "HEAD:a.py")
    (clone / ".git" / "objects" / name[:2] / name[2:]).unlink()
    with (clone / ".git" / "config").open("a") as config:
        config.write(TRAPS["a remote"].format(trap=f"touch {tmp_path}/executed", folder=""))
    (clone / "a.py").write_text("changed\n")
    found = state(clone)
    assert (found.dirty, found.changed, found.diff, found.complete) == (True, ("a.py",), "", False)
    assert not (tmp_path / "executed").exists()


def test_no_file_outside_of_the_clone_is_read(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "c.py").write_text("password\n")
    (tmp_path / "abcdef").write_text("password\n")
    (clone / "b" / "c.py").unlink()
    (clone / "b").rmdir()
    (clone / "b").symlink_to(tmp_path / "secret")  # then b/c.py is a file of the user
    (clone / "a.py").unlink()
    (clone / "a.py").symlink_to(tmp_path / "secret" / "c.py")
    (clone / "z-abcdefg").write_text("")
    git(clone, "add", "-f", "z-abcdefg")
    index = clone / ".git" / "index"
    index.write_bytes(index.read_bytes().replace(b"z-abcdefg", b"../abcdef"))
    found = state(clone)
    assert {"a.py", "b/c.py"} <= set(found.changed)
    assert "password" not in (found.diff or "")


def damaged(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.randrange(1, 4)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)) :]
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("pack", [False, True])
def test_damage_of_any_byte_is_an_answer(pack: bool, clone: Path) -> None:
    for number in range(5):
        (clone / "a.py").write_text(f"{number}\n" * 50)
        git(clone, "commit", "-qam", "y")
    if pack:
        git(clone, "repack", "-adfq")
        git(clone, "prune-packed", "-q")
    (clone / "a.py").write_text("changed\n")
    (clone / "b" / "c.py").write_text("changed\n")
    paths = [clone / ".git" / "index", *(clone / ".git" / "objects").rglob("*")]
    sound = {path: path.read_bytes() for path in paths if path.is_file()}
    draw = random.Random(0)
    for _ in range(300):
        path = draw.choice(sorted(sound))
        damaged(path, draw)
        assert state(clone).commit
        path.unlink()
        path.write_bytes(sound[path])
    assert state(clone).changed == ("a.py", "b/c.py")


def loose(clone: Path, data: bytes) -> str:
    """Put bytes in the place of a loose object; return its id."""
    name = sha1(data, usedforsecurity=False).hexdigest()
    path = clone / ".git" / "objects" / name[:2] / name[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return name


@pytest.mark.parametrize(
    "content",
    [
        b"blob %d\0" % (1 << 60),
        b"blob %d\0" % (MAX_BYTES + 1) + bytes(MAX_BYTES + 1),
        b"blob 5\0abc",
        b"blob x\0abc",
        b"bomb 3\0abc",
        b"blob 3",
        b"",
    ],
)
def test_loose_objects_that_are_none(content: bytes, clone: Path) -> None:
    name = loose(clone, zlib.compress(content))
    with pytest.raises(UnreadableError):
        Objects(clone / ".git", 20).read(bytes.fromhex(name))


def test_a_bomb_takes_no_memory(clone: Path) -> None:
    name = loose(clone, zlib.compress(b"blob 3\0" + bytes(1 << 26)))
    assert Objects(clone / ".git", 20).read(bytes.fromhex(name)) == ("blob", bytes(3))


def packed(clone: Path, *rows: tuple[bytes, bytes]) -> list[bytes]:
    """Write a pack of (head, content); return ids under which its index lists them."""
    data, offsets = b"PACK" + struct.pack(">II", 2, len(rows)), []
    for head, content in rows:
        offsets.append(len(data))
        data += head + zlib.compress(content)
    ids = [bytes([number]) * 20 for number in range(1, len(rows) + 1)]
    fanout = [sum(name[0] <= first for name in ids) for first in range(256)]
    index = b"\xfftOc" + struct.pack(">I256I", 2, *fanout) + b"".join(ids)
    index += bytes(4 * len(rows)) + struct.pack(f">{len(rows)}I", *offsets)
    folder = clone / ".git" / "objects" / "pack"
    folder.mkdir(exist_ok=True)
    (folder / "pack-x.idx").write_bytes(index)
    (folder / "pack-x.pack").write_bytes(data)
    return ids


def head(kind: int, size: int) -> bytes:
    out, rest = bytearray([kind << 4 | size & 15]), size >> 4
    while rest:
        out[-1] |= 0x80
        out.append(rest & 0x7F)
        rest >>= 7
    return bytes(out)


BLOB = (head(3, 4), b"base")


@pytest.mark.parametrize(
    "row",
    [
        (head(7, 6) + b"\x02" * 20, b"\x04\x04\x90\x04\0\0"),  # based on itself
        (head(6, 4) + b"\x7f", b"\x04\x04\x90\x04"),  # based on what is before the pack
        (head(6, 4) + b"\x00", b"\x04\x04\x90\x04"),  # based on itself by distance
        (head(7, 4) + b"\x09" * 20, b"\x04\x04\x90\x04"),  # based on nothing
        (head(7, 4) + b"\x01" * 20, b"\x05\x04\x90\x04"),  # a base of another size
        (head(7, 4) + b"\x01" * 20, b"\x04\x09\x90\x04"),  # shorter than it says
        (head(7, 9) + b"\x01" * 20, b"\x04\xff\xff\xff\xff\x0f\x90\x04\x00"),  # huge
        (head(7, 3) + b"\x01" * 20, b"\x04\x01\x7f"),  # cut off
        (head(7, 2) + b"\x01" * 20, b"\x04\xff"),
        (head(7, 1 << 40) + b"\x01" * 20, b"\x04"),
        (head(3, 1 << 40), b"blob"),
        (b"\xff" * 20, b"blob"),
        (head(5, 4), b"what"),
    ],
)
def test_packed_objects_that_are_none(row: tuple[bytes, bytes], clone: Path) -> None:
    base, name = packed(clone, BLOB, row)
    objects = Objects(clone / ".git", 20)
    assert objects.read(base) == ("blob", b"base")
    with pytest.raises(UnreadableError):
        objects.read(name)


def test_a_delta_that_grows_and_grows(clone: Path) -> None:
    copies = b"\x80" * 200_000  # each copies 64 KiB
    size = bytes([0x80 | MAX_BYTES & 0x7F, 0x80 | MAX_BYTES >> 7 & 0x7F, 0x80, MAX_BYTES >> 21])
    delta = b"\x80\x80\x04" + size + copies
    _, name = packed(
        clone, (head(3, 1 << 16), bytes(1 << 16)), (head(7, len(delta)) + b"\x01" * 20, delta)
    )
    with pytest.raises(UnreadableError, match="damaged"):
        Objects(clone / ".git", 20).read(name)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [a_pipe, a_folder, a_device], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["a.py", ".git/index", ".gitignore", ".git/info/exclude"])
def test_what_is_no_file_stops_nothing(
    make: Callable[[Path], None], name: str, clone: Path
) -> None:
    (clone / name).unlink(missing_ok=True)
    make(clone / name)
    found = state(clone)
    assert found.dirty is (None if name == ".git/index" else name == "a.py")


@pytest.mark.parametrize("times", [1, 2, 100_000])
def test_a_tree_that_contains_itself(times: int, clone: Path) -> None:
    name = bytes(range(20))
    tree = b"".join(b"40000 %d\0" % number + name for number in range(times))
    data = zlib.compress(b"tree %d\0" % len(tree) + tree)
    path = clone / ".git" / "objects" / name.hex()[:2] / name.hex()[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    commit = b"tree " + name.hex().encode() + b"\n\n"
    text = b"commit %d\0" % len(commit) + commit
    top = sha1(text, usedforsecurity=False).hexdigest()
    (clone / ".git" / "objects" / top[:2]).mkdir(exist_ok=True)
    (clone / ".git" / "objects" / top[:2] / top[2:]).write_bytes(zlib.compress(text))
    (clone / ".git" / "HEAD").write_text(f"{top}\n")
    found = state(clone)
    assert (found.commit, found.dirty, found.complete) == (top, None, False)


def test_ignore_rules_that_take_long_to_try(clone: Path) -> None:
    (clone / ".gitignore").write_text(
        "*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b\n" + "**/a/" * 15 + "b\n" + "[z-a]\n[\n\\\n" * 9
    )
    (clone / ("a" * 250)).write_text("")
    deep = clone.joinpath(*["a"] * 60)
    deep.mkdir(parents=True)
    (deep / "c").write_text("")
    assert set(state(clone).untracked) == {".gitignore", "a" * 250, "a/"}
    rules = Ignored().below(clone / ".gitignore", 0)
    assert not rules.covers(("a",) * 60, is_folder=True)
    assert rules.covers((*("a",) * 60, "b"), is_folder=False)


def index_of(clone: Path, version: int, count: int, entries: bytes, extension: bytes = b"") -> None:
    data = b"DIRC" + struct.pack(">II", version, count) + entries + extension + bytes(20)
    (clone / ".git" / "index").write_bytes(data)


def test_an_index_that_repeats_a_long_path(clone: Path) -> None:
    fixed = bytes(24) + struct.pack(">I", 0o100644) + bytes(32) + b"\0\0"
    first = fixed + b"\0" + b"x" * (1 << 20) + b"\0"
    index_of(clone, 4, 100_001, first + (fixed + b"\0y\0") * 100_000)
    found = state(clone)
    assert (found.dirty, found.complete) == (None, False)


def test_an_index_with_folders_in_folders_without_end(clone: Path) -> None:
    tree = b"".join(b"x\0-1 1\n" for _ in range(1 << 20))
    index_of(clone, 2, 0, b"", b"TREE" + struct.pack(">I", len(tree)) + tree)
    found = state(clone)
    assert (found.dirty, found.complete) == (None, False)


@pytest.mark.parametrize("sizes", [(3000, 3000), (200_000, 190_000)])
def test_a_difference_of_many_lines_is_bounded(sizes: tuple[int, int], clone: Path) -> None:
    draw = random.Random(0)
    old, new = (b"".join(b"%d\n" % draw.randrange(9) for _ in range(size)) for size in sizes)
    (clone / "a.py").write_bytes(old)
    git(clone, "commit", "-qam", "y")
    text = difference("a.py", old, new, 0o100644)
    subprocess.run(["git", "apply", "-"], cwd=clone, input=text.encode(), check=True)
    assert (clone / "a.py").read_bytes() == new


def test_sizes_and_times_are_limited(clone: Path) -> None:
    for number in range(300):
        (clone / f"{number}.py").write_text("x")
    (clone / "a.py").write_text("long line\n" * (1 << 15))
    (clone / "b" / "c.py").write_text("short\n")
    found = state(clone)
    assert found.changed == ("a.py", "b/c.py")
    assert "short" in (found.diff or "")
    assert "long" not in (found.diff or "")
    assert (len(found.untracked), found.complete) == (200, False)
    git(clone, "add", "-A")
    assert len(state(clone).changed) == 200
    at = find_clone(clone)
    assert at is not None
    late = read_code(at, diff=True, seconds=-1)
    assert (late.commit, late.dirty, late.complete) == (at.commit, None, False)
