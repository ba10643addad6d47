"""Names that tools execute or trust: no checkout makes them without being told to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.decode.part_reader import PartReader
from ckptvcs.errors import CkptError, ConflictError, CorruptionError, InvalidInputError
from ckptvcs.files.names import is_repository_name, is_trusted_name, refuse_trusted, safe_path
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.command_line import Ckpt
from tests.helpers.forging import Forger

IGNORED = "\u200c\u200d\u200e\u200f\u202a\u202e\u206a\u206f\ufeff\u00ad\u2060\u180e\u034f\ufe0f"


@st.composite
def spellings(draw: st.DrawFn, name: str) -> str:
    """How else a name can be written so that some file system or tool takes it for the same."""
    letters = [
        draw(st.sampled_from([c, c.upper(), chr(ord(c) + 0xFEE0)])) for c in name
    ]  # full width
    for _ in range(draw(st.integers(0, 3))):
        letters.insert(draw(st.integers(0, len(letters))), draw(st.sampled_from(IGNORED)))
    tail = draw(st.sampled_from(["", ".", " ", ". .", "...", "::$INDEX_ALLOCATION", ":x", " :x"]))
    front = draw(st.sampled_from(["", "", "a\\"]))
    return front + "".join(letters) + tail


NAMES = [".git", ".hg", ".svn", ".bzr", ".jj", ".envrc", ".vscode", ".idea", ".github"]


@given(st.sampled_from(NAMES).flatmap(spellings), st.lists(st.sampled_from("ab"), max_size=3))
def test_every_spelling_at_any_depth_needs_force(name: str, above: list[str]) -> None:
    assert is_trusted_name(name)
    for path in ([*above, name], [*above, name, "hooks", "post-commit"]):
        with pytest.raises(ConflictError) as caught:
            refuse_trusted(["harmless", "/".join(path)])
        assert "--force" in str(caught.value.hint)
        assert caught.value.message.isprintable()


@given(spellings(".ckpt"), st.lists(st.sampled_from("ab"), max_size=3))
def test_every_spelling_of_a_repository_is_refused(name: str, above: list[str]) -> None:
    assert is_repository_name(name)
    for path in ([*above, name], [*above, name, "refs"]):
        with pytest.raises(CorruptionError):
            safe_path("/".join(path))


@pytest.mark.parametrize(
    "name",
    [
        "git~1",
        "GIT~2",
        "CKPT~1",
        "gitmod~1",
        "sitecustomize.py",
        "SiteCustomize.pyc",
        "sitecustomize.cpython-311-x86_64-linux-gnu.so",
        "usercustomize",
        "conftest.py",
        "SITECU~1.PY",
        ".pdbrc",
        ".bashrc",
        ".ssh",
        ".RData",
        "pyvenv.cfg",
        ".mise.toml",
    ],
)
def test_other_names_of_the_kind(name: str) -> None:
    assert is_trusted_name(name) or is_repository_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        ".metadata",
        ".gitattributes",
        ".gitignore",
        ".cache",
        "model.ckpt",
        "last.ckpt",
        "git",
        "agit",
        ".gitx",
        ".ckpt2",
        "..x",
        "a~1",
        "train.py",
        "modeling_x.py",
        "tokenizer.model",
        "README.md",
        ".hydra",
        "~",
        "x:y",
        "a.git",
        "env",
        "\U0001f600",
        "\ufb01",
        " lead",
        "trail ",
        "%41",
    ],
)
def test_names_of_checkpoints_need_nothing(name: str) -> None:
    assert not is_trusted_name(name)
    assert not is_repository_name(name)


# -- where names are asked about -------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder of a model with a repository of git in it."""
    folder = tmp_path / "clone"
    (folder / ".git" / "hooks").mkdir(parents=True)
    (folder / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "sitecustomize.py").write_text("x = 1\n")
    (folder / "weights.dat").write_bytes(bytes(1000))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


