"""gc beside writers: whatever they do at any of its steps, nothing that is needed goes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.errors import CkptError, NotFoundError
from ckptvcs.gc import repack
from ckptvcs.gc import sweep as sweeping
from ckptvcs.gc.collect import Collector
from ckptvcs.gc.retention import Best, Policy
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import set_ref
from ckptvcs.store import leases
from ckptvcs.store.ids import ObjectId

STEPS = 8


def state(step: int) -> dict[str, Any]:
    draw = np.random.default_rng(step)
    return {"model": {"w": draw.standard_normal(600, np.float32)}, "step": step}


class Writer:
    """Another process that uses the repository while gc is at one of its steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, dict[str, int]()

    def commit_new(self) -> None:
        made = Repo.open(self.folder).commit(state(100), step=100)
        self.said[made.id] = 100

    def commit_what_is_dropped(self) -> None:
        made = Repo.open(self.folder).commit(state(3), step=103)  # shares what commit 3 has
        self.said[made.id] = 3

    def commit_twice(self) -> None:
        self.commit_new()
        repo = Repo.open(self.folder)
        made = repo.commit(state(101), step=101)
        self.said[made.id] = 101

    def tag_what_is_dropped(self) -> None:
        repo = Repo.open(self.folder)
        try:
            name = repo.resolve(2)
            set_ref(handle(repo), "tags", "kept", name, "tag")
        except NotFoundError:
            return  # gc had said so before
        self.said[name] = 2

    def branch_off_what_is_dropped(self) -> None:
        repo = Repo.open(self.folder)
        try:
            name = repo.resolve(3)
            set_ref(handle(repo), "heads", "other", name, "branch")
        except NotFoundError:
            return
        self.said[name] = 3

    def note_the_best(self) -> None:
        repo = Repo.open(self.folder)
        try:
            name = repo.resolve(2)
            repo.note(name, metrics={"eval": 99.0})
        except NotFoundError:
            return
        self.said[name] = 2

    def check(self, repo: Repo) -> None:
        report = repo.verify()
        assert not report.damage
        for name, step in self.said.items():
            back = repo.checkout(f"id:{name}")["model"]["w"]
            assert back.tobytes() == state(step)["model"]["w"].tobytes()


ACTS: dict[str, Callable[[Writer], None]] = {
    "commit": Writer.commit_new,
    "commit of shared values": Writer.commit_what_is_dropped,
    "two commits": Writer.commit_twice,
    "tag": Writer.tag_what_is_dropped,
    "branch": Writer.branch_off_what_is_dropped,
}


