"""What fails in the background is tried again from its copy, or raised once: no commit is lost."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import CkptError, Repo
from ckptvcs.background import process
from ckptvcs.background.shared_state import Staging
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import client
from ckptvcs.store.leases import exclusive
from tests.helpers.comparing import same
from tests.helpers.dying import MOMENTS
from tests.helpers.profiles import short

State = dict[str, Any]


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    with Repo.init(tmp_path / "repo", codec="lossless") as repo:
        yield repo


class Grief:
    """Lets the processes that commit in the background come to grief from now on."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file, self._patch = tmp_path / "struck", monkeypatch

    def begin(self, moment: str, how: str, times: int = 1) -> None:
        arguments = f"{moment!r}, {how!r}, {str(self._file)!r}, {times}"
        start = f"from tests.helpers.dying import serve; serve({arguments})"
        self._patch.setattr(process, "SERVER_CODE", start)
        self._file.touch()

    @property
    def count(self) -> int:
        return len(self._file.read_text())

    def end(self) -> None:
        self._file.unlink()


@pytest.fixture
def grief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grief:
    return Grief(tmp_path, monkeypatch)


def state(number: int, size: int = 1000) -> State:
    return {"model": {"w": np.random.default_rng(number).standard_normal(size, dtype=np.float32)}}


def steps(repo: Repo) -> list[int | None]:
    return [entry.step for entry in reversed(repo.log())]


@pytest.mark.parametrize(
    "grown", short([[1], [1, 3, 5, 7], [2], [1, 2], [2, 3], [3, 4, 7]], [[1, 3, 5, 7]])
)
def test_copies_that_grow(grown: list[int], repo: Repo) -> None:
    sizes = [1000 + 7000 * sum(step >= one for one in grown) for step in range(9)]
    run = [state(step, size) for step, size in enumerate(sizes)]
    for step, one in enumerate(run):
        repo.commit_async(one, step=step)
    repo.wait()
    assert steps(repo) == list(range(9))
    assert all(same(repo.checkout(step), one) for step, one in enumerate(run))


@pytest.mark.parametrize(
    ("moment", "how"),
    short(
        [(moment, how) for moment in MOMENTS for how in ("SIGKILL", "SIGSEGV", "KeyError")],
        [("answer", "SIGKILL"), ("job", "SIGSEGV"), ("branch", "KeyError")],
    ),
)
def test_a_commit_is_made_once_whenever_it_is_interrupted(
    moment: str, how: str, repo: Repo, grief: Grief
) -> None:
    grief.begin(moment, how)
    run = [state(number) for number in range(3)]
    for one, step in zip(run, (5, 3, 4), strict=True):  # the second one starts a branch
        future = repo.commit_async(one, step=step, message=f"m{step}", metrics={"loss": step})
        entry = future.result()
        assert (entry.step, entry.message, entry.metrics) == (step, f"m{step}", {"loss": step})
    repo.wait()
    assert grief.count == 1
    head = repo.head()
    assert head is not None
    assert head.branch == "main-2"
    assert steps(repo) == [3, 4]
    assert sorted(str(entry.step) for entry in repo.log(all_branches=True)) == ["3", "4", "5"]
    assert all(
        same(repo.checkout(f"m{'ain-2' if step < 5 else 'ain'}@{step}"), one)
        for one, step in zip(run, (5, 3, 4), strict=True)
    )
    assert not repo.verify().damage


@pytest.mark.parametrize("moment", short(MOMENTS, ["branch"]))
def test_a_branch_that_moved_is_followed_by_head(moment: str, repo: Repo, grief: Grief) -> None:
    repo.commit(state(0), step=5)
    grief.begin(moment, "SIGKILL")
    assert repo.commit_async(state(1), step=3).result().step == 3
    assert steps(repo) == [3]
    assert repo.log(1)[0].branch == "main-2"


@pytest.mark.slow
def test_where_no_process_lives_this_one_commits(
    repo: Repo, grief: Grief, caplog: pytest.LogCaptureFixture
) -> None:
    run = [state(step, 1000 * (step + 1)) for step in range(3)]
    grief.begin("start", "SIGKILL", times=1000)
    for step, one in enumerate(run):
        repo.commit_async(one, step=step)
    repo.wait()
    assert grief.count == 3 * process.MAX_PROCESSES  # and no more
    assert steps(repo) == [0, 1, 2]
    assert all(same(repo.checkout(step), one) for step, one in enumerate(run))
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    grief.end()
    assert repo.commit_async(state(3), step=3).result().step == 3


