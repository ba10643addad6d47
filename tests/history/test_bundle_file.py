"""Bundle files that are damaged, or made by somebody with bad intentions."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.errors import CkptError, CorruptionError, UnsupportedVersionError
from ckptvcs.history.bundle_file import BundledCommit, BundleWriter, Manifest
from ckptvcs.history.canonical_json import now
from ckptvcs.history.note import Note, dump_note
from ckptvcs.history.records import DropRecord, dump_drop_record
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import Kind
from tests.helpers.bundling import forged, history, opened, sealed, steps
from tests.helpers.fuzzing import little_room, mutated, mutated_json

MISSING = "f" * 64


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle file with patches, a tag, and ancestors that it leaves out."""
    folder = tmp_path_factory.mktemp("good")
    repo = history(folder / "repo", 4)
    repo.tag("v1", 3)
    repo.bundle("3..4", folder / "good.ckptz")
    return folder / "good.ckptz"


def refused(path: Path, scratch: Path) -> CkptError:
    """The error of a clone and of a fetch, after which nothing has changed."""
    with pytest.raises(CkptError) as caught:
        Repo.clone(path, scratch / "clone")
    assert not (scratch / "clone").exists()
    target = scratch / "target"
    repo = Repo.open(target) if target.exists() else history(target, 1)
    before = sorted((p, p.stat().st_size) for p in repo.folder.glob("[mpr]*/*/*"))
    with pytest.raises(CkptError):
        repo.fetch(path)
    assert sorted((p, p.stat().st_size) for p in repo.folder.glob("[mpr]*/*/*")) == before
    assert steps(Repo.open(target)) == [1]
    return caught.value


