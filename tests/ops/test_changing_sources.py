"""What changes while it is committed is no commit: it is said, and nothing is left of the try."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.encode import encoder
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.ops import commit, describe
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.profiles import short
from tests.helpers.training import train, train_on

CODECS = ["lossless", "near", "excp"]
Change = Callable[[], object]


def before(owner: object, name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the source when a step of the commit is reached for the first time."""
    calm = getattr(owner, name)
    done: list[bool] = []

    def changed(*args: Any, **options: Any) -> Any:
        if not done:
            done.append(True)
            change()
        return calm(*args, **options)

    monkeypatch.setattr(owner, name, changed)


MOMENTS: dict[str, tuple[object, str]] = {
    "before the scan": (commit, "scan"),
    "after the scan": (commit.Committer, "place"),
    "before the first tensor": (encoder.Encoder, "encode"),
    "between tensors": (encoder.Encoder, "_put"),
    "before the last look": (Checkpoint, "check_unchanged"),
    "before the commit is written": (describe.Description, "add"),
}

SOME = ("before the scan", "between tensors", "before the commit is written")


def refused(repo: Repo, path: Path) -> None:
    """A commit is refused, and is as if it never was."""
    log, refs = [entry.id for entry in repo.log()], handle(repo).refs.reflog("heads/main")
    with pytest.raises((InvalidInputError, NotFoundError)) as caught:
        repo.commit_path(path, message="x")
    assert "changed while" in str(caught.value)
    assert [entry.id for entry in repo.log()] == log
    assert handle(repo).refs.reflog("heads/main") == refs
    for left in ("leases", "tmp"):
        assert not list((repo.folder / left).iterdir())


def again(repo: Repo, path: Path, tmp_path: Path) -> None:
    """A second try works, and gives back what is there now."""
    made = repo.commit_path(path, message="again", codec="lossless")
    back = tmp_path / "back" / path.name
    repo.checkout_files(made.id, back)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            assert (back / file.relative_to(path)).read_bytes() == file.read_bytes()
    assert not repo.verify().damage


def rewrite(path: Path) -> None:
    """The next step of the training, under the same name."""
    train_on(path)


def silently(path: Path) -> None:
    """Another file of the same size and times, as some tools leave it."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def in_place(path: Path) -> None:
    """The same file with other bytes and the old times, as a memory map leaves it."""
    status, size = path.stat(), path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)[0]
        file.seek(size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], None]] = {
    "rewritten": rewrite,
    "replaced": silently,
    "in place": in_place,
    "gone": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
}


def prepared(tmp_path: Path, codec: str) -> tuple[Repo, Path]:
    """A history of one commit, and the next step of the file, so that there are deltas."""
    repo = Repo.init(tmp_path / "repo", codec=codec)
    path = tmp_path / "model.pt"
    torch.save(train(1)[0], path)
    repo.commit_path(path, message="first")
    train_on(path)
    return repo, path


@pytest.mark.parametrize(
    ("codec", "change", "moment"),
    [("near", change, moment) for change in CHANGES for moment in SOME]
    + [(codec, change, "between tensors") for codec in CODECS[::2] for change in CHANGES],
)
def test_a_file_that_changes_while_it_is_read_is_not_committed(
    codec: str, change: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, path = prepared(tmp_path, codec)
    kept = path.read_bytes()
    before(*MOMENTS[moment], lambda: CHANGES[change](path), monkeypatch)
    refused(repo, path)
    if not path.exists() or change == "cut":
        path.write_bytes(kept)
    again(repo, path, tmp_path)


def fill(folder: Path) -> None:
    folder.mkdir()
    torch.save(train(1)[0]["model"], folder / "a.pt")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("some notes" * 50)
    (folder / "link").symlink_to("a.pt")


def swap(folder: Path) -> None:
    one, other = folder / "a.pt", folder / "sub" / "notes.txt"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


FOLDERS: dict[str, Callable[[Path], object]] = {
    "added": lambda folder: (folder / "new.txt").write_text("new"),
    "added below": lambda folder: (folder / "sub" / "new.txt").write_text("new"),
    "removed": lambda folder: (folder / "sub" / "notes.txt").unlink(),
    "renamed": lambda folder: (folder / "a.pt").rename(folder / "b.pt"),
    "folder added": lambda folder: (folder / "more").mkdir(),
    "replaced": lambda folder: silently(folder / "a.pt"),
    "in place": lambda folder: in_place(folder / "sub" / "notes.txt"),
    "link": lambda folder: (folder / "sub" / "notes.txt").rename(folder / "link"),
    "swapped": swap,
}


@pytest.mark.parametrize("moment", SOME)
@pytest.mark.parametrize("change", FOLDERS)
def test_a_folder_that_changes_while_it_is_read_is_not_committed(
    change: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, folder = Repo.init(tmp_path / "repo"), tmp_path / "folder"
    fill(folder)
    before(*MOMENTS[moment], lambda: FOLDERS[change](folder), monkeypatch)
    refused(repo, folder)
    again(repo, folder, tmp_path)


@pytest.mark.parametrize("moment", MOMENTS)
def test_every_moment(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, path = prepared(tmp_path, "near")
    before(*MOMENTS[moment], lambda: in_place(path), monkeypatch)
    refused(repo, path)
    again(repo, path, tmp_path)


def test_a_folder_that_was_committed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is coded, since all is as it was, it is looked at again all the same."""
    repo, folder = Repo.init(tmp_path / "repo"), tmp_path / "folder"
    fill(folder)
    repo.commit_path(folder, message="first")
    before(*MOMENTS["before the commit is written"], lambda: FOLDERS["added"](folder), monkeypatch)
    refused(repo, folder)
    again(repo, folder, tmp_path)


@pytest.mark.parametrize(
    ("what", "moment"),
    [
        ("small", "before the scan"),
        *((what, moment) for what in ("weight", "moment", "rest", "small") for moment in SOME[1:]),
    ],
)
@pytest.mark.parametrize("codec", short(CODECS, CODECS[:1]))
def test_a_state_that_changes_while_it_is_read_is_not_committed(
    codec: str, what: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread trains on."""
    repo = Repo.init(tmp_path / "repo", codec=codec)
    first, state = train(2)
    repo.commit(first)
    tensor = {
        "weight": state["model"]["0.weight"],
        "rest": state["rng"],
        "small": state["optimizer"]["state"][2]["step"],
        "moment": state["optimizer"]["state"][2]["exp_avg_sq"],
    }[what]
    before(*MOMENTS[moment], lambda: tensor.add_(1), monkeypatch)
    log = [entry.id for entry in repo.log()]
    with pytest.raises(InvalidInputError, match="changed while"):
        repo.commit(state)
    assert [entry.id for entry in repo.log()] == log
    assert not list((repo.folder / "leases").iterdir())
    made = repo.commit(state, codec="lossless")
    back = repo.checkout(made.id)
    assert torch.equal(back["model"]["0.weight"], state["model"]["0.weight"])
    assert torch.equal(back["rng"], state["rng"])
    assert not repo.verify().damage