def test_where_none_can_be_started(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/nowhere/python")
        assert repo.commit_async(state(1), step=1).result().step == 1
    assert repo.commit_async(state(2), step=2).result().step == 2
    assert steps(repo) == [1, 2]


@pytest.mark.parametrize(
    ("moment", "how", "times"),
    short(
        [
            ("job", "SIGSEGV", process.MAX_PROCESSES),  # this process shall not die of it
            ("job", "KeyError", process.MAX_ATTEMPTS),
            ("announced", "OSError", process.MAX_ATTEMPTS),
        ],
        [("job", "SIGSEGV", process.MAX_PROCESSES)],
    ),
)
def test_what_fails_again_is_raised_once(
    moment: str, how: str, times: int, repo: Repo, grief: Grief
) -> None:
    repo.commit_async(state(1), step=1).result()
    repo.close()
    grief.begin(moment, how, times)
    failed = repo.commit_async(state(2), step=2)
    assert isinstance(failed.exception(), CkptError)
    with pytest.raises(CkptError, match=how):
        repo.commit_async(state(3), step=3)
    assert grief.count == times
    assert repo.commit_async(state(3), step=3).result().step == 3
    repo.close()
    assert steps(repo) == [1, 3]
    assert not repo.verify().damage


def test_one_that_dies_with_nothing_to_do(repo: Repo) -> None:
    for step in range(3):
        assert repo.commit_async(state(step), step=step).result().step == step
        process = client(repo).worker.process
        process.kill()
        process.wait()
    assert steps(repo) == [0, 1, 2]


def test_a_commit_waits_for_gc(repo: Repo) -> None:
    with exclusive(handle(repo).catalog.store.backend):
        future = repo.commit_async(state(1), step=1)
        with pytest.raises(TimeoutError):
            future.result(timeout=0.3)
    assert future.result().step == 1
    repo.wait()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_without_room_for_a_copy_training_waits(
    where: str, repo: Repo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = [state(step, 100_000 if step == 2 else 1000) for step in range(5)]

    def limited(file: int, *args: int) -> None:
        if args[-1] > 200_000:
            raise OSError(errno.ENOSPC, "no space left")
        calm(file, *args)

    if where == "disk":
        monkeypatch.delattr(os, "memfd_create")
    name = "ftruncate" if where == "memory" else "posix_fallocate"
    calm = getattr(os, name)
    monkeypatch.setattr(os, name, limited)
    for step, one in enumerate(run):
        future = repo.commit_async(one, step=step)
        assert future.done() or step != 2
        assert future.result().step == step
    repo.close()
    assert steps(repo) == [0, 1, 2, 3, 4]
    assert all(same(repo.checkout(step), one) for step, one in enumerate(run))
    assert "no space left" in caplog.text


def test_a_copy_without_room_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    create = os.memfd_create

    def noting(name: str) -> int:
        file = create(name)
        made.append(os.fstat(file).st_ino)
        return file

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    def held() -> list[int]:
        """Which of the copies that were made are open, or mapped."""
        inodes = set()
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(path.stat().st_ino)
        return [inode for inode in made if inode in inodes]

    monkeypatch.setattr(os, "memfd_create", noting)
    staging, blocks = Staging(), [memoryview(bytes(size)) for size in (100, 10**6)]
    (before,) = staging.copies(blocks[:1])
    assert held() == made
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(OSError, match="no space left"):
            staging.copies(blocks)
    assert bytes(before) == bytes(100)  # whoever reads what was too small keeps it
    assert held() == made[:1]
    del before
    assert held() == []
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr("mmap.mmap", full)
            with pytest.raises(OSError, match="no space left"):
                staging.copies(blocks)
        assert held() == made[-1:]  # one without a map, until the next one is made
    assert [len(copy) for copy in staging.copies(blocks)] == [100, 10**6]
    assert os.fstat(staging.handle()[0]).st_size == staging.handle()[1] == len(staging.memory)
    assert held() == made[-1:]


def test_a_copy_on_a_disk_has_real_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    staging = Staging()
    staging.copies([memoryview(bytes(1 << 20))])
    # A full disk is met here, as an error, not by whoever writes to the map, as a signal.
    assert os.fstat(staging.handle()[0]).st_blocks * 512 >= 1 << 20


def _changing(seed: int, count: int) -> Iterator[State]:
    """States that grow, shrink, and change what they hold."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        names = [f"layer{n}" for n in range(int(rng.integers(0, 6)))]
        size = int(10 ** rng.uniform(0, 5))
        weights = {
            name: rng.standard_normal(int(rng.integers(0, size + 1)), np.float32) for name in names
        }
        moments = {name: {"exp_avg": w * 0, "step": step} for name, w in weights.items()}
        one: State = {"model": weights, "epoch": step}
        if step % 3:
            one["optimizer"] = {"state": moments}
        if step % 7 == 3:
            one["extra"] = {"text": "x" * int(rng.integers(0, 5000)), "seen": list(range(step))}
        if step % 5 == 0:
            one["counts"] = rng.integers(0, 9, size, dtype=np.int64)
        yield one


def _kill(repo: Repo) -> bool:
    """Kill the process that commits, if there is one at this moment."""
    process = client(repo).worker.process
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


_SHORT, _LONG = 24, 500


@pytest.mark.parametrize("count", [_SHORT, pytest.param(_LONG, marks=pytest.mark.slow)])
def test_none_of_many_is_lost(count: int, repo: Repo) -> None:
    seed = int(os.environ.get("CKPT_TEST_SEED", "1"))
    for step, one in enumerate(_changing(seed, count)):
        repo.commit_async(one, step=step)
    repo.wait()
    _all_there(repo, seed, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [_SHORT, _LONG])
def test_none_of_many_is_lost_when_processes_are_killed(count: int, repo: Repo) -> None:
    seed = int(os.environ.get("CKPT_TEST_SEED", "2"))
    repo.commit_async(state(0), step=0).result()
    rng, killed = random.Random(seed), 0
    for step, one in enumerate(_changing(seed, count)):
        repo.commit_async(one, step=step + 1)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 0.03))
            killed += _kill(repo)
    repo.wait()
    assert killed
    _all_there(repo, seed, count, first=1)


def _all_there(repo: Repo, seed: int, count: int, first: int = 0) -> None:
    assert steps(repo) == list(range(count + first))
    for step, one in enumerate(_changing(seed, count), start=first):
        assert same(repo.checkout(step), one), step
    assert not repo.verify().damage
