"""Which code made a commit is read from the files of git; nothing that they say is executed."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptvcs.ops.provenance import code_commit
from tests.helpers.git import git

ROOT = Path(__file__).parents[2]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "commit", "-qm", "x", "--allow-empty")
    monkeypatch.chdir(folder)
    return folder


def as_it_is(_: Path) -> None:
    pass


def packed(folder: Path) -> None:
    git(folder, "pack-refs", "--all")


def detached(folder: Path) -> None:
    git(folder, "checkout", "-q", "--detach")


def on_a_branch_with_slashes(folder: Path) -> None:
    git(folder, "checkout", "-q", "-b", "a/b.c/d")


@pytest.mark.parametrize("change", [as_it_is, packed, detached, on_a_branch_with_slashes])
def test_it_is_what_git_says(change: Callable[[Path], object], code: Path) -> None:
    change(code)
    assert code_commit() == git(code, "rev-parse", "HEAD")


@pytest.mark.parametrize("pack", [False, True])
def test_in_a_folder_below_and_in_a_worktree(
    pack: bool, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code / "below").mkdir()
    git(code, "worktree", "add", "-q", "../tree", "-b", "other")
    git(code.parent / "tree", "commit", "-qm", "y", "--allow-empty")
    if pack:
        packed(code)
    here, there = git(code, "rev-parse", "HEAD"), git(code.parent / "tree", "rev-parse", "HEAD")
    assert here != there
    monkeypatch.chdir(code / "below")
    assert code_commit() == here
    monkeypatch.chdir(code.parent / "tree")
    assert code_commit() == there


def test_before_the_first_commit_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.chdir(tmp_path)
    assert code_commit() is None


def head(text: str) -> Callable[[Path], object]:
    return lambda git_folder: (git_folder / "HEAD").write_text(text)


def a_pipe(git_folder: Path) -> None:
    (git_folder / "HEAD").unlink()
    os.mkfifo(git_folder / "HEAD")


def a_device(git_folder: Path) -> None:
    (git_folder / "HEAD").unlink()
    (git_folder / "HEAD").symlink_to("/dev/zero")


def a_circle(git_folder: Path) -> None:
    (git_folder / "HEAD").write_text("ref: refs/heads/a\n")
    (git_folder / "refs/heads/a").write_text("ref: refs/heads/a\n")


@pytest.mark.parametrize(
    "hostile",
    [
        head(""),
        head("x" * 100_000),
        head("ref: ../../secret\n"),
        head("ref: refs/../../secret\n"),
        head("ref: /etc/passwd\n"),
        head("ref: refs/heads/\x1b[2J\n"),
        head("\x1b[2J"),
        a_pipe,
        a_device,
        a_circle,
    ],
)
def test_what_is_no_commit_is_none(hostile: Callable[[Path], object], code: Path) -> None:
    (code / "secret").write_text("a" * 40)
    hostile(code / ".git")
    assert code_commit() is None


def test_a_git_in_the_path_is_not_looked_for(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\ntouch '{tmp_path}/executed'\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert code_commit()
    assert not (tmp_path / "executed").exists()


# This program, and what users tell it to run.
MAY_START_PROCESSES = {
    "background/process.py",
    "kernels/compiling.py",
    "ops/bisect.py",
    "ops/command.py",
}
STARTING = {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile"}


def test_nothing_else_starts_a_process() -> None:
    for path in (ROOT / "ckptvcs").rglob("*.py"):
        if f"{path.parent.name}/{path.name}" in MAY_START_PROCESSES:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {"subprocess", "pty", "commands"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = node.attr in STARTING or node.attr.startswith(("exec", "spawn"))
                assert not (node.value.id == "os" and called), (path, node.lineno)
