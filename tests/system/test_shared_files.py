"""A crash or a refusal while a bundle file is written or cloned: nothing half is visible."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from ckptvcs.errors import CkptError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.bundling import history, steps
from tests.helpers.faults import Steps, cuts, killed, refused

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
CUTS = 1000 if NIGHTLY else 10


@dataclass(frozen=True)
class Act:
    """What is cut, in a folder that has a repository and a bundle file already."""

    run: Callable[[Path], object]
    target: str

    def look(self, root: Path) -> None:
        """What the target is, if it is there: whole."""
        target = root / self.target
        if target.exists():
            repo = (
                Repo.open(root / "clone") if target.is_dir() else Repo.clone(target, root / "look")
            )
            assert steps(repo) == [3, 4]
            assert not repo.verify().damage


def _bundle(root: Path) -> None:
    Repo.open(root / "repo").bundle("3..4", root / "new.ckptz")


def _clone(root: Path) -> None:
    Repo.clone(root / "some.ckptz", root / "clone")


ACTS = {"bundle": Act(_bundle, "new.ckptz"), "clone": Act(_clone, "clone/.ckpt")}


@pytest.fixture(params=ACTS)
def act(request: pytest.FixtureRequest) -> Act:
    return ACTS[request.param]


@pytest.fixture
def folders(cut_folder: Path) -> Callable[[], Path]:
    """Make folders to try in, each with the same repository and bundle file."""
    repo = history(cut_folder / "repo", 4)
    repo.bundle("3..4", cut_folder / "some.ckptz")
    handle(repo).catalog.store.index.close()
    count = 0

    def make() -> Path:
        nonlocal count
        count += 1
        root = cut_folder / str(count)
        root.mkdir()
        for name in ("repo", "some.ckptz"):
            (root / name).symlink_to(cut_folder / name)
        return root

    return make


def taken(act: Act, root: Path) -> Steps:
    """The steps of an act that nothing cuts."""
    with Steps(root).taken() as seen:
        act.run(root)
    act.look(root)
    return seen


def test_killed_at_any_step(act: Act, folders: Callable[[], Path]) -> None:
    seen = taken(act, folders()).seen
    reached = 0
    for at, phase in cuts(seen, CUTS, seed=len(seen)):
        root = folders()
        reached += killed(root, partial(act.run, root), at, phase)
        act.look(root)
        if not (root / act.target).exists():
            act.run(root)  # a second try works
        act.look(root)
    assert reached > len({step.operation for step in seen})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_refused_at_any_step(act: Act, folders: Callable[[], Path], code: int) -> None:
    seen = taken(act, folders()).seen
    for at, phase in cuts(seen, CUTS // 2, seed=code):
        root = folders()
        before = {path.name for path in root.iterdir()}
        why = OSError(code, os.strerror(code))
        error = refused(root, partial(act.run, root), at, phase, why, lasting=code != errno.EIO)
        if error is None:  # the step was not needed
            act.look(root)
            continue
        assert isinstance(error, CkptError)
        left = {path.name for path in root.iterdir()} - before
        if not (root / act.target).exists() and code == errno.ENOSPC:
            assert not left, "debris"
        act.look(root)


def test_interrupted_at_any_step(act: Act, folders: Callable[[], Path]) -> None:
    seen = taken(act, folders()).seen
    for at, phase in cuts(seen, CUTS // 2, seed=1):
        root = folders()
        before = {path.name for path in root.iterdir()}
        error = refused(root, partial(act.run, root), at, phase, KeyboardInterrupt(), lasting=False)
        if error is not None and not (root / act.target).exists():
            assert {path.name for path in root.iterdir()} == before, "debris"
        act.look(root)


def test_a_file_that_changes_while_it_is_read(folders: Callable[[], Path]) -> None:
    """The file is another one at each look: what comes of it is whole, or nothing."""
    root = folders()
    data = (root / "some.ckptz").read_bytes()
    target = root / "moving.ckptz"
    for cut in range(0, len(data), max(1, len(data) // 12)):
        target.write_bytes(data)

        def damage(_: int, cut: int = cut) -> None:
            with target.open("r+b") as file:
                file.seek(cut)
                file.write(b"damaged")

        clone = root / f"clone-{cut}"
        with suppress(CkptError):
            assert not Repo.clone(target, clone, progress=damage).verify().damage
