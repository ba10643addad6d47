"""What the operating system refuses: a command says so in one line, what was there stays, nothing
half is visible, and the next try works.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from ckptvcs.errors import StorageError
from tests.helpers.crashing import SCENARIOS, Cut
from tests.helpers.faults import REFUSALS, Steps, cuts, refused

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
MOST = 10_000 if NIGHTLY else 30  # steps, of each act
EACH = 2 if NIGHTLY else 1  # refusals of each step
EVERY = 1 if NIGHTLY else 16  # of these steps


def test_refused_at_any_step(cut: Cut) -> None:
    root = cut.copy()
    with Steps(root / "repo" / ".ckpt").taken() as steps:
        cut.scenario.act(root)
    places = cuts(steps.seen, MOST, seed=0)
    chosen = range(sum(map(ord, cut.scenario.name)) % EVERY, len(places), EVERY)
    ended = 0
    for number, turn in ((number, turn) for number in chosen for turn in range(EACH)):
        at, phase = places[number]
        why = REFUSALS[(number + turn) % len(REFUSALS)]
        lasting = (number // EVERY + turn // len(REFUSALS)) % 2 == 1
        root = cut.copy()
        act = partial(cut.scenario.act, root)
        error = refused(root / "repo" / ".ckpt", act, at, phase, why, lasting=lasting)
        try:
            if isinstance(error, StorageError):
                assert error.hint
                assert "\n" not in error.message
            else:
                assert error is None or type(error) is type(why)
            ended += error is not None
            cut.expected.check(cut.scenario, root)
        except BaseException as wrong:
            wrong.add_note(f"step {at} {steps.seen[at]} {phase}, {why!r}, {lasting=}: {error}")
            raise
        shutil.rmtree(root)
    assert ended


def test_interrupted_again_and_again(cut_folder: Path) -> None:
    """No file stays open, although no other can be deleted either."""
    cut = Cut(SCENARIOS["rekey"], cut_folder)
    root = cut.copy()
    with Steps(root / "repo" / ".ckpt").taken() as steps:
        cut.scenario.act(root)
    writes = [number for number, step in enumerate(steps.seen) if step.operation == "write"]
    for at in writes[:: 1 if NIGHTLY else 12]:
        root = cut.copy()
        act = partial(cut.scenario.act, root)
        error = refused(
            root / "repo" / ".ckpt", act, at, "before", KeyboardInterrupt(), lasting=True
        )
        assert isinstance(error, KeyboardInterrupt)
        left = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]  # noqa: PTH208
        opened = [file.readlink() for file in left if file.exists()]
        below = [file for file in opened if file.is_relative_to(root)]
        assert all(file.name.startswith("index-") for file in below), below
        cut.expected.check(cut.scenario, root)
        shutil.rmtree(root)
