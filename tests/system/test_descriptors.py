"""Too few file descriptors: a documented error or success, never damage."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ckptvcs.errors import StorageError
from ckptvcs.repo import Repo
from tests.helpers.crashing import SCENARIOS, Cut, Snapshot
from tests.helpers.faults import apart

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
ROOMS = range(16) if NIGHTLY else (1, 4)
ACTS = ("commit", "gc", "import", *(("commit exactly", "rekey", "repack") if NIGHTLY else ()))


def starved(room: int, act: Callable[[], object]) -> bool:
    """Whether `act` is done with `room` descriptors; True or a StorageError with a hint."""
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)
    open_now = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + room, open_now + room))
    held: list[int] = []
    while len(held) < open_now:  # the holes below
        try:
            held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            break
    for descriptor in held[len(held) - min(room, len(held)) :]:
        os.close(descriptor)
    try:
        act()
    except StorageError as error:
        if not error.hint:
            raise
        return False
    return True


@pytest.mark.parametrize("name", ACTS)
def test_too_few(name: str, cut_folder: Path) -> None:
    cut = Cut(SCENARIOS[name], cut_folder)
    done = 0
    for room in (*ROOMS, 60):
        root = cut.copy()
        done += apart(partial(starved, room, partial(cut.scenario.act, root)))
        cut.expected.check(cut.scenario, root)
        shutil.rmtree(root)
    assert 0 < done <= len(ROOMS)


def test_a_checkout_with_too_few(cut_folder: Path) -> None:
    cut = Cut(SCENARIOS["commit"], cut_folder)
    root = cut.copy()
    before = Snapshot.of(root)
    target = cut_folder / "out.pt"
    done = 0
    for room in (*ROOMS, 60):
        act = partial(_checkout, root, target)
        complete = apart(partial(starved, room, act))
        assert target.exists() == complete
        done += complete
        target.unlink(missing_ok=True)
        assert not list(cut_folder.glob(".*"))
    assert 0 < done <= len(ROOMS)
    assert Snapshot.of(root) == before


def _checkout(root: Path, target: Path) -> None:
    repo = Repo.open(root / "repo")
    repo.checkout_files(repo.resolve(3), target)
