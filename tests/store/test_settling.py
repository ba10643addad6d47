"""What is visible and not durable yet: who relies on it makes it durable first."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptvcs.errors import StorageError
from ckptvcs.files.removal import Originals, Proven, Removed
from ckptvcs.gc.retention import Policy
from ckptvcs.history.reachability import mark
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.import_folder import Importer
from ckptvcs.ops.refs import set_ref
from ckptvcs.repo import Repo
from ckptvcs.store import disk, local
from ckptvcs.store.backend import write_once
from ckptvcs.store.ids import Kind
from ckptvcs.store.local import LocalBackend
from ckptvcs.store.pack import pack_name
from tests.helpers.crashing import save


class Synced:
    """What is synced from here on, below a folder: files on their way are left out."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names, self._folder, self._calm = list[str](), folder, os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, descriptor: int) -> None:
        self._calm(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_relative_to(self._folder):
            name = str(path.relative_to(self._folder))
            self.names += [] if name.startswith("tmp/") else [name]

    def taken(self) -> list[str]:
        """What was synced since the last call."""
        found, self.names = self.names, []
        return found


def cut(root: Path, folder: str, code: str) -> None:
    """Run something in a process that ends, as if it were killed, when it has published a file and
    is about to sync the `folder` of that.
    """
    start = f"""
import os
from pathlib import Path
from ckptvcs import Repo
from ckptvcs.store import disk, local
calm = disk.sync_folder
def sync_folder(path):
    if path.match({folder!r}): os._exit(7)
    calm(path)
disk.sync_folder = sync_folder
"""
    done = subprocess.run([sys.executable, "-c", start + code], cwd=root, check=False)
    assert done.returncode == 7, "it was not cut"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with two commits, and files of more beside it."""
    save(tmp_path, range(1, 6))
    repo = Repo.init(tmp_path)
    for step in (1, 2):
        repo.commit_path(tmp_path / f"step-{step}.pt", message="")
    return tmp_path


_COMMIT = "Repo.open('.').commit_path(Path('step-3.pt'), message='')"


def packs_of(repo: Repo, revision: int) -> set[str]:
    """The packs that a commit stands on."""
    name = repo.resolve(revision)
    marked = mark(
        handle(repo).catalog,
        {name: handle(repo).catalog.commit(name)},
        handle(repo).catalog.dropped(),
    )
    store = handle(repo).catalog.store
    return {
        pack_name(place.folder, place.pack)
        for name in marked.objects
        for place in store.places(name)
    }


# -- folders ---------------------------------------------------------------------------------------


def test_all_folders_that_lead_to_a_repository_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    synced = Synced(tmp_path, monkeypatch)
    Repo.init(tmp_path / "old" / "a" / "b" / "c")
    assert {".", "old", "old/a", "old/a/b", "old/a/b/c", "old/a/b/c/.ckpt"} <= set(synced.taken())


def test_a_way_that_may_not_be_read_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = disk.sync_folder

    def refuse(path: Path) -> None:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "no")
        calm(path)

    monkeypatch.setattr(disk, "sync_folder", refuse)
    disk.sync_above(tmp_path / "..")
    (tmp_path / "a").mkdir()
    disk.sync_above(tmp_path / "a")


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_folder_may_have_been_made_by_one_who_was_killed(
    tmp_path: Path, *, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packs" / "ab").mkdir(parents=True)
    if not empty:
        (tmp_path / "packs" / "ab" / "x").touch()
    synced = Synced(tmp_path, monkeypatch)
    write_once(LocalBackend(tmp_path), "packs/ab/y", b"y")
    assert synced.taken() == (["packs"] if empty else []) + ["packs/ab"]


def test_a_commit_after_an_init_that_was_killed(tmp_path: Path) -> None:
    save(tmp_path, range(1, 3))
    (tmp_path / "a").mkdir()
    code = """
count = []
def sync_folder(path):
    if path.name == ".ckpt" and (path / "format").exists(): os._exit(7)
    calm(path)
disk.sync_folder = sync_folder
Repo.init("a")
"""
    cut(tmp_path, "never", code)
    with pytest.MonkeyPatch.context() as patch:
        synced = Synced(tmp_path, patch)
        Repo.open(tmp_path / "a").commit_path(tmp_path / "step-1.pt", message="")
        assert {".", "a", "a/.ckpt", "a/.ckpt/format"} <= set(synced.taken())
        Repo.open(tmp_path / "a").commit_path(tmp_path / "step-2.pt", message="")
        assert not {".", "a", "a/.ckpt/format"} & set(synced.taken())


# -- commits ---------------------------------------------------------------------------------------


def test_a_commit_stands_on_packs_of_one_that_was_killed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(root, "meta/??", _COMMIT)
    left = {p for p in (root / ".ckpt").glob("meta/??/*.pack") if p.stat().st_nlink == 2}
    repo = Repo.open(root)
    handle(repo).catalog.store.refresh()
    synced = Synced(root / ".ckpt", monkeypatch)
    repo.commit_path(root / "step-3.pt", message="")
    done = synced.taken()
    used = [name for name in packs_of(repo, 3) if root / ".ckpt" / name in left]
    assert used
    for name in used:
        assert done.index(str(Path(name).parent)) < done.index("refs/heads/main")


def test_a_tag_on_a_commit_that_no_ref_led_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(root, "meta/??", _COMMIT)
    repo = Repo.open(root)
    handle(repo).catalog.store.refresh()
    (loose,) = handle(repo).revisions.unreachable(
        set(handle(repo).catalog.store.ids(Kind.COMMIT)) - handle(repo).revisions.ids()
    )
    synced = Synced(root / ".ckpt", monkeypatch)
    set_ref(handle(repo), "tags", "found", loose, "tag")
    done = synced.taken()
    packs = {
        pack_name(place.folder, place.pack) for place in handle(repo).catalog.store.places(loose)
    }
    for pack in packs:
        assert pack in done
        assert done.index(str(Path(pack).parent)) < done.index("refs/tags/found")


def test_a_calm_commit_syncs_what_it_writes_and_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo.open(root)
    before = {p for p in (root / ".ckpt").rglob("*") if p.is_file()}
    synced = Synced(root / ".ckpt", monkeypatch)
    repo.commit_path(root / "step-3.pt", message="")
    new = [
        p.relative_to(root / ".ckpt")
        for p in (root / ".ckpt").rglob("*")
        if p.is_file() and p not in before
    ]
    last = [path for path in new if path.parts[0] in ("packs", "meta", "refs")]
    above = {str(path.parent.parent) for path in last}  # of folders that are new
    rest = [name for name in synced.taken() if name not in above]
    assert sorted(rest) == sorted(str(path.parent) for path in last)


# -- originals -------------------------------------------------------------------------------------


def _delete_originals(repo: Repo, folder: Path) -> Importer:
    importer = Importer(handle(repo), folder)
    importer.look(lambda _: None)
    importer.run(lambda _: None, lambda _: None)
    importer.remove(accept_near=False, progress=lambda _: None, watch=lambda _: None)
    return importer


@pytest.mark.parametrize("folder", ["refs/heads/main", "meta/??", "packs/??"])
def test_originals_go_when_all_they_come_back_from_is_durable(
    folder: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "found").mkdir()
    original = root / "found" / "step-3.pt"
    original.write_bytes((root / "step-3.pt").read_bytes())
    cut(root, folder, _COMMIT)
    synced, seen = Synced(root / ".ckpt", monkeypatch), list[set[str]]()
    calm = Originals.delete

    def delete(self: Originals, proven: Proven) -> Removed:
        seen.append(set(synced.names))
        return calm(self, proven)

    monkeypatch.setattr(Originals, "delete", delete)
    repo = Repo.open(root)
    (item,) = _delete_originals(repo, root / "found").items
    assert item.removal.keep_reason is None
    assert not original.exists()
    (done,) = seen
    needed = packs_of(repo, 3)
    number = len(list((root / ".ckpt" / "refs/heads/main").iterdir()))
    assert {str(Path(name).parent) for name in needed} | {"refs/heads/main"} <= done
    if folder == "refs/heads/main":  # all of it is the work of another process
        assert needed | {f"refs/heads/main/{number:016}", "format", "refs/heads", "."} <= done


def test_what_is_durable_is_not_synced_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = Repo.open(root)
    names = sorted(packs_of(repo, 2))
    backend = LocalBackend(root / ".ckpt")
    synced = Synced(root / ".ckpt", monkeypatch)
    backend.settle(names)
    assert set(names) <= set(synced.taken())
    backend.settle(names)
    assert synced.taken() == []
    write_once(backend, "refs/tags/x/1", b"x")
    synced.taken()
    backend.settle(["refs/tags/x/1"])
    assert synced.taken() == []


def test_a_long_training_remembers_the_newest_files_that_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_SETTLED", 8)
    backend = LocalBackend(tmp_path)
    for number in range(30):
        write_once(backend, f"meta/{number}", b"data")
    synced = Synced(tmp_path, monkeypatch)
    backend.settle(["meta/29"])
    assert not synced.taken()
    backend.settle(["meta/0"])
    assert "meta/0" in synced.taken()


def test_an_original_stays_where_nothing_can_be_synced(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "found").mkdir()
    (root / "step-3.pt").rename(root / "found" / "step-3.pt")

    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, "it fails")

    repo = Repo.open(root)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "settle", refuse)
        with pytest.raises(StorageError):
            handle(repo).catalog.store.backend.settle(["format"])
        patch.setattr(disk, "sync_folder", disk.sync_folder)
    importer = Importer(handle(repo), root / "found")
    importer.look(lambda _: None)
    importer.run(lambda _: None, lambda _: None)
    monkeypatch.setattr(disk, "settle", refuse)
    importer.remove(accept_near=False, progress=lambda _: None, watch=lambda _: None)
    assert (root / "found" / "step-3.pt").exists()
    assert importer.items[0].removal.keep_reason
    assert not importer.items[0].removal.removed


# -- gc --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["undo", "drop"])
def test_a_sweep_relies_on_what_is_durable(
    what: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "undo":
        cut(root, "refs/heads/main", "Repo.open('.').undo()")
    else:
        code = """
from ckptvcs.history.reachability import mark
from ckptvcs.gc.retention import Policy
Repo.open('.').gc(Policy(last=1), sweep=False)
"""
        cut(root, "meta/??", code)
    repo = Repo.open(root)
    synced, seen = Synced(root / ".ckpt", monkeypatch), list[set[str]]()
    calm = LocalBackend.delete

    def delete(self: LocalBackend, name: str) -> None:
        seen.append(set(synced.names))
        calm(self, name)

    doubtful = [
        str(p.relative_to(root / ".ckpt").parent)
        for p in (root / ".ckpt").rglob("*")
        if p.is_file() and p.stat().st_nlink == 2 and p.parent.name != "tmp"
    ]
    assert doubtful
    monkeypatch.setattr(LocalBackend, "delete", delete)
    assert repo.gc(Policy(), now=True).packs
    packs = [done for done in seen if done]
    assert packs[0] >= {"refs/heads/main", *doubtful}
    assert Repo.open(root).verify().damage == []


def test_who_sweeps_a_file_of_a_writer_that_was_killed_syncs_all(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(root, "packs/??", _COMMIT)
    (left,) = [p for p in (root / ".ckpt" / "tmp").iterdir() if p.stat().st_nlink == 2]
    synced = Synced(root / ".ckpt", monkeypatch)
    LocalBackend(root / ".ckpt").delete(f"tmp/{left.name}")
    folders = {
        str(p.relative_to(root / ".ckpt"))
        for name in ("packs", "meta", "refs")
        for p in (root / ".ckpt" / name).rglob("*")
        if p.is_dir()
    }
    assert folders <= set(synced.taken())
    (root / ".ckpt" / "tmp" / "other").write_bytes(b"debris")
    LocalBackend(root / ".ckpt").delete("tmp/other")
    assert synced.taken() == []


def test_without_links_every_file_of_others_is_doubtful(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    repo = Repo.open(root)
    backend = handle(repo).backend
    write_once(backend, "refs/tags/x/1", b"x")
    (name, *_) = sorted(packs_of(Repo.open(root), 2))
    synced = Synced(root / ".ckpt", monkeypatch)
    backend.size(name)
    backend.size("refs/tags/x/1")
    backend.settle_seen()
    done = set(synced.taken())
    assert {name, str(Path(name).parent)} <= done
    assert "refs/tags/x/1" not in done
