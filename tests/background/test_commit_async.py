"""Commits in the background: the copy counts, the order is kept, and nothing fails in silence."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptvcs import CkptError, InvalidInputError, LogEntry, Repo, StorageError
from ckptvcs.background.client import Client
from ckptvcs.background.process import Done
from ckptvcs.background.shared_state import Staging, StateMessage, unpack
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.request import Request
from ckptvcs.parallel import ordered_map
from ckptvcs.repo import client
from ckptvcs.store.local import LocalWriter
from tests.helpers.command_line import environment
from tests.helpers.comparing import same
from tests.helpers.crashing import states
from tests.helpers.profiles import short


class Here:
    """What a worker is, but a thread of this process, where tests can step in."""

    def __init__(self, folder: Path, _: object) -> None:
        self._repo = Repo.open(folder)

    def commit(self, staging: Staging, message: StateMessage, request: Request) -> Done:
        state = unpack(message, staging.memory)
        made = commit_checkpoint(handle(self._repo), replace(request, checkpoint=state))
        return Done(made.id, made.branch)

    def close(self) -> None:
        pass


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    with Repo.init(tmp_path / "beside") as repo:
        yield repo


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    monkeypatch.setattr("ckptvcs.background.client.Worker", Here)
    return Repo.init(tmp_path / "near")


class Gate:
    """Lets commits come to their end one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Semaphore(0)
        calm = LocalWriter.publish

        def publish(writer: LocalWriter, name: str) -> None:
            if name.startswith("meta/"):
                assert self.open.acquire(timeout=60)
            calm(writer, name)

        monkeypatch.setattr(LocalWriter, "publish", publish)


def test_the_head_moves_after_the_commits_in_the_background(repo: Repo) -> None:
    repo.commit({"w": np.full(200, 1)}, step=1)
    repo.branch("other")
    late = repo.commit_async({"w": np.full(200, 2)}, step=2)
    assert repo.move_head("other") == "other"
    assert late.result().branch == "main"
    assert repo.commit({"w": np.full(200, 3)}, step=2).branch == "other"