WAYS: dict[str, Callable[[Repo, Any, Path, bool], object]] = {
    "checkout": lambda repo, name, to, force: repo.checkout_files(name, to, force=force),
    "export": lambda repo, name, to, force: PartReader(handle(repo).restorer(name)).export(
        to, None, lambda _: None, force=force
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_is_committed_and_comes_back_when_it_is_meant(
    way: str, clone: Path, tmp_path: Path
) -> None:
    repo = Repo.init(tmp_path / "r", codec="lossless")
    made = repo.commit_path(clone, message="")
    (note,) = [note for note in made.notes if "--force" in note]
    assert ".git" in note
    assert "sub/sitecustomize.py" in note
    with pytest.raises(ConflictError, match=r"\.git, sub/sitecustomize\.py"):
        WAYS[way](repo, made.id, tmp_path / "back", False)
    assert not (tmp_path / "back").exists()
    WAYS[way](repo, made.id, tmp_path / "back", True)
    assert files(tmp_path / "back") == files(clone)
    assert repo.verify().damage == []


def test_the_command_line_asks_for_force(ckpt: Ckpt, clone: Path, tmp_path: Path) -> None:
    ckpt("init", "--codec", "lossless")
    assert "note: .git, sub/sitecustomize.py: tools execute" in ckpt("commit", clone.name).err
    for args in (
        ["checkout", "HEAD", "-o", "x"],
        ["checkout", "HEAD"],
        ["export", "HEAD", "x"],
        ["average", "HEAD..HEAD", "-o", "x"],
    ):
        done = ckpt(*args, code=4)
        assert "--force" in done.err
        assert ".git" in done.err
        assert not (tmp_path / "x").exists()
    ckpt("export", "HEAD", "x", "--force")
    assert files(tmp_path / "x") == files(clone)


@pytest.mark.parametrize(
    "path",
    [
        ".git/hooks/post-commit",
        ".GIT/config",
        "a/.g\u200cit/x",
        ".git::$INDEX_ALLOCATION/x",
        "git~1/hooks/x",
        ".envrc",
        "sitecustomize.py",
        ".vscode/tasks.json",
    ],
)
def test_the_path_of_a_commit_is_asked_about_but_not_the_users(
    path: str, forger: Forger, tmp_path: Path
) -> None:
    made = forger.lead_to(replace(forger.commit, path=path, inside=True))
    before = files(tmp_path)
    with pytest.raises(ConflictError, match="tools execute or trust"):
        forger.repo.checkout_files(made)
    assert files(tmp_path) == before
    forger.repo.checkout_files(made, tmp_path / ".envrc")  # which the user has named
    assert (tmp_path / ".envrc").exists()
    forger.repo.checkout_files(made, force=True)
    assert (forger.repo.root / path).exists()


def test_a_folder_with_another_spelling_of_a_repository_is_not_committed(
    repo: Repo, tmp_path: Path
) -> None:
    (tmp_path / "d" / ".ckpt ").mkdir(parents=True)
    (tmp_path / "d" / "x.dat").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="repository"):
        repo.commit_path(tmp_path / "d", message="")


def test_a_search_needs_no_force(ckpt: Ckpt, clone: Path, tmp_path: Path) -> None:
    ckpt("init", "--codec", "lossless")
    for step in (1, 2, 3):
        (clone / "weights.dat").write_bytes(os.urandom(1000))
        ckpt("commit", clone.name, "--step", step)
    test = "test -e {}/.git && test $CKPT_STEP -lt 2"
    done = ckpt("bisect", 1, 3, "--json", "--", "sh", "-c", test)
    assert done.json["first_bad"]


def test_where_files_are_about_to_go_is_said_first(
    ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.dat").write_bytes(b"x" * 1000)
    ckpt("init", "--codec", "lossless")
    ckpt("commit", "in/x.dat", "--step", 1)
    ckpt("commit", "in", "--step", 2)
    (tmp_path / "in" / "x.dat").unlink()
    assert f"writing {tmp_path}/in/x.dat\n" in ckpt("checkout", 1).err
    assert f"writing 1 file to {tmp_path}/in\n" in ckpt("checkout", 2).err
    assert "writing" not in ckpt("checkout", "HEAD", "-o", "y").err

    def nothing(*_: object, **__: object) -> None:
        raise InvalidInputError("it ends before anything is written")

    monkeypatch.setattr("ckptvcs.ops.checkout.save_directory", nothing)
    for more in ([], ["--json"], ["--force"]):
        assert "writing" in ckpt("checkout", 2, *more, code=2).err


@given(st.text(max_size=30))
def test_any_name_is_one_thing_or_the_other(name: str) -> None:
    try:
        path = safe_path(name)
    except CkptError:
        return
    if not any(map(is_trusted_name, path.parts)):
        refuse_trusted([name])