class Interrupted:
    """Calls something at the n-th place where gc lets writers in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.places, self._at, self._act = 0, at, act
        plan, exclusive, copy = Collector.plan, leases.exclusive, repack.copy_kept

        def planned(*args: Any, **kwargs: Any) -> Any:
            self._here()
            made = plan(*args, **kwargs)
            self._here()
            return made

        def let_in(*args: Any, **kwargs: Any) -> Any:
            self._here()
            return exclusive(*args, **kwargs)

        def copied(*args: Any) -> None:
            self._here()
            copy(*args)
            self._here()

        monkeypatch.setattr(Collector, "plan", planned)
        monkeypatch.setattr(sweeping, "exclusive", let_in)
        monkeypatch.setattr(sweeping, "copy_kept", copied)
        monkeypatch.setattr(sweeping, "BATCH", 3)

    def _here(self) -> None:
        self.places += 1
        if self.places == self._at:
            self._act()


@pytest.mark.parametrize(
    ("act", "codec"),
    [
        *(
            pytest.param(act, "near", marks=() if number % 2 else pytest.mark.slow)
            for number, act in enumerate(ACTS)
        ),
        ("commit of shared values", "lossless"),
        *(
            pytest.param(act, "lossless", marks=pytest.mark.slow)
            for act in ACTS
            if act != "commit of shared values"
        ),
    ],
)
def test_whatever_writers_do_at_any_step_of_gc_nothing_needed_goes(
    act: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    for at in itertools.count(1):
        with monkeypatch.context() as patched:
            folder = tmp_path / str(at)
            repo = Repo.init(folder, codec=codec)
            if codec == "near":
                repo.configure("keep-exact", "100")
            for step in range(1, STEPS + 1):
                repo.commit(state(step), step=step)
            writer = Writer(folder)
            place = Interrupted(patched, at, lambda w=writer: ACTS[act](w))  # type: ignore[misc]
            repo.gc(Policy(last=2), now=True)
            writer.check(Repo.open(folder))
            if place.places < at:
                break
            seen = at
    assert seen >= 8  # windows, plans and copies


def test_a_note_at_any_step_of_gc_is_kept_and_its_commit_if_it_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = []
    for at in itertools.count(1):
        with monkeypatch.context() as patched:
            folder = tmp_path / str(at)
            repo = Repo.init(folder, codec="lossless")
            for step in range(1, STEPS + 1):
                repo.commit(state(step), step=step, metrics={"eval": step})
            writer = Writer(folder)
            place = Interrupted(patched, at, writer.note_the_best)
            repo.gc(Policy(last=2, best=(Best("eval", "max"),)))
            again = Repo.open(folder)
            writer.check(again)
            for name in writer.said:
                assert again.entry(ObjectId(name)).metrics == {"eval": 99.0}
            noted.append(bool(writer.said))
            if place.places < at:
                break
    assert {True, False} == set(noted[:-1])


def test_gc_waits_for_writers_and_lets_new_ones_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo.init(tmp_path)
    for step in range(1, STEPS + 1):
        repo.commit(state(step), step=step)
    other = Repo.open(tmp_path)
    writing = leases.lease(handle(other).catalog.store.backend)
    rests = list[float]()

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 2:
            Repo.open(tmp_path).commit(state(100), step=100)
        if len(rests) == 4:
            writing.__exit__(None, None, None)

    monkeypatch.setattr("time.sleep", rest)
    writing.__enter__()
    repo.gc(Policy(last=1), now=True)
    assert len(rests) == 4
    assert [entry.step for entry in repo.log()] == [100, STEPS]
    assert not repo.verify().damage


def test_a_second_gc_is_refused_at_any_time(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    with (
        leases.sole(handle(repo).catalog.store.backend),
        pytest.raises(CkptError, match="another gc"),
    ):
        Repo.open(tmp_path).gc()
    with (
        leases.sole(handle(repo).catalog.store.backend),
        pytest.raises(CkptError, match="another gc"),
    ):
        Repo.open(tmp_path).repair()


def test_who_holds_a_lease_gets_another_one_while_gc_waits_for_him(tmp_path: Path) -> None:
    backend = handle(Repo.init(tmp_path)).catalog.store.backend
    with leases.lease(backend):
        waiting = leases.exclusive(backend, wait=True)
        with leases.patience(0), pytest.raises(CkptError):
            waiting.__enter__()
        mark = leases.hold_file(backend, leases.EXCLUSIVE)
        with mark, leases.patience(0), leases.lease(backend) as inner:
            leases.check_lease(backend, inner)
    mark = leases.hold_file(backend, leases.EXCLUSIVE)
    busy = pytest.raises(CkptError, match="gc is sweeping")
    with mark, leases.patience(0), busy, leases.lease(backend):
        pass


def test_commits_that_let_patches_fade_do_not_disturb_gc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo.init(tmp_path, codec="near")
    for step in range(1, STEPS + 1):
        repo.commit(state(step), step=step)
    plans = list[int]()
    plan = Collector.plan

    def counted(*args: Any, **kwargs: Any) -> Any:
        made = plan(*args, **kwargs)
        plans.append(1)
        Repo.open(tmp_path).commit(state(100 + len(plans)), step=100 + len(plans))
        return made

    monkeypatch.setattr(Collector, "plan", counted)
    repo.gc(Policy(last=3), now=True)
    assert len(plans) == 1
    assert not Repo.open(tmp_path).verify().damage