def test_the_copy_counts(near: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, run = Gate(monkeypatch), states(1)[0]
    before = run["model"]["a"].clone()
    future = near.commit_async(run, step=1, metrics={"loss": 2})
    run["model"]["a"].zero_()
    assert not future.done()
    assert not near.log()
    gate.open.release()
    assert future.result().step == 1
    assert future.result().exact
    assert torch.equal(near.checkout(1)["model"]["a"], before)


def test_order_is_kept_and_the_third_call_waits(
    near: Repo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, run = Gate(monkeypatch), states(5)
    first = near.commit_async(run[0], step=1)
    second = near.commit_async(run[1], step=2)
    assert not caplog.records
    threading.Timer(0.2, gate.open.release).start()
    third = near.commit_async(run[2], step=3)
    assert first.done()
    assert not second.done()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    for _ in range(4):
        gate.open.release()
    assert near.commit(run[3], step=4).step == 4  # after those in the background
    assert second.done()
    assert third.done()
    near.commit_async(run[4], step=5)
    near.close()
    assert [entry.step for entry in near.log()] == [5, 4, 3, 2, 1]
    for step, state in enumerate(run, start=1):
        back = near.checkout(step)
        assert near.entry(near.resolve(step)).commit.parents or step == 1
        assert same(back, state) is (step > 3)  # the newest two are exact
    assert not near.verify().damage


def test_a_training_that_always_waits_is_told_once(
    near: Repo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, run = Gate(monkeypatch), iter(states(10))

    def busy(calls: int) -> None:
        for call in range(calls):
            if call >= 2:  # the two copies are taken
                threading.Timer(0.2, gate.open.release).start()
            near.commit_async(next(run))
        for _ in range(2):
            gate.open.release()
        near.wait()

    busy(5)
    assert [("consider" in text, "3 times" in text) for text in caplog.messages] == [
        (True, False),
        (False, True),
    ]
    caplog.clear()
    busy(2)
    assert not caplog.messages
    busy(3)  # a new state of waiting, of one call: no number
    assert ["consider" in text for text in caplog.messages] == [True]
    assert len(near.log()) == 10


def test_errors_come_at_the_next_call(near: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    run = states(4)
    near.commit_async(run[0], step=1).result()
    with monkeypatch.context() as patch:
        patch.setattr(LocalWriter, "publish", _full)
        failed = near.commit_async(run[1], step=2)
        assert isinstance(failed.exception(), StorageError)
    with pytest.raises(StorageError, match="no room"):
        near.commit_async(run[2], step=3)
    near.commit_async(run[2], step=3)  # it was said once
    near.wait()
    with monkeypatch.context() as patch:
        patch.setattr(LocalWriter, "publish", _full)
        near.commit_async(run[3], step=4)
        with pytest.raises(StorageError, match="no room"):
            near.close()
    near.close()
    assert [entry.step for entry in near.log()] == [3, 1]
    assert torch.equal(near.checkout(3)["model"]["a"], run[2]["model"]["a"])
    again = Repo.open(near.root)
    again.commit(run[3], step=4)
    assert not again.verify().damage


def _full(*_: Any) -> None:
    raise StorageError("there is no room")


def test_what_cannot_be_committed_is_said_at_once(near: Repo) -> None:
    for _ in range(5):  # and leaves no copy taken
        with pytest.raises(InvalidInputError):
            near.commit_async({"a": object()}, step=1)
    assert near.commit_async({"a": torch.zeros(10)}, step=1).result().step == 1


def test_copies_are_made_in_the_same_room(near: Repo) -> None:
    rooms = set()
    for step in range(6):
        near.commit_async(states(1)[0] | {"step": step}, step=step).result()
        staging = client(near).stage()
        rooms.add(np.frombuffer(staging.memory, np.uint8).ctypes.data)
        client(near).release(staging)
    assert len(rooms) <= 2


def test_a_checkout_while_a_commit_is_made(near: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    run = states(3)
    near.commit_async(run[0], step=1).result()
    gate = Gate(monkeypatch)
    near.commit_async(run[1], step=2)
    assert same(near.checkout(1), run[0])
    gate.open.release()
    near.wait()
    assert same(near.checkout(2), run[1])


def test_a_child_has_a_background_of_its_own(near: Repo) -> None:
    near.commit_async(states(1)[0], step=1).result()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            near.wait()
            made = near.commit_async(states(2)[1], step=2).result()
            assert made.step == 2
            near.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [entry.step for entry in near.log()] == [2, 1]


def worker(repo: Repo) -> int:
    """The process that commits for a repository that is open here."""
    return client(repo).worker.process.pid


def test_another_process_commits(repo: Repo) -> None:
    run = states(4)
    for step, state in enumerate(run[:3], start=1):
        future = repo.commit_async(state, step=step, message=f"m{step}", metrics={"loss": step})
        entry = future.result()
        assert (entry.step, entry.message, entry.metrics) == (step, f"m{step}", {"loss": step})
        assert same(repo.checkout(step), state)
    beside = worker(repo)
    assert beside != os.getpid()
    repo.configure("codec", "lossless")
    assert repo.commit_async(run[3], step=4).result().commit.codec == "lossless"
    assert worker(repo) == beside
    repo.close()
    with pytest.raises(ProcessLookupError):
        os.kill(beside, 0)
    assert [entry.commit.depth for entry in repo.log()][1:] == [2, 1, 0]
    assert not repo.verify().damage


def test_its_errors_are_those_of_a_commit(repo: Repo) -> None:
    state = states(1)[0]
    with pytest.raises(InvalidInputError, match="none"):
        repo.commit_async(state, step=1, codec="none")
    with pytest.raises(InvalidInputError, match="step"):
        repo.commit_async(state, step=-1)
    with pytest.raises(InvalidInputError, match="metric"):
        repo.commit_async(state, step=1, metrics={"loss": lambda: 1})  # type: ignore[dict-item]
    shutil.rmtree(repo.folder)
    failed = repo.commit_async(state, step=1).exception()
    assert isinstance(failed, CkptError)
    with pytest.raises(CkptError):
        repo.close()


def test_what_is_said_may_be_tensors(repo: Repo) -> None:
    loss = torch.tensor(2.0)
    said: Any = {"step": torch.tensor(4), "metrics": {"loss": loss.requires_grad_()}}
    future = repo.commit_async(states(1)[0], **said)
    with torch.no_grad():
        loss += 1
    assert (future.result().step, future.result().metrics) == (4, {"loss": 2.0})


def test_what_ends_the_loop_is_not_hidden(tmp_path: Path) -> None:
    def train() -> None:
        with Repo.init(tmp_path) as repo:
            shutil.rmtree(repo.folder)
            repo.commit_async(states(1)[0], step=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


@pytest.mark.parametrize(
    "number", short([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], [signal.SIGINT])
)
def test_a_signal_to_all_is_for_the_training(number: signal.Signals, repo: Repo) -> None:
    assert repo.commit_async(states(1)[0], step=1).result().step == 1
    beside = worker(repo)
    assert os.getpgid(beside) != os.getpgid(0)  # from its first moment on
    os.kill(beside, number)
    assert repo.commit_async(states(2)[1], step=2).result().step == 2
    assert worker(repo) == beside


def test_children_do_not_hold_it_up(repo: Repo) -> None:
    repo.commit_async(states(1)[0], step=1).result()
    beside = client(repo).worker
    os.set_inheritable(beside.pipe.fileno(), True)  # as in a child that is forked
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        repo.close()
        assert beside.process.returncode == 0  # it was not killed for want of an end
        child.kill()


_SCRIPT = """
import os, sys, torch, ckptvcs, ckptvcs.repo
repo = ckptvcs.Repo.init(sys.argv[1])
for step in range(3):
    future = repo.commit_async({"w": torch.full((1 << 18,), float(step))}, step=step)
    if step < 2:
        future.result()
print(ckptvcs.repo.client(repo).worker.process.pid, flush=True)
if sys.argv[2] == "die":
    os._exit(0)
"""


@pytest.mark.parametrize("way", short(["die", "end"], ["die"]))
def test_what_was_reported_as_done_is_there(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path), way]
    done = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE)
    beside = Path("/proc") / done.stdout.decode().strip()
    for _ in range(300):
        if not beside.exists():
            break
        time.sleep(0.1)
    assert not beside.exists()  # nobody is at work when training starts again
    repo = Repo.open(tmp_path)
    steps = [entry.step for entry in repo.log()]
    assert steps in ([[2, 1, 0]] if way == "end" else [[1, 0], [2, 1, 0]])
    assert not repo.verify().damage


def test_the_working_directory_is_no_place_for_modules(tmp_path: Path) -> None:
    script, here = tmp_path / "script" / "train.py", tmp_path / "here"
    for path, text in ((script, _SCRIPT), (here / "tokenize.py", "raise RuntimeError")):
        path.parent.mkdir()
        path.write_text(text)
    command = [sys.executable, str(script), str(tmp_path), "end"]
    subprocess.run(command, check=True, env=environment(), cwd=here, stdout=subprocess.DEVNULL)
    assert len(Repo.open(tmp_path).log()) == 3


def test_turns_are_as_long_as_before_when_all_work_is_done() -> None:
    before = sys.getswitchinterval()
    one, two = (ordered_map(abs, range(9)) for _ in range(2))
    for work in (one, two, one, two):
        next(work)
        assert sys.getswitchinterval() < before
    assert list(one) == list(range(2, 9))
    assert sys.getswitchinterval() < before
    assert list(two) == list(range(2, 9))
    assert sys.getswitchinterval() == before


def test_each_failure_is_raised_once(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    background = Client(handle(repo))

    def fail(error: Exception) -> Callable[[], LogEntry]:
        def work() -> LogEntry:
            raise error

        return work

    first = background.submit(background.stage(), fail(StorageError("no room", hint="h")), "step 1")
    second = background.submit(background.stage(), fail(KeyError("x")), "step 2")
    assert [type(future.exception()) for future in (first, second)] == [StorageError, KeyError]
    with pytest.raises(StorageError) as raised:
        background.wait()
    assert raised.value.message == ("2 background commits failed: step 1: no room; step 2: 'x'")
    assert raised.value.hint == "h"
    background.wait()
    background.submit(background.stage(), fail(CkptError("so it is")), "step 3")
    with pytest.raises(CkptError, match=r"^so it is$"):
        background.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3