def test_a_file_that_ends_anywhere(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    packs, manifest = opened(data)
    edges = {0, 1, 15, 16, 17, 16 + len(packs), len(data) - 57, len(data) - 56, len(data) - 1}
    at = 16
    for pack in manifest["packs"]:
        at += pack["bytes"]
        edges |= {at - 1, at}
    for edge in sorted(edges):
        (tmp_path / "cut.ckptz").write_bytes(data[:edge])
        assert isinstance(refused(tmp_path / "cut.ckptz", tmp_path), CorruptionError), edge
    (tmp_path / "cut.ckptz").write_bytes(data + b"\0")
    refused(tmp_path / "cut.ckptz", tmp_path)


@given(st.data())
def test_any_changed_bytes(good: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    content = good.read_bytes()
    changed = data.draw(mutated(content))
    if changed != content:
        folder = tmp_path_factory.mktemp("changed")
        (folder / "x.ckptz").write_bytes(changed)
        with little_room(), pytest.raises(CkptError):
            Repo.clone(folder / "x.ckptz", folder / "clone")
        assert not (folder / "clone").exists()


@given(st.data())
def test_any_changed_packs_under_the_right_hash(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    packs, manifest = opened(good.read_bytes())
    changed = data.draw(mutated(packs))
    if changed != packs:
        folder = tmp_path_factory.mktemp("changed")
        (folder / "x.ckptz").write_bytes(sealed(changed, json.dumps(manifest).encode()))
        with little_room(), pytest.raises(CkptError):
            Repo.clone(folder / "x.ckptz", folder / "clone")


@given(st.data())
def test_any_changed_manifest_under_the_right_hash(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """It is refused, or what it describes is whole."""
    packs, manifest = opened(good.read_bytes())
    changed = data.draw(mutated_json(manifest))
    folder = tmp_path_factory.mktemp("changed")
    (folder / "x.ckptz").write_bytes(sealed(packs, json.dumps(changed).encode()))
    with little_room():
        try:
            clone = Repo.clone(folder / "x.ckptz", folder / "clone")
        except CkptError:
            assert not (folder / "clone").exists()
            return
    assert not clone.verify().damage


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no commits": lambda m: m.update(commits=[]),
    "a commit twice": lambda m: m["commits"].append(m["commits"][0]),
    "a commit that is missing": lambda m: m["commits"][0].update(id=MISSING),
    "no refs": lambda m: m.update(refs={}),
    "a ref to an ancestor": lambda m: m["refs"].update({"heads/x": MISSING}),
    "a ref outside": lambda m: m["refs"].update({"heads/../../up": m["commits"][0]["id"]}),
    "a ref of another space": lambda m: m["refs"].update({"HEAD": m["commits"][0]["id"]}),
    "a branch named as a step": lambda m: m["refs"].update({"heads/17": m["commits"][0]["id"]}),
    "a pin of another commit": lambda m: m["refs"].update(
        {f"pins/{MISSING}": m["commits"][0]["id"]}
    ),
    "a HEAD without branch": lambda m: m.update(head="nowhere"),
    "an unknown part": lambda m: m["commits"][0].update(parts=["model", "soul"]),
    "a patch without its part": lambda m: m["commits"][0].update(parts=["model"], patches=["rest"]),
    "a patch that is not there": lambda m: m["commits"][1].update(patches=["model", "rest"]),
    "a folder outside": lambda m: m["packs"][0].update(folder="../../refs"),
    "a data pack among the others": lambda m: m["packs"][0].update(folder="meta"),
    "a huge pack": lambda m: m["packs"][0].update(bytes=(1 << 63) - 1),
    "a tiny pack": lambda m: m["packs"][0].update(bytes=1),
    "a pack of another hash": lambda m: m["packs"][0].update(id=MISSING),
    "a pack that is not listed": lambda m: m["packs"].pop(),
    "a pack that is listed twice": lambda m: m["packs"].append(m["packs"][0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_lies(good: Path, tmp_path: Path, change: str) -> None:
    target = forged(good, CHANGES[change])
    assert isinstance(refused(target, tmp_path), CorruptionError)


def test_flags_and_versions_of_the_future(good: Path, tmp_path: Path) -> None:
    for flags in ({"read": ["telepathy"]}, {"dream": ["x"]}):
        target = forged(good, partial(dict.update, flags=flags))
        assert isinstance(refused(target, tmp_path), UnsupportedVersionError)
    data = bytearray(good.read_bytes())
    data[8:10] = struct.pack("<H", 2)
    (tmp_path / "x.ckptz").write_bytes(data)
    assert isinstance(refused(tmp_path / "x.ckptz", tmp_path), UnsupportedVersionError)


class Smuggler:
    """Writes a sound bundle file of one commit, with one more object in a pack."""

    def __init__(self, root: Path) -> None:
        self.repo = history(root / "source", 1)
        self.name = self.repo.resolve(1)

    def write(self, path: Path, kind: Kind, content: bytes, folder: str = "meta") -> None:
        store = handle(self.repo).catalog.store
        commit = self.repo.show(1).commit
        with path.open("wb") as file:
            writer = BundleWriter(file.write)
            for pack, where in store.list_packs().items():
                writer.copy_pack(store.backend, pack, where)
            extra = writer.new_pack(folder)
            extra.add(kind, content)
            writer.add(extra)
            row = BundledCommit(self.name, tuple(commit.parts), (), ())
            writer.finish(Manifest((row,), {"heads/main": self.name}, {}, "main"))


def test_a_record_that_drops_commits_of_the_target(tmp_path: Path) -> None:
    target = history(tmp_path / "target", 1)
    names = (target.resolve(1),)
    smuggler = Smuggler(tmp_path)
    for what in ("drop", "undo", "fade"):
        record = dump_drop_record(DropRecord(what, names, (), "x", now()))
        smuggler.write(tmp_path / "x.ckptz", Kind.RECORD, record)
        assert "unexpected object" in refused(tmp_path / "x.ckptz", tmp_path).message


def test_objects_in_the_wrong_folder(tmp_path: Path) -> None:
    smuggler = Smuggler(tmp_path)
    smuggler.write(tmp_path / "x.ckptz", Kind.SCHEMA, b"{}", "packs")
    assert "unexpected object" in refused(tmp_path / "x.ckptz", tmp_path).message


def test_a_note_that_nothing_can_replace(tmp_path: Path) -> None:
    smuggler = Smuggler(tmp_path)
    note = dump_note(Note(smuggler.name, (1 << 63) - 1, now(), "mallory", "mine"))
    smuggler.write(tmp_path / "x.ckptz", Kind.NOTE, note)
    assert "notes" in refused(tmp_path / "x.ckptz", tmp_path).message


def test_a_commit_without_its_ancestors(tmp_path: Path) -> None:
    repo = history(tmp_path / "source", 2)
    store, entry = handle(repo).catalog.store, repo.show(2)
    with (tmp_path / "x.ckptz").open("wb") as file:
        writer = BundleWriter(file.write)
        for pack, where in store.list_packs().items():
            names = [one.id for one in store.entries(pack, where)]
            if repo.resolve(1) not in names:
                writer.copy_pack(store.backend, pack, where)
        row = BundledCommit(entry.id, tuple(entry.commit.parts), (), ())
        writer.finish(Manifest((row,), {"heads/main": entry.id}, {}, "main"))
    assert isinstance(refused(tmp_path / "x.ckptz", tmp_path), CorruptionError)


def test_what_is_not_needed_is_not_copied(tmp_path: Path) -> None:
    smuggler = Smuggler(tmp_path)
    smuggler.write(tmp_path / "x.ckptz", Kind.SCHEMA, b"{}")
    clone = Repo.clone(tmp_path / "x.ckptz", tmp_path / "clone")
    kinds = handle(clone).catalog.store.ids(Kind.SCHEMA)
    assert kinds == [clone.show(1).commit.schema]


@pytest.mark.parametrize("what", ["a folder", "an empty file", "a pack", "text"])
def test_what_is_no_bundle_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.ckptz"
    if what == "a folder":
        path.mkdir()
    elif what == "a pack":
        path.write_bytes(next(history(tmp_path / "a", 1).folder.glob("packs/*/*")).read_bytes())
    else:
        path.write_text("" if what == "an empty file" else "not a bundle" * 100)
    refused(path, tmp_path)
