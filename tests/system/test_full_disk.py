"""Disks that are really full: what was there stays, whatever is left of the room, and gc frees
some.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from ckptvcs.errors import StorageError
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import set_ref
from ckptvcs.repo import Repo
from tests.helpers.crashing import SCENARIOS, Expected, expected, save
from tests.helpers.disks import MiB, fill, mounted
from tests.helpers.faults import apart

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
ROOMS = range(0, 300, 4) if NIGHTLY else (4, 100)  # in kB
Full = Callable[[Path, int], None]


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    target = mounted(request.param, 6 * MiB, tmp_path)
    yield target
    subprocess.run(["umount", "-l", target], check=True)


def history(folder: Path, files: Path, count: int = 5) -> Repo:
    save(files, range(1, count + 2))
    repo = Repo.init(folder)
    for step in range(1, count + 1):
        repo.commit_path(files / f"step-{step}.pt", message="")
    return repo


def test_gc_on_a_full_disk(small: Path, tmp_path: Path) -> None:
    repo = history(small, tmp_path / "files")
    fill(small)
    with pytest.raises(StorageError, match="No space"):
        repo.commit_path(tmp_path / "files" / "step-6.pt", message="")
    assert len(repo.log()) == 5
    plan = repo.gc(Policy(last=2), now=True)
    assert len(plan.drops[0].commits) == 3
    assert len(Repo.open(small).log()) == 2
    assert repo.verify().damage == []
    (small / "filler").unlink()
    repo.commit_path(tmp_path / "files" / "step-6.pt", message="")
    assert (repo.folder / "cache" / "reserve").stat().st_size >= MiB


def test_gc_on_a_full_disk_without_a_reserve(small: Path, tmp_path: Path) -> None:
    repo = history(small, tmp_path / "files")
    (repo.folder / "cache" / "reserve").unlink()
    fill(small)
    assert len(list((repo.folder / "cache" / "bases").iterdir())) == 2
    repo.gc(Policy(last=1, within=0), now=True)
    assert len(Repo.open(small).log()) == 1


def test_drop_on_a_full_disk(small: Path, tmp_path: Path) -> None:
    repo = history(small, tmp_path / "files")
    fill(small)
    assert repo.drop(2, 3).waiting
    assert [entry.step for entry in Repo.open(small).log()] == [5, 4, 1]
    repo.undo()
    assert repo.verify().damage == []


def test_other_processes_see_what_was_dropped_on_a_full_disk(small: Path, tmp_path: Path) -> None:
    repo = history(small, tmp_path / "files")
    fill(small)
    assert len(apart(partial(repo.gc, Policy(last=2))).drops[0].commits) == 3
    assert apart(lambda: len(Repo.open(small).log())) == 2


@pytest.mark.parametrize("room", ROOMS)
def test_commit_into_what_is_left(room: int, small: Path, tmp_path: Path) -> None:
    repo = history(small, tmp_path / "files", 2)
    before = [_digest(repo, entry) for entry in repo.log()]
    fill(small, room << 10)
    done = apart(partial(_commit, small, tmp_path / "files" / "step-3.pt"))
    repo = Repo.open(small)
    assert done in (None, "StorageError")
    assert len(repo.log()) == 2 + (done is None)
    assert [_digest(repo, entry) for entry in repo.log()][-2:] == before
    (small / "filler").unlink()
    repo.commit_path(tmp_path / "files" / "step-3.pt", message="", step=4)
    repo.gc()
    assert not [*(repo.folder / "tmp").iterdir(), *(repo.folder / "leases").iterdir()]
    assert repo.verify().damage == []


def _digest(repo: Repo, entry: LogEntry) -> str:
    return handle(repo).restorer(entry.id, near=True).digest(entry.commit.files[0])


def _commit(folder: Path, path: Path) -> str | None:
    try:
        Repo.open(folder).commit_path(path, message="")
    except StorageError as error:
        return "StorageError" if error.hint else error.message
    return None


@pytest.mark.parametrize("room", [4, 48, 120])
def test_no_room_for_the_cache(room: int, tmp_path: Path) -> None:
    repo = history(tmp_path / "repo", tmp_path / "files", 2)
    cache = repo.folder / "cache"
    shutil.rmtree(cache)
    mount = mounted("tmpfs", room << 10, tmp_path)
    cache.symlink_to(mount)
    try:
        assert apart(partial(_commit, tmp_path / "repo", tmp_path / "files" / "step-3.pt")) is None
        assert apart(lambda: len(Repo.open(tmp_path / "repo").log())) == 3
        apart(lambda: Repo.open(tmp_path / "repo").gc(Policy(last=1), now=True))
        assert apart(lambda: len(Repo.open(tmp_path / "repo").log())) == 1
        assert apart(lambda: Repo.open(tmp_path / "repo").verify().damage) == []
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_each_in_a_full_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = history(tmp_path / "repo", tmp_path / "files", 2)
    mount = mounted("tmpfs", 8 << 10, tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(mount))
    try:
        with pytest.raises(StorageError, match="No space") as caught:
            repo.each(lambda *_: {"eval": 1.0})
        assert "TMPDIR" in (caught.value.hint or "")
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.mark.parametrize("name", ["commit", "gc", *(["rekey", "import"] if NIGHTLY else [])])
def test_files_may_not_be_large(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    template = tmp_path / "template"
    template.mkdir()
    scenario.build(template)
    wanted: Expected = expected(scenario, template, tmp_path / "calm")
    for limit in (2000, 70_000) if not NIGHTLY else range(0, 200_000, 3000):
        root = tmp_path / str(limit)
        shutil.copytree(template, root)
        apart(partial(_limited, limit, partial(scenario.act, root)))
        wanted.check(scenario, root)


def _limited(limit: int, act: Callable[[], object]) -> None:
    with tempfile.TemporaryFile():  # looks for its folder before there is a limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with contextlib.suppress(StorageError):
            act()


def test_a_read_only_file_system(small: Path, tmp_path: Path) -> None:
    # Apart: a process that has an index open for writing keeps its file system writable.
    assert apart(lambda: len(history(small, tmp_path / "files").log())) == 5
    done = subprocess.run(["mount", "-o", "remount,ro", small], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot remount a file system here")
    repo = Repo.open(small)
    assert [entry.step for entry in repo.log()] == [5, 4, 3, 2, 1]
    assert repo.verify().damage == []
    assert repo.checkout_files(repo.resolve(5), tmp_path / "back").exact
    assert repo.plan_gc(Policy(last=1)).drops
    handle(repo).catalog.store.rebuild()
    assert sum(event.action == "commit" for event in repo.reflog()) == 5
    for act in (
        lambda: repo.commit_path(tmp_path / "files" / "step-6.pt", message=""),
        lambda: repo.gc(Policy(last=1), now=True),
        lambda: set_ref(handle(repo), "tags", "x", repo.resolve(1), "tag"),
        lambda: repo.pin(repo.resolve(1), pinned=True),
        lambda: repo.configure("keep-exact", "1"),
        repo.undo,
    ):
        with pytest.raises(StorageError) as caught:
            act()
        assert caught.value.hint == "the file system is read-only"
    assert len(repo.log()) == 5
