"""Watch: what is complete is committed once, what is not waits, and originals go when they may."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ckptvcs import BusyError, InvalidInputError, NotFoundError, Repo
from ckptvcs.checkpoint import survey
from ckptvcs.checkpoint.layout import unreadable
from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.cli.app import app
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.watch import Watcher, WatchEvent
from ckptvcs.store.leases import exclusive, patience
from tests.helpers.command_line import environment
from tests.helpers.crashing import states


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def near(tmp_path: Path) -> Repo:
    return Repo.init(tmp_path / "repo")


def save(run: Path, *steps: int) -> None:
    for step, state in enumerate(states(max(steps)), start=1):
        if step in steps:
            torch.save(state, run / f"step-{step}.pt")


def watcher(repo: Repo, run: Path, **options: object) -> Watcher:
    return Watcher(handle(repo), run, settle=0, **options)  # type: ignore[arg-type]


def looks(watcher: Watcher, times: int = 2) -> list[WatchEvent]:
    return [event for _ in range(times) for event in watcher.look()]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_each_is_committed_once(near: Repo, run: Path) -> None:
    watch = watcher(near, run / "later")
    assert not looks(watch)
    (run / "later").mkdir()
    save(run / "later", 1, 2)
    (run / "later" / "log.txt").write_text("not one")
    (run / "later" / "last.ckpt").symlink_to("step-2.pt")
    events = looks(watch)
    assert [(event.name, event.step) for event in events] == [("step-1.pt", 1), ("step-2.pt", 2)]
    assert not watch.waiting
    assert not looks(watch)
    save(run / "later", 3)
    assert [event.step for event in looks(watch)] == [3]
    again = watcher(near, run / "later")  # after a restart
    assert not looks(again)
    assert [entry.step for entry in near.log()] == [3, 2, 1]
    assert names(run / "later") == ["last.ckpt", "log.txt", "step-1.pt", "step-2.pt", "step-3.pt"]


def test_what_is_written_anew_under_its_name(near: Repo, run: Path) -> None:
    watch = watcher(near, run)
    for state in states(3):
        torch.save(state, run / "last.pt")
        (event,) = looks(watch)
        assert event.step == state["step"]
    assert [entry.step for entry in near.log()] == [3, 2, 1]


def test_what_changes_still_waits(near: Repo, run: Path) -> None:
    watch = Watcher(handle(near), run, settle=0.2)
    save(run, 1)
    assert not looks(watch)
    assert watch.waiting
    time.sleep(0.25)
    (run / "step-1.pt").touch()
    assert not looks(watch)
    time.sleep(0.25)
    assert len(looks(watch)) == 1


def test_what_is_open_to_write_waits(near: Repo, run: Path) -> None:
    save(run, 1)
    watch = watcher(near, run)
    with (run / "step-1.pt").open("rb+"):
        assert not looks(watch)
        assert watch.waiting
    with (run / "step-1.pt").open("rb"):
        assert len(looks(watch)) == 1


def test_what_is_not_complete_waits(near: Repo, run: Path) -> None:
    save(run, 1)
    whole = (run / "step-1.pt").read_bytes()
    (run / "step-1.pt").write_bytes(whole[: len(whole) // 2])
    folder = run / "checkpoint-2"
    folder.mkdir()
    torch.save(states(2)[1]["model"], folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(whole)
    watch = watcher(near, run)
    (event,) = looks(watch)  # said once
    assert event.name == "step-1.pt"
    assert isinstance(event.problem, InvalidInputError)
    assert not near.log()
    (run / "step-1.pt").write_bytes(whole)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    assert [(e.name, e.step) for e in looks(watch)] == [("step-1.pt", 1), ("checkpoint-2", 2)]


def test_gc_is_waited_for(near: Repo, run: Path) -> None:
    save(run, 1)
    watch = watcher(near, run)
    with exclusive(handle(near).catalog.store.backend), patience(0):
        events = looks(watch)
        assert [type(event.problem) for event in events] == [BusyError]
        assert watch.waiting
    assert [event.step for event in looks(watch)] == [1]


def test_a_run_that_goes_back_starts_a_branch(near: Repo, run: Path) -> None:
    save(run, 1, 2)
    watch = watcher(near, run)
    looks(watch)
    other = states(2)[1]
    other["model"]["a"] += 1
    torch.save(other, run / "step-2.pt")
    (event,) = looks(watch)
    assert event.notes
    assert set(handle(near).refs.names("heads")) == {"main", "main-2"}
    save(run, 3)
    (event,) = looks(watch)
    assert near.entry(near.resolve("main-2@3")).id == event.id


def test_originals_that_are_kept_exactly_go(tmp_path: Path, run: Path) -> None:
    repo = Repo.init(tmp_path / "repo", codec="lossless")
    watch = watcher(repo, run, keep_local=1)
    save(run, 1, 2, 3)
    events = looks(watch)
    gone = [event for event in events if event.removal is not None]
    assert [event.name for event in gone] == ["step-1.pt", "step-2.pt"]
    assert names(run) == ["step-3.pt"]
    assert torch.equal(repo.checkout(1)["model"]["a"], states(1)[0]["model"]["a"])


def test_originals_that_are_near_stay_unless_that_is_accepted(near: Repo, run: Path) -> None:
    save(run, 1, 2, 3, 4)
    watch = watcher(near, run, keep_local=1)
    said = {
        event.name: event.removal.keep_reason
        for event in looks(watch, 4)
        if event.removal is not None
    }
    assert said["step-1.pt"] is not None
    assert "near" in said["step-1.pt"]
    assert said["step-3.pt"] is None  # exact, and pinned
    assert handle(near).refs.targets("pins") == {near.resolve(3)}
    assert names(run) == ["step-1.pt", "step-2.pt", "step-4.pt"]
    looks(watcher(near, run, keep_local=2, accept_near=True))
    assert names(run) == ["step-2.pt", "step-4.pt"]


def test_what_was_changed_behind_its_commit_stays(near: Repo, run: Path) -> None:
    save(run, 1, 2)
    watch = Watcher(handle(near), run, settle=0, keep_local=2)
    looks(watch)
    status = (run / "step-1.pt").stat()
    data = bytearray((run / "step-1.pt").read_bytes())
    data[len(data) // 2] ^= 1
    with (run / "step-1.pt").open("rb+") as file:
        file.write(data)
    os.utime(run / "step-1.pt", ns=(status.st_atime_ns, status.st_mtime_ns))
    save(run, 3)
    (kept,) = [event.removal for event in looks(watch) if event.removal is not None]
    assert kept.keep_reason is not None
    assert names(run) == ["step-1.pt", "step-2.pt", "step-3.pt"]


@pytest.mark.parametrize("options", [{"keep_local": 0}, {"codec": "zip"}])
def test_bad_settings(near: Repo, run: Path, options: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        watcher(near, run, **options)
    with pytest.raises(InvalidInputError):
        watcher(near, near.folder / "packs")


def _ckpt(root: Path, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ckptvcs", *map(str, args)],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def test_the_command_beside_a_trainer(near: Repo, run: Path) -> None:
    process = _ckpt(near.root, "watch", run, "--interval", "0.1", "--settle", "0.2", "--json")
    assert process.stdout is not None
    steps = []
    for step in (1, 2, 3):
        save(run, step)
        line = json.loads(process.stdout.readline())
        assert line["name"] == f"step-{step}.pt"
        assert line["commit"]["step"] == step
        steps.append(step)
    process.send_signal(signal.SIGKILL if len(steps) < 3 else signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    shutil.rmtree(near.folder / "cache")
    out, err = _ckpt(
        near.root, "watch", run, "--once", "--settle", "0.1", "--keep-local", "1", "--accept-near"
    ).communicate(timeout=60)
    assert not out
    assert err.count("removed: step-") == 2
    assert names(run) == ["step-3.pt"]
    save(run, 4)
    out, err = _ckpt(near.root, "watch", run, "--once", "--settle", "0.1").communicate(timeout=60)
    assert "step 4  step-4.pt" in out
    assert len(out.splitlines()) == 1


def test_a_folder_that_is_not_there(near: Repo) -> None:
    process = _ckpt(near.root, "watch", "nowhere", "--once")
    _, err = process.communicate(timeout=60)
    assert process.returncode == NotFoundError.exit_code
    assert "directory nowhere does not exist" in err


def test_what_would_not_be_committed_is_not_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    repo = Repo.init(run)  # in the very folder
    save(run, 1)
    (run / "events").mkdir()
    (run / "several").mkdir()
    save(run / "several", 1, 2)
    names = (
        "train.log",
        "metrics.csv",
        "step-2.pt.tmp",
        "events/tfevents.1",
        ".ckpt/cache/more",
        "several/step-1.pt",
    )
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((run / name).open("ab")) for name in names]
        watch = watcher(repo, run)
        assert [event.step for event in looks(watch)] == [1]
        assert watch.waiting == frozenset()
        for file in files:
            file.write(b"more")
            file.flush()
        assert not looks(watch)
        assert watch.waiting == frozenset()
        with (run / "step-1.pt").open("ab") as late:
            late.write(b"x")
            late.flush()
            assert not looks(watch)
            assert watch.waiting == watch.written == {"step-1.pt"}


def test_once_ends_though_more_keeps_coming(near: Repo, run: Path) -> None:
    save(run, 1)
    with (run / "train.log").open("w"):
        process = _ckpt(near.root, "watch", run, "--once", "--settle", "0.3")
        more = 0
        while process.poll() is None:
            more += 1
            (run / f"late-{more}.pt").write_bytes(b"not yet" * more)
            time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 2, err  # of the unreadable ones
    assert "step 1  step-1.pt" in out


def test_once_leaves_what_keeps_changing(
    near: Repo, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    shutil.copy(run / "step-1.pt", run / "last.pt")
    monkeypatch.setattr("ckptvcs.cli.watch._ONCE", 0.0)
    calm = Watcher.look

    def look(watch: Watcher) -> Iterator[WatchEvent]:
        shutil.copy(run / "step-1.pt", run / "new")
        (run / "new").replace(run / "last.pt")
        return calm(watch)

    monkeypatch.setattr(Watcher, "look", look)
    repo = ["--repo", str(near.folder.parent)]
    done = CliRunner().invoke(app, [*repo, "watch", str(run), "--once", "--settle", "0.1"])
    assert done.exit_code == 0, done.stderr
    assert "skipped: last.pt keeps changing" in done.stderr
    assert [entry.step for entry in near.log()] == [1]


def test_once_says_what_it_waits_for(near: Repo, run: Path) -> None:
    save(run, 1)
    with (run / "step-1.pt").open("ab"):
        process = _ckpt(near.root, "watch", run, "--once", "--settle", "0.05")
        assert process.stderr is not None
        assert process.stderr.readline() == "waiting: step-1.pt is open for writing\n"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "step 1  step-1.pt" in out


def test_what_the_system_refuses_once_is_read_at_the_next_look(
    near: Repo, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    calm, left = open_checkpoint, [errno.EIO, errno.EMFILE]

    def refused(path: Path, **options: object) -> object:
        if left:
            code = left.pop()
            raise unreadable(path, OSError(code, os.strerror(code))) from OSError(code, "")
        return calm(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(survey, "open_checkpoint", refused)
    watch = watcher(near, run)
    for _ in range(2):
        assert not [*watch.look()]
        assert watch.waiting == {"step-1.pt"}
    assert [event.step for event in watch.look()] == [1]
    save(run, 2)
    left += [errno.EIO] * 9
    problems = [event.problem for event in looks(watch, 5)]
    assert [type(problem) for problem in problems] == [InvalidInputError]  # said, and given up
    assert watch.waiting == frozenset()


def test_a_folder_that_the_system_refuses_to_list(
    near: Repo, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    watch, calm = watcher(near, run), os.scandir

    def refused(path: Path) -> object:
        if Path(path) == run:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return calm(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        events = looks(watch, 3)
        assert [(event.name, type(event.problem)) for event in events] == [
            (str(run), InvalidInputError)
        ]
        repo = ["--repo", str(near.folder.parent)]
        done = CliRunner().invoke(app, [*repo, "watch", str(run), "--once", "--settle", "0"])
        assert done.exit_code == 2
        assert "cannot read" in done.stderr
    assert [event.step for event in looks(watch, 3)] == [1]
    monkeypatch.setattr(os, "scandir", refused)
    assert [event.name for event in looks(watch, 2)] == [str(run)]
