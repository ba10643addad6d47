"""A crash at any step: the old state or the new one is there, whole; a second try works; gc sweeps
the rest.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from unittest import mock

from ckptvcs.store import leases
from ckptvcs.store.index import editions
from tests.helpers.crashing import Cut
from tests.helpers.faults import PowerCut, Steps, cuts, killed

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
KILLS = 10_000 if NIGHTLY else 3  # for each act, besides one at each operation in each phase
POWER_CUTS = 150 if NIGHTLY else 3  # for each act


def next_start() -> str:
    """The machine was started anew."""
    return "the next start"


def test_killed_at_any_step(cut: Cut) -> None:
    root = cut.copy()
    with Steps(root / "repo" / ".ckpt").taken() as steps:
        cut.scenario.act(root)
    reached = 0
    for at, phase in cuts(steps.seen, KILLS, seed=len(steps.seen)):
        root = cut.copy()
        reached += killed(root / "repo" / ".ckpt", partial(cut.scenario.act, root), at, phase)
        cut.expected.check(cut.scenario, root)
        shutil.rmtree(root)
    assert reached > len({step.operation for step in steps.seen})


def test_the_power_fails_at_any_step(cut: Cut) -> None:
    root = cut.copy()
    power = PowerCut(root)
    with power.recorded():
        cut.scenario.act(root)
    for seed in range(POWER_CUTS):
        left = root.with_name(f"left-{seed}")
        steps = (seed * 7919) % (len(power) + 1)
        power.restore(cut.template, steps, left, seed)
        cache = left / "repo" / ".ckpt" / "cache"
        if cut.scenario.commits and seed % 3:  # what is in the cache is not synced: older, newer
            shutil.rmtree(cache)
            if seed % 3 == 1:
                shutil.copytree(root / "repo" / ".ckpt" / "cache", cache)
                if steps < len(power):  # spares are written when their refs are durable
                    shutil.rmtree(cache / "refs", ignore_errors=True)
                    spares = cut.template / "repo" / ".ckpt" / "cache" / "refs"
                    shutil.copytree(spares, cache / "refs")
        with (
            mock.patch.multiple(leases, boot_id=next_start),
            mock.patch.multiple(editions, boot_id=next_start),
        ):
            cut.expected.check(cut.scenario, left)
        shutil.rmtree(left)
