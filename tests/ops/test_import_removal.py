"""Import a folder: which originals are removed."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.files.removal import Originals, Proven
from ckptvcs.gc.retention import Policy
from ckptvcs.ops.checkout import hash_file
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import set_ref
from ckptvcs.repo import Repo
from tests.helpers.checkpoints import trainer_directory
from tests.helpers.importing import State, actions, names, remove, run, silent


def test_what_is_exact_is_removed_and_stays_exact(
    near: Repo, folder: Path, states: list[State]
) -> None:
    original = hash_file(folder / "step-1000.pt")
    kept = remove(run(near, folder))
    assert names(folder) == ["step-800.pt", "step-900.pt"]
    assert kept["step-1000.pt"] is None
    assert "only near (weights off by 0.0" in (kept["step-800.pt"] or "")
    for step in (2000, 2001, 2002):  # would let it fade, if it were not pinned
        near.commit(states[5], step=step)
    assert near.entry(near.resolve(1000)).exact
    near.checkout_files(near.resolve(1000), folder / "back.pt")
    assert hash_file(folder / "back.pt") == original


def test_near_is_removed_where_it_is_accepted(near: Repo, folder: Path) -> None:
    importer = run(near, folder)
    assert set(remove(importer, accept_near=True).values()) == {None}
    assert names(folder) == []
    assert handle(near).refs.targets("pins") == set()
    assert not near.verify().damage


def test_lossless_lets_all_be_removed(near: Repo, folder: Path) -> None:
    importer = run(near, folder, codec="lossless")
    assert set(remove(importer).values()) == {None}
    assert names(folder) == []
    assert handle(near).refs.targets("pins") == set()  # nothing of it could fade


@pytest.mark.parametrize("way", ["written", "longer", "replaced", "gone", "link", "directory"])
def test_what_changed_since_it_was_committed_stays(repo: Repo, folder: Path, way: str) -> None:
    importer = run(repo, folder)
    path, data = folder / "step-900.pt", (folder / "step-900.pt").read_bytes()
    status = path.stat()
    if way == "written":  # of the same size, and with the time that it had
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif way == "longer":
        path.write_bytes(data + b"x")
    elif way == "replaced":
        shutil.copy(folder / "step-800.pt", folder / "new")
        (folder / "new").rename(path)
    else:
        path.rename(folder.parent / "moved")
    if way == "link":
        path.symlink_to(folder.parent / "moved")
    if way == "directory":
        path.mkdir()
    kept = remove(importer)
    assert kept.pop("step-900.pt")
    assert set(kept.values()) == {None}
    assert names(folder) == ([] if way == "gone" else ["step-900.pt"])
    if way in ("gone", "link", "directory"):
        assert (folder.parent / "moved").read_bytes() == data


@pytest.mark.parametrize("how", ["undo", "drop", "delete the branch"])
def test_what_another_process_lets_go_keeps_its_original(
    how: str, repo: Repo, folder: Path
) -> None:
    other = Repo.open(repo.folder)
    if how == "delete the branch":
        other.commit({"w": torch.ones(3)})
        importer = run(repo, folder, branch="side")
        set_ref(handle(other), "heads", "side", None, "delete")
    else:
        importer = run(repo, folder)
        _ = (
            [other.undo() for _ in range(2)]
            if how == "undo"
            else [other.gc(Policy(last=2), now=True)]
        )
    kept = remove(importer)
    stay = {
        "undo": ["step-1000.pt", "step-1100.pt"],
        "drop": ["step-800.pt", "step-900.pt"],
        "delete the branch": sorted(f"step-{n}.pt" for n in (800, 900, 1000, 1100)),
    }[how]
    assert names(folder) == sorted(stay)
    for name in stay:
        assert ("dropped" if how == "drop" else "no ref reaches") in (kept[name] or "")


def test_a_tag_is_enough(repo: Repo, folder: Path) -> None:
    importer = run(repo, folder)
    other = Repo.open(repo.folder)
    set_ref(handle(other), "tags", "v1", other.resolve("HEAD"), "tag")
    _ = [other.undo() for _ in range(3)]
    assert set(remove(importer).values()) == {None}
    other.gc()
    assert other.entry(other.resolve("v1")).exact


@pytest.mark.parametrize(
    ("fidelity", "stays"), [("exact", False), ("weights", True), ("near", True)]
)
def test_pins_that_do_not_keep_what_is_exact(
    fidelity: str, near: Repo, folder: Path, *, stays: bool
) -> None:
    near.configure("pin-fidelity", fidelity)
    importer = run(near, folder)
    kept = remove(importer)
    newest = "step-1100.pt"
    assert (folder / newest).exists() == stays
    assert ("pin-fidelity" in (kept[newest] or "")) == stays
    assert bool(handle(near).refs.targets("pins")) != stays


def test_a_pin_that_is_taken_away_meanwhile(
    near: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importer = run(near, folder)
    newest = near.resolve("HEAD")
    calm = Originals.prove

    def prove(self: Originals, *args: Any) -> Proven:
        Repo.open(near.folder).pin(newest, pinned=False)
        return calm(self, *args)

    monkeypatch.setattr(Originals, "prove", prove)
    assert "unpinned" in (remove(importer)["step-1100.pt"] or "")
    assert (folder / "step-1100.pt").exists()


def test_a_file_of_several_that_changes_keeps_the_others(
    repo: Repo, folder: Path, states: list[State]
) -> None:
    made = trainer_directory(folder, states[0], 500)
    importer = run(repo, folder)
    files = sorted(path for path in made.rglob("*") if path.is_file())
    with files[-1].open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    assert "changed since it was committed" in (remove(importer)["checkpoint-500"] or "")
    assert all(path.exists() for path in files)


def test_a_file_replaced_while_it_is_hashed_stays(repo: Repo, folder: Path) -> None:
    importer = run(repo, folder)
    path = folder / "step-900.pt"
    precious = b"written meanwhile"

    def replace(_: int) -> None:
        if path.exists() and path.read_bytes() != precious:
            (folder / "new").write_bytes(precious)
            (folder / "new").rename(path)

    importer.remove(accept_near=False, progress=replace, watch=silent)
    assert names(folder) == ["step-900.pt"]
    assert path.read_bytes() == precious


def test_a_file_written_while_it_is_hashed_stays(repo: Repo, folder: Path) -> None:
    importer = run(repo, folder)
    path, times = folder / "step-900.pt", itertools.count(1)

    def touch(_: int) -> None:
        if path.exists():
            os.utime(path, ns=(1, next(times)))

    importer.remove(accept_near=False, progress=touch, watch=silent)
    assert names(folder) == ["step-900.pt"]


def test_links_in_the_folder_are_neither_followed_nor_removed(
    repo: Repo, folder: Path, tmp_path: Path, states: list[State]
) -> None:
    outside = tmp_path / "outside"
    trainer_directory(outside, states[0], 700)
    shutil.copy(folder / "step-900.pt", outside / "linked.pt")
    (folder / "step-50.pt").symlink_to(outside / "linked.pt")
    (folder / "checkpoint-700").symlink_to(outside / "checkpoint-700")
    made = trainer_directory(folder, states[1], 701)
    (made / "linked.pt").symlink_to(outside / "linked.pt")
    (made / "linked").symlink_to(outside / "checkpoint-700")
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    kept = remove(run(repo, folder))
    assert names(folder) == ["checkpoint-700", "checkpoint-701", "step-50.pt"]
    assert names(made) == ["linked", "linked.pt"]
    assert "links" in (kept["checkpoint-701"] or "")
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_a_directory_that_became_a_link_is_not_gone_through(
    repo: Repo, folder: Path, tmp_path: Path, states: list[State]
) -> None:
    made = trainer_directory(folder, states[0], 500)
    (made / "deep").mkdir()
    shutil.copy(folder / "step-900.pt", made / "deep" / "extra.pt")
    importer = run(repo, folder)
    (made / "deep").rename(tmp_path / "deep")
    (made / "deep").symlink_to(tmp_path / "deep")
    assert "symbolic link" in (remove(importer)["checkpoint-500"] or "")
    assert (tmp_path / "deep" / "extra.pt").exists()
    assert len(names(made)) == 8  # it was found out before anything was removed
    (made / "deep").unlink()
    (tmp_path / "deep").rename(made / "deep")
    made.rename(tmp_path / "moved")
    made.symlink_to(tmp_path / "moved")
    remove(importer)
    assert len(names(tmp_path / "moved")) == 8


def test_directories_are_removed_when_all_in_them_was_committed(
    repo: Repo, tmp_path: Path, states: list[State]
) -> None:
    folder = tmp_path / "run"
    for number in (1, 2, 3):
        made = trainer_directory(folder, states[number], number)
        (made / "empty").mkdir()
        (made / "deep" / "er").mkdir(parents=True)
        (made / "deep" / "er" / "x").write_text("x")
    importer = run(repo, folder)
    (folder / "checkpoint-2" / "deep" / "notes.txt").write_text("written later")
    (folder / "checkpoint-3" / "config.json").write_text("[]")
    kept = remove(importer)
    assert names(folder) == ["checkpoint-2", "checkpoint-3"]
    left = [path.name for path in (folder / "checkpoint-2").rglob("*")]
    assert sorted(left) == ["deep", "notes.txt"]
    assert "not committed" in (kept["checkpoint-2"] or "")
    assert "config.json" in (kept["checkpoint-3"] or "")
    repo.checkout_files(repo.resolve(1), tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "er" / "x").read_text() == "x"
    assert (tmp_path / "back" / "empty").is_dir()


def test_a_file_with_other_names_frees_nothing(repo: Repo, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other name").hardlink_to(folder / "step-900.pt")
    importer = run(repo, folder)
    remove(importer)
    freed = {item.found.name: item.removal.removed[0].freed_bytes for item in importer.items}
    assert freed.pop("step-900.pt") == 0
    assert all(freed.values())
    assert (tmp_path / "other name").exists()


def test_a_copy_is_removed_with_what_it_is_a_copy_of(repo: Repo, folder: Path) -> None:
    shutil.copy(folder / "step-900.pt", folder / "best.pt")
    remove(run(repo, folder))
    assert names(folder) == []


def test_a_refused_removal_leaves_no_pin(near: Repo, folder: Path) -> None:
    importer = run(near, folder)
    path = folder / "step-1100.pt"
    path.write_bytes(path.read_bytes()[::-1])
    remove(importer)
    assert handle(near).refs.targets("pins") == {near.resolve(1000)}
    assert path.exists()


def test_paths_stay_below_the_folder(folder: Path) -> None:
    digest = hash_file(folder / "step-900.pt")
    with Originals(folder / "..") as originals:
        for path in ("../x", "run/../run/step-900.pt", str(folder / "step-900.pt")):
            with pytest.raises((InvalidInputError, ConflictError)):
                originals.remove(PurePosixPath(path), digest, silent)
        assert originals.remove(PurePosixPath("run/step-900.pt"), digest, silent).size_bytes


def test_dropped_commits_are_committed_again(repo: Repo, folder: Path) -> None:
    run(repo, folder)
    repo.gc(Policy(last=1), sweep=False)
    importer = run(Repo.open(repo.root), folder)
    done = actions(importer)
    assert done["step-1100.pt"] == "known"
    assert done["step-800.pt"] == done["step-900.pt"] == "committed"
    assert set(remove(importer).values()) == {None}
