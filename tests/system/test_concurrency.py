"""Processes and threads at once: nothing that was reported as committed is ever missing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs.errors import BusyError, ConflictError, MissingObjectError
from ckptvcs.gc.fading import Fader, Patch
from ckptvcs.gc.retention import Policy
from ckptvcs.history.format_file import raise_flags
from ckptvcs.history.refs import Move, Refs
from ckptvcs.ops import commit, describe
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store import leases
from tests.helpers import stress
from tests.helpers.crashing import states


@pytest.mark.parametrize(
    "seconds", [5.0, pytest.param(300.0, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_writers_readers_and_a_collector(seconds: float, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    repo = Repo.init(root)
    done = stress.run(root, seconds, writers=4, readers=4)
    assert done.commits
    assert done.reads
    assert done.sweeps
    repo = Repo.open(root)
    assert {entry.id for entry in repo.log(all_branches=True)} == done.commits
    for name in handle(repo).revisions.visible():
        found, true = (
            repo.checkout(f"id:{name}")["model"],
            handle(repo).catalog.commit(name).message,
        )
        assert all(torch.equal(found[k], w) for k, w in stress.content(true).items())
    repo.gc()
    assert not Repo.open(root).verify().damage


def test_threads_of_one_process(tmp_path: Path) -> None:
    Repo.init(tmp_path)
    shared, found, failed = Repo.open(tmp_path), list[str](), list[BaseException]()

    def work(number: int, repo: Repo) -> None:
        try:
            for step, state in enumerate(states(4), start=1):
                state["model"]["a"] += number  # what is the same may share its exact patch
                path = tmp_path / f"thread{number}.pt"
                torch.save(state, path)
                while True:
                    try:
                        made = repo.commit_path(path, message="", branch=f"thread{number}")
                        break
                    except (ConflictError, BusyError):
                        pass
                found.append(made.id)
                back = repo.checkout(f"id:{made.id}")
                assert back["step"] == step
                assert torch.equal(back["model"]["a"], state["model"]["a"])
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=work, args=(number, shared if number % 2 else Repo.open(tmp_path)))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert {e.id for e in shared.log(all_branches=True)} == set(found)
    assert len(found) == 16
    assert not shared.verify().damage


class Meanwhile:
    """Does something just before a writer looks at its lease for the last time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
        calm, self.done = leases.check_lease, False

        def check(*args: Any) -> None:
            if not self.done:
                self.done = True
                action()
            calm(*args)

        monkeypatch.setattr(commit, "check_lease", check)


def test_a_writer_that_slept_through_other_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, run = Repo.init(tmp_path), states(5)
    repo.commit(run[0], step=1)

    def others() -> None:
        other = Repo.open(tmp_path)
        for step in (2, 3, 4):
            other.commit(run[step - 1], step=step)

    Meanwhile(monkeypatch, others)
    with pytest.raises(ConflictError, match="moved by another writer"):
        repo.commit(run[4], step=5)
    assert [entry.step for entry in repo.log()] == [4, 3, 2, 1]
    repo.commit(run[4], step=5)
    assert [entry.step for entry in repo.log()] == [5, 4, 3, 2, 1]
    assert torch.equal(repo.checkout(5)["model"]["a"], run[4]["model"]["a"])
    assert not repo.verify().damage


def test_a_writer_whose_lease_was_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, run = Repo.init(tmp_path), states(3)
    repo.commit(run[0], step=1)

    def sweep() -> None:
        for lease in (repo.folder / "leases").iterdir():
            lease.unlink()
        assert Repo.open(tmp_path).gc().packs  # those of the commit that is being made

    Meanwhile(monkeypatch, sweep)
    with pytest.raises(ConflictError, match="lease"):
        repo.commit(run[1], step=2)
    assert [entry.step for entry in repo.log()] == [1]
    repo.commit(run[1], step=2)
    assert torch.equal(repo.checkout(2)["model"]["a"], run[1]["model"]["a"])
    assert not Repo.open(tmp_path).verify().damage


