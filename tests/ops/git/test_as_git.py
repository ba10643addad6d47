"""The state of a clone is what git says, whatever was done to it."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptvcs import CodeState
from ckptvcs.ops.git.head import find_clone
from ckptvcs.ops.git.state import read_code
from tests.helpers.git import git

NAMES = ["a.py", "b/c.py", "b/d/e.yaml", "b/d/f g.txt", "h/ü.py", "k", 'l"m.py', "n.log", "o/p.log"]


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def clone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "-q", f"--object-format={getattr(request, 'param', 'sha1')}")
    for number, name in enumerate(NAMES):
        write(folder / name, b"".join(b"line %d of %d\n" % (row, number) for row in range(60)))
    (folder / "link").symlink_to("a.py")
    (folder / ".gitignore").write_text("*.tmp\n/out/\n!keep.tmp\ncache/**\n# none\nb/*.bin\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    return folder


def state(folder: Path, *, diff: bool = True) -> CodeState:
    found = find_clone(folder)
    assert found is not None
    return read_code(found, diff=diff)


def check(folder: Path, tmp_path: Path) -> CodeState:
    """Compare everything with git, and apply the diff to a fresh copy of the commit."""
    found = state(folder)
    git(folder, "config", "core.quotePath", "false")
    assert found.complete
    assert found.commit == git(folder, "rev-parse", "HEAD")
    raw = git(folder, "diff", "--name-only", "-z", "--no-renames", "HEAD")
    assert list(found.changed) == sorted(raw.split("\0")[:-1], key=str.encode)
    assert found.dirty == bool(raw)
    lines = git(folder, "status", "--porcelain", "-z").split("\0")
    assert list(found.untracked) == sorted(line[3:] for line in lines if line.startswith("??"))
    copy = tmp_path / f"copy-{random.randrange(1 << 60)}"
    git(folder, "worktree", "add", "-q", "--detach", str(copy))
    if found.diff:
        subprocess.run(
            ["git", "apply", "-"], cwd=copy, input=found.diff.encode(), check=True, env=calm(copy)
        )
    for name in git(folder, "diff", "--name-only", "-z", "HEAD").split("\0")[:-1]:
        assert content(copy / name) == content(folder / name), name
    git(folder, "worktree", "remove", "--force", str(copy))
    return found


def calm(folder: Path) -> dict[str, str]:
    return os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CEILING_DIRECTORIES": str(folder)}


def content(path: Path) -> bytes | str | None:
    if path.is_symlink():
        return str(path.readlink())
    return path.read_bytes() if path.exists() else None


def nothing(_: Path) -> None:
    pass


def touched(folder: Path) -> None:
    os.utime(folder / "a.py", (1, 1))


def edited(folder: Path) -> None:
    lines = (folder / "b/c.py").read_text().splitlines(keepends=True)
    lines[3] = "new\n"
    del lines[30:33]
    lines.insert(50, "more\n")
    (folder / "b/c.py").write_text("".join(lines))


def edited_at_both_ends(folder: Path) -> None:
    text = (folder / "k").read_text()
    (folder / "k").write_text(f"first\n{text}last without an end")


def edited_without_a_trace(folder: Path) -> None:
    before = (folder / "a.py").stat()
    write(folder / "a.py", (folder / "a.py").read_bytes().replace(b"line", b"LINE"))
    os.utime(folder / "a.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(folder / ".git" / "index", ns=(before.st_atime_ns, before.st_mtime_ns))


def staged(folder: Path) -> None:
    edited(folder)
    git(folder, "add", "b/c.py")


def staged_and_edited(folder: Path) -> None:
    staged(folder)
    edited_at_both_ends(folder)
    write(folder / "b/c.py", b"all new\n")


def added_and_deleted(folder: Path) -> None:
    write(folder / "new/x/y.py", b"print()\n")
    write(folder / "empty.py", b"")
    git(folder, "add", "new", "empty.py")
    git(folder, "rm", "-q", "a.py")
    (folder / 'l"m.py').unlink()


def intended(folder: Path) -> None:
    write(folder / "z.py", b"print()\n")
    git(folder, "add", "-N", "z.py")


def another_link(folder: Path) -> None:
    (folder / "link").unlink()
    (folder / "link").symlink_to("b/c.py")


def untracked(folder: Path) -> None:
    for name in [
        "x.py",
        "y.tmp",
        "keep.tmp",
        "out/x.py",
        "b/x.bin",
        "b/d/x.bin",
        "cache/x",
        "q/r/s",
    ]:
        write(folder / name, b"x")
    write(folder / "t/.gitignore", b"*\n")
    write(folder / "t/u.py", b"x")
    write(folder / "v/.gitignore", b"w/\n\\#x\n[a-c]?.txt\n/*.md\n**/deep/*.c\nx/**/y\n")
    for name in ["w/a", "#x", "b1.txt", "d1.txt", "a.md", "i/a.md", "i/deep/a.c", "deep/b.c"]:
        write(folder / "v" / name, b"x")
    write(folder / "v/x/1/2/y", b"x")
    git(folder, "add", "-f", "v/d1.txt")
    (folder / "nothing").mkdir()
    write(folder / ".git/info/exclude", b"excluded\n")
    write(folder / "excluded", b"x")


def without_a_cache_of_trees(folder: Path) -> None:
    git(folder, "read-tree", "--empty")
    git(folder, "add", "-A")
    edited(folder)


def a_conflict(folder: Path) -> None:
    git(folder, "checkout", "-qb", "side")
    write(folder / "a.py", b"side\n")
    git(folder, "commit", "-qam", "side")
    git(folder, "checkout", "-q", "-")
    write(folder / "a.py", b"main\n")
    git(folder, "commit", "-qam", "main")
    subprocess.run(["git", "merge", "side"], cwd=folder, capture_output=True, check=False)


def packed(folder: Path) -> None:
    """Rewrite a file often, so that its versions become deltas of each other."""
    for number in range(20):
        with (folder / "b/c.py").open("a") as file:
            file.write(f"version {number}\n")
        git(folder, "commit", "-qam", str(number))
    git(folder, "checkout", "-q", "HEAD~10")
    git(folder, "repack", "-adfq", "--depth=50", "--window=50")
    git(folder, "prune-packed", "-q")
    edited(folder)


CHANGES = [
    nothing,
    touched,
    edited,
    edited_at_both_ends,
    edited_without_a_trace,
    staged,
    staged_and_edited,
    added_and_deleted,
    intended,
    another_link,
    untracked,
    without_a_cache_of_trees,
    a_conflict,
    packed,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_change(change: Callable[[Path], None], clone: Path, tmp_path: Path) -> None:
    change(clone)
    check(clone, tmp_path)


@pytest.mark.parametrize("clone", ["sha256"], indirect=True)
@pytest.mark.parametrize("change", [staged_and_edited, packed], ids=lambda change: change.__name__)
def test_ids_of_sha_256(change: Callable[[Path], None], clone: Path, tmp_path: Path) -> None:
    change(clone)
    assert len(check(clone, tmp_path).commit) == 64


@pytest.mark.parametrize("version", [2, 3, 4])
def test_each_version_of_the_index(version: int, clone: Path, tmp_path: Path) -> None:
    added_and_deleted(clone)
    intended(clone)  # version 2 becomes 3
    git(clone, "update-index", f"--index-version={version}")
    check(clone, tmp_path)


def test_many_changes_one_after_the_other(clone: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    for number in range(12):
        name = draw.choice(NAMES)
        lines = [b"%d\n" % draw.randrange(20) for _ in range(draw.randrange(80))]
        write(clone / name, b"".join(lines).removesuffix(b"\n" * draw.randrange(2)))
        if number % 3 == 0:
            git(clone, "add", name)
        if number % 4 == 3:
            git(clone, "commit", "-qm", "x")
        check(clone, tmp_path)


def test_the_branch_and_a_worktree(clone: Path, tmp_path: Path) -> None:
    git(clone, "worktree", "add", "-q", "../tree", "-b", "a/b")
    write(tmp_path / "tree" / "a.py", b"x\n")
    found = check(tmp_path / "tree", tmp_path)
    assert (found.branch, found.changed) == ("a/b", ("a.py",))
    git(clone, "checkout", "-q", "--detach")
    assert state(clone).branch is None


def test_a_clone_that_borrows_objects(clone: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-qs", "clone", "borrower")
    edited(tmp_path / "borrower")
    assert check(tmp_path / "borrower", tmp_path).changed == ("b/c.py",)


def test_a_binary_file_is_named_and_not_shown(clone: Path) -> None:
    write(clone / "k", b"a\0b")
    found = state(clone)
    assert found.changed == ("k",)
    assert found.diff is not None
    assert "Binary files a/k and b/k differ" in found.diff


def test_a_folder_in_the_place_of_a_file(clone: Path) -> None:
    (clone / "k").unlink()
    write(clone / "k/k.py", b"print()\n")
    found = state(clone)
    assert (found.changed, found.untracked, found.complete) == (("k",), ("k/",), True)


def test_a_submodule_is_no_change(clone: Path, tmp_path: Path) -> None:
    git(clone, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", "./", "sub")
    git(clone, "commit", "-qam", "sub")
    write(clone / "sub" / "a.py", b"changed\n")
    assert not state(clone).dirty


def test_files_that_git_is_told_to_take_as_they_are(clone: Path) -> None:
    git(clone, "update-index", "--skip-worktree", "a.py")
    git(clone, "update-index", "--assume-unchanged", "k")
    write(clone / "a.py", b"mine\n")
    (clone / "k").unlink()
    assert state(clone).dirty is False


def test_ends_of_lines_that_git_converts(clone: Path) -> None:
    (clone / ".gitattributes").write_text("*.py text eol=crlf\n")
    git(clone, "add", ".gitattributes")
    git(clone, "commit", "-qm", "ends")
    (clone / "a.py").unlink()
    git(clone, "checkout", "-q", "a.py")
    assert b"\r\n" in (clone / "a.py").read_bytes()
    os.utime(clone / "a.py", (1, 1))
    assert state(clone).dirty is False


def test_without_the_diff_the_names_are_there(clone: Path) -> None:
    edited(clone)
    found = state(clone, diff=False)
    assert (found.diff, found.changed) == (None, ("b/c.py",))
