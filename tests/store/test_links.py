"""File systems without hard links: a name is still given once, to a whole file."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckptvcs.errors import ConflictError, StorageError
from ckptvcs.repo import Repo
from ckptvcs.store.backend import Backend, write_once
from ckptvcs.store.local import LocalBackend
from tests.helpers.crashing import SCENARIOS, Expected, expected, save
from tests.helpers.faults import AFTER, BEFORE, Steps, killed
from tests.store.contract import BackendContract

CODES = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


@pytest.fixture(params=CODES, ids=errno.errorcode.get)
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    def link(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", link)
    return int(request.param)


@pytest.mark.usefixtures("no_links")
class TestWithoutLinks(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return LocalBackend(tmp_path)


@pytest.mark.parametrize("no_links", [errno.EPERM], indirect=True)
def test_of_many_writers_one_gets_a_name(no_links: int, tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)

    def write(name: str, writer: int) -> int:
        try:
            write_once(backend, f"refs/{name}", bytes([writer]) * 10_000)
        except ConflictError:
            return 0
        return writer

    with ThreadPoolExecutor(8) as pool:
        for name in map(str, range(50)):
            winners = [n for n in pool.map(partial(write, name), range(1, 9)) if n]
            assert len(winners) == 1
            assert backend.read(f"refs/{name}") == bytes(winners) * 10_000
    assert list(backend.names("tmp")) == []


@pytest.mark.slow
@pytest.mark.parametrize("no_links", [errno.EPERM], indirect=True)
def test_killed_around_a_rename(no_links: int, tmp_path: Path) -> None:
    scenario = SCENARIOS["commit"]
    template = tmp_path / "template"
    template.mkdir()
    scenario.build(template)
    wanted: Expected = expected(scenario, template, tmp_path / "calm")
    counted = tmp_path / "counted"
    shutil.copytree(template, counted)
    with Steps(counted / "repo" / ".ckpt").taken() as steps:
        scenario.act(counted)
    links = [at for at, step in enumerate(steps.seen) if step.operation == "link"]
    for at, phase in ((at, phase) for at in links for phase in (BEFORE, AFTER)):
        root = tmp_path / f"{at}-{phase}"
        shutil.copytree(template, root)
        assert killed(root / "repo" / ".ckpt", partial(scenario.act, root), at, phase)
        wanted.check(scenario, root)


@pytest.mark.parametrize("answer", ["EINVAL", "no such call"])
@pytest.mark.parametrize("no_links", [errno.EPERM], indirect=True)
def test_neither_is_there(
    no_links: int, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def __init__(self, *_: Any, **__: Any) -> None:
            if answer == "EINVAL":
                self.renameat2: Callable[..., int] = lambda *_: -1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EINVAL)
    with pytest.raises(StorageError, match="neither hard links") as caught:
        Repo.init(tmp_path)
    assert "file system" in (caught.value.hint or "")
    assert not (tmp_path / ".ckpt" / "format").exists()


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        calm(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    Repo.init(tmp_path)


@pytest.mark.parametrize("no_links", [errno.EPERM], indirect=True)
def test_a_history_without_links(no_links: int, tmp_path: Path) -> None:
    save(tmp_path, range(1, 4))
    repo = Repo.init(tmp_path / "repo")
    for step in range(1, 4):
        repo.commit_path(tmp_path / f"step-{step}.pt", message="")
    repo.gc()
    assert repo.verify().damage == []
    assert not list((repo.folder / "tmp").iterdir())
