"""Links to files of the same directory, or of a store beside it, are content; no others are."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.checkpoint import links
from ckptvcs.checkpoint import open as opening
from ckptvcs.checkpoint.open import Checkpoint, open_checkpoint
from ckptvcs.encode.source import scan
from ckptvcs.errors import CkptError, InvalidInputError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo

WEIGHTS = {"w": torch.arange(3000.0)}


def hub(root: Path, *, shared: bool = False) -> Path:
    """A snapshot as huggingface_hub 2.4 lays it out, with a nested folder; as it does with
    `shared`, blobs are links into a store of the whole cache.
    """
    model = root / "hub" / "models--org--name"
    snapshot = model / "snapshots" / ("a" * 40)
    (snapshot / "onnx").mkdir(parents=True)
    place = model / "blobs"
    place.mkdir()
    torch.save(WEIGHTS, root / "saved")
    (root / "saved").rename(place / "1111")
    (place / "2222").write_text("{}")
    if shared:
        store = root / "hub" / "blobs"
        (store / "ab").mkdir(parents=True)
        (store / ".huggingface-shared-blobs").write_text("1\n")
        (place / "1111").rename(store / "ab" / "abcd")
        (place / "1111").symlink_to("../../blobs/ab/abcd")
    (snapshot / "pytorch_model.bin").symlink_to("../../blobs/1111")
    (snapshot / "onnx" / "model.bin").symlink_to("../../../blobs/1111")
    (snapshot / "config.json").symlink_to("../../blobs/2222")
    (snapshot / "real.txt").write_text("x")
    return snapshot


@pytest.mark.parametrize("through", ["itself", "a link"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hub(shared: bool, through: str, tmp_path: Path) -> None:
    snapshot = hub(tmp_path, shared=shared)
    repo = Repo.init(tmp_path / "repo")
    path = snapshot
    if through == "a link":
        path = tmp_path / "model"
        path.symlink_to(snapshot)
    made = repo.commit_path(path, message="", step=1)
    assert not any("link" in note for note in made.notes)
    assert "pytorch_model.bin:w" in [
        info.name for info in handle(repo).catalog.schema(made.commit.schema).tensors
    ]
    shutil.rmtree(tmp_path / "hub")
    back = tmp_path / "back"
    repo.checkout_files(made.id, back)
    assert not any(path.is_symlink() for path in back.rglob("*"))
    for name in ("pytorch_model.bin", "onnx/model.bin"):
        assert torch.equal(torch.load(back / name, weights_only=True)["w"], WEIGHTS["w"])
    assert (back / "config.json").read_text() == "{}"
    state = repo.checkout(1)
    assert torch.equal(state["onnx/model.bin"]["w"], WEIGHTS["w"])
    assert made.stored_bytes < 2 * WEIGHTS["w"].nbytes  # once, not twice


def test_a_folder_of_a_snapshot_and_the_whole_of_a_cache(tmp_path: Path) -> None:
    snapshot = hub(tmp_path, shared=True)
    assert [file.path for file in open_checkpoint(snapshot / "onnx").files] == ["model.bin"]
    whole = open_checkpoint(snapshot.parent.parent)
    assert len([file for file in whole.files if file.path.endswith("model.bin")]) == 2
    assert not whole.notes


def test_a_store_that_is_not_marked_is_none(tmp_path: Path) -> None:
    snapshot = hub(tmp_path, shared=True)
    (tmp_path / "hub" / "blobs" / ".huggingface-shared-blobs").unlink()
    made = open_checkpoint(snapshot)
    assert {file.path for file in made.files} == {"config.json", "real.txt"}
    (note,) = made.notes
    assert note.startswith("onnx/model.bin, pytorch_model.bin: links, each of which leads out of")


def test_links_within_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "deep").mkdir(parents=True)
    torch.save(WEIGHTS, folder / "deep" / "step-1.pt")
    (folder / "relative.pt").symlink_to("deep/step-1.pt")
    (folder / "absolute.pt").symlink_to(folder / "deep" / "step-1.pt")
    (folder / "chain.pt").symlink_to("relative.pt")
    (folder / "around.pt").symlink_to("../run/deep/../deep/step-1.pt")
    (folder / "latest").symlink_to("deep")
    (folder / "below.pt").symlink_to("latest/step-1.pt")
    made = open_checkpoint(folder)
    content = ["absolute.pt", "around.pt", "deep/step-1.pt"]
    assert [file.path for file in made.files] == content
    links = {link.path: link.target for link in made.links}
    assert links == {
        "deep": None,
        "latest": "deep",
        "relative.pt": "deep/step-1.pt",
        "chain.pt": "relative.pt",
        "below.pt": "latest/step-1.pt",
    }
    assert not made.notes
    repo = Repo.init(tmp_path / "repo")
    repo.commit_path(folder, message="", step=1)
    shutil.rmtree(folder)
    state = repo.checkout(1)
    assert state.keys() == {*content, "relative.pt", "chain.pt", "below.pt"}
    repo.checkout_files(repo.resolve(1), tmp_path / "back")
    for name in state:
        assert torch.equal(state[name]["w"], WEIGHTS["w"])
        saved = torch.load(tmp_path / "back" / name, weights_only=True)
        assert torch.equal(saved["w"], WEIGHTS["w"])
    assert not (tmp_path / "back" / "absolute.pt").is_symlink()


def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "secret.pt"
    path.parent.mkdir()
    torch.save(WEIGHTS, path)
    return path


def through_a_folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "way").symlink_to(outside(tmp_path).parent)
    return Path("way/secret.pt")


def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


ELSEWHERE: dict[str, tuple[Callable[[Path], str | Path], str]] = {
    "file": (outside, "leads out of the directory; stored without its content (1"),
    "through a folder": (through_a_folder, "leads out of the directory"),
    "device": (lambda _: "/dev/zero", "leads to no file"),
    "pipe": (pipe, "leads to no file"),
    "nowhere": (lambda _: "missing.pt", "leads nowhere"),
    "itself": (lambda _: "model.pt", "leads nowhere"),
    "directory": (lambda tmp: outside(tmp).parent, "leads to a directory elsewhere"),
    "repository": (lambda tmp: Repo.init(tmp / "run").folder / "format", "leads out of"),
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_other_links_stay_links_and_are_said(kind: str, raw: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    target, said = ELSEWHERE[kind]
    (folder / "model.pt").symlink_to(target(tmp_path))
    made = open_checkpoint(folder, raw=raw)
    assert [file.path for file in made.files] == ["notes.txt"]
    assert "model.pt" in [link.path for link in made.links]
    assert any(said in note and "model.pt" in note for note in made.notes)


def test_links_without_content_are_not_worth_a_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "editor-lock").symlink_to("user@host:1")
    (tmp_path / "here").symlink_to(".")
    assert not open_checkpoint(tmp_path).notes


def test_nothing_but_links_that_lead_out_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.pt").symlink_to(outside(tmp_path))
    with pytest.raises(InvalidInputError, match=r"no files except model.pt: a link") as refused:
        open_checkpoint(folder)
    assert "cp -rL" in (refused.value.hint or "")


# -- races -----------------------------------------------------------------------------------------


def swap(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def through(directory: Path, target: Path) -> None:
    directory.rename(directory.with_name("aside"))
    directory.symlink_to(target.parent)


def secret_blob(tmp_path: Path) -> Path:
    secret = outside(tmp_path)
    secret.rename(secret.with_name("1111"))
    return secret.with_name("1111")


def read_all(made: Checkpoint) -> bytes:
    scan(made, lambda _: None, stay=False)
    return b"".join(file.source.read(0, file.source.size) for file in made.files)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def blobs(snapshot: Path) -> Path:
    return snapshot.parent.parent / "blobs"


RACES: dict[str, Callable[[Path, Path], None]] = {
    "blob becomes a link": lambda here, secret: swap(blobs(here) / "1111", secret),
    "store becomes a link": lambda here, secret: through(blobs(here), secret),
    "link is turned": lambda here, secret: swap(here / "pytorch_model.bin", secret),
    "file becomes a link": lambda here, secret: swap(here / "real.txt", secret),
    "blob becomes a pipe": lambda here, _: piped(blobs(here) / "1111"),
    "file becomes a pipe": lambda here, _: piped(here / "real.txt"),
}


@pytest.mark.parametrize("race", RACES)
@pytest.mark.parametrize("moment", ["when it was opened", "when it was resolved", "when listed"])
def test_what_is_swapped_is_never_read(
    race: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, secret = hub(tmp_path), secret_blob(tmp_path)
    torch.save({"w": torch.full((3000,), 7.0)}, secret)
    done: list[bool] = []

    def strike() -> None:
        if not done:
            done.append(True)
            RACES[race](snapshot, secret)

    if moment == "when it was resolved":
        calm = os.path.realpath

        def resolved(path: Path, *, strict: bool = False) -> str:
            found = calm(path, strict=strict)
            if strict:
                strike()
            return found

        monkeypatch.setattr(os.path, "realpath", resolved)
    elif moment == "when listed":
        entries = opening.list_entries

        def listed(root: Path, skip: Path | None) -> object:
            found = [*entries(root, skip)]
            for _, entry in found:
                entry.is_symlink(), entry.stat(follow_symlinks=False)
            strike()
            return iter(found)

        monkeypatch.setattr(opening, "list_entries", listed)
    read = b""
    try:
        made = open_checkpoint(snapshot)
        strike()
        read = read_all(made)
        made.check_unchanged()
    except CkptError:
        pass
    else:
        assert moment != "when it was opened", "the change went by unnoticed"
    assert torch.full((1,), 7.0).numpy().tobytes() * 10 not in read


@pytest.mark.parametrize("how", ["link", "blob"])
def test_a_link_that_is_turned_while_it_is_read_is_noticed(how: str, tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    made = open_checkpoint(snapshot)
    made.check_unchanged()
    store = blobs(snapshot)
    shutil.copy2(store / "1111", store / "3333")
    if how == "link":
        swap(snapshot / "pytorch_model.bin", Path("../../blobs/3333"))
    else:
        (store / "3333").rename(store / "1111")
    with pytest.raises(InvalidInputError, match="changed while"):
        made.check_unchanged()


def test_a_checkout_over_links_writes_files_and_not_through_them(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    repo = Repo.init(tmp_path / "repo")
    made = repo.commit_path(snapshot, message="", step=1)
    blob = blobs(snapshot) / "1111"
    was = blob.stat()
    repo.checkout_files(made.id, snapshot)
    assert not (snapshot / "pytorch_model.bin").is_symlink()
    assert (blob.stat().st_ino, blob.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
    assert (
        subprocess.run(["cmp", blob, snapshot / "pytorch_model.bin"], check=False).returncode == 0
    )


names = st.sampled_from(["a", "b", "c"])


@given(st.data())
def test_within_is_what_the_system_does(data: st.DataObject) -> None:
    """Names that lead to a place below the top are resolved as the system resolves them."""
    parts = st.lists(names | st.sampled_from([".", ".."]), min_size=1, max_size=5)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder).resolve()
        for path in data.draw(st.permutations(["a", "a/b", "a/c", "b", "b/a", "c"])):
            with contextlib.suppress(OSError):
                if data.draw(st.booleans()):
                    (top / path).symlink_to("/".join(data.draw(parts)))
                else:
                    (top / path).mkdir()

        def target_of(path: str) -> str | None:
            return str((top / path).readlink()) if (top / path).is_symlink() else None

        name = "/".join(data.draw(parts))
        found = links.within(name, target_of)
        with contextlib.suppress(OSError):
            real = Path(os.path.realpath(top / name, strict=True))
            if found is not None:
                assert real == top / found
            else:
                assert ".." in name or any(
                    ".." in str(p.readlink()) for p in top.rglob("*") if p.is_symlink()
                )