@pytest.mark.parametrize("swept", [True, False])
def test_a_writer_whose_lease_was_taken_away_just_before_its_branch_moved(
    tmp_path: Path, *, swept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, run = Repo.init(tmp_path), states(4)
    repo.commit(run[0], step=1)
    calm = Refs.make

    def make(refs: Refs, move: Move) -> None:
        for lease in (repo.folder / "leases").iterdir():
            lease.unlink()
        if swept:
            Repo.open(tmp_path).gc()
        calm(refs, move)

    with monkeypatch.context() as patch:
        patch.setattr(Refs, "make", make)
        if swept:
            with pytest.raises(ConflictError, match="lease"):
                repo.commit(run[1], step=2)
        else:
            repo.commit(run[1], step=2)
    steps = [1] if swept else [2, 1]
    assert [entry.step for entry in Repo.open(tmp_path).log()] == steps
    assert not Repo.open(tmp_path).verify().damage
    again = Repo.open(tmp_path)
    again.commit(run[2], step=3)
    assert [entry.step for entry in again.log()] == [3, *steps]
    assert torch.equal(again.checkout(3)["model"]["a"], run[2]["model"]["a"])
    assert not again.verify().damage


@pytest.mark.parametrize("when", ["dump_commit", "require_packs", "check_lease"])
def test_a_patch_that_fades_while_another_comes_to_share_it(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, run = Repo.init(tmp_path), states(5)
    for step in (1, 2):
        torch.save(run[step - 1], tmp_path / "run.pt")
        repo.commit_path(tmp_path / "run.pt", message="", step=step)
    late, done = list[Patch](), list[str]()
    where = describe if when == "dump_commit" else commit
    calm, delete = getattr(where, when), Fader.delete

    def others(*args: Any) -> Any:
        """Two commits on the branch that has the patch, which looked who shares it, and will delete
        it when they come to it.
        """
        if not done:
            done.append(when)
            with monkeypatch.context() as patch:
                patch.setattr(Fader, "delete", lambda _, patches: late.extend(patches))
                other = Repo.open(tmp_path)
                for step in (3, 4):
                    other.commit(run[step - 1], step=step)
        return calm(*args)

    monkeypatch.setattr(where, when, others)
    made = repo.commit_path(tmp_path / "run.pt", message="", step=2, branch="side")
    delete(handle(Repo.open(tmp_path)).fader(), late)
    for name in ("main@4", "main@3", made.id):
        step = 2 if name == made.id else int(name[-1])
        assert repo.entry(repo.resolve(name)).exact
        assert torch.equal(repo.checkout(name)["model"]["a"], run[step - 1]["model"]["a"])
    assert not repo.verify().damage


def test_what_fails_behind_the_commit_point_does_not_fail_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, run = Repo.init(tmp_path), states(3)
    for step in (1, 2):
        repo.commit(run[step - 1], step=step)

    def after(*args: Any, **kwargs: Any) -> list[Patch]:
        if repo.resolve("HEAD") == made_before:
            return calm(*args, **kwargs)
        raise MissingObjectError("another process has let it go")

    calm, made_before = Fader.after, repo.resolve("HEAD")
    monkeypatch.setattr(Fader, "after", after)
    made = repo.commit(run[2], step=3)
    assert [entry.step for entry in repo.log()] == [3, 2, 1]
    assert repo.resolve("HEAD") == made.id


def test_gc_waits_for_writers_and_they_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, run, found = Repo.init(tmp_path), states(2), list[str]()

    def collect() -> None:
        with leases.patience(0), pytest.raises(BusyError) as caught:
            Repo.open(tmp_path).gc()
        found.append(str(caught.value.hint))

    Meanwhile(monkeypatch, collect)
    repo.commit(run[0], step=1)
    assert "if that is gone for good, delete leases/" in found[0]


def test_a_reader_goes_on_while_what_it_reads_is_swept(tmp_path: Path) -> None:
    repo, run = Repo.init(tmp_path), states(6)
    for step, state in enumerate(run, start=1):
        repo.commit(state, step=step)
    reader = Repo.open(tmp_path)
    entries = reader.log()
    assert reader.checkout(6)["step"] == 6
    repo.gc(Policy(last=2), rekey=True, now=True)  # its frames lie elsewhere now
    for entry in entries[:2]:
        true = run[(entry.step or 0) - 1]["model"]["a"]
        assert torch.equal(reader.checkout(f"id:{entry.id}")["model"]["a"], true)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 8, 13, 21, 34])
def test_verify_while_others_commit_and_collect(at: int, tmp_path: Path) -> None:
    repo, run = Repo.init(tmp_path), states(6)
    for step in (1, 2, 3, 4):
        repo.commit(run[step - 1], step=step)
    ticks = list[int]()

    def meanwhile(_: int) -> None:
        ticks.append(0)
        if len(ticks) == at + 1:
            other = Repo.open(tmp_path)
            other.commit(run[4], step=5)  # the patches of others fade
            other.gc(Policy(last=3), now=True)
            other.commit(run[5], step=6)

    report = repo.verify(meanwhile)
    assert len(ticks) > at
    assert not report.damage
    assert not repo.verify().damage


def test_two_flags_raised_at_once(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    threads = [
        threading.Thread(target=raise_flags, args=(handle(repo).backend, "gc", flag))
        for flag in ("pins", "drops")
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flags = json.loads((repo.folder / "format").read_text())["flags"]["gc"]
    assert sorted(flags) == ["drops", "pins"]
    assert not list((repo.folder / "marks").iterdir())
