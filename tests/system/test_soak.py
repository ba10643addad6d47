"""A training that goes on for long, with all that may happen beside it, takes no more and more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.command_line import environment
from tests.helpers.soaking import index_bytes, run_states

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
COUNT = int(os.environ.get("CKPT_TEST_SOAK", "2000" if NIGHTLY else "36"))
SEED = int(os.environ.get("CKPT_TEST_SEED", "0"))
MiB = 1 << 20
MORE_MEMORY = 48 * MiB  # from a third of the run to its end: what is known of each commit
MORE_FILES = 3
AS_ANEW = 4  # times the size of an index that is made anew


@pytest.mark.slow
def test_a_long_training(cut_folder: Path) -> None:
    folder = cut_folder / "repo"
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.soaking", "train", folder, str(COUNT), str(SEED)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    first, last = looks[len(looks) // 3], looks[-1]
    print(json.dumps({"commits": COUNT, "first": first, "last": last}))
    assert last["step"] == COUNT
    assert min(last[what] for what in ("killed", "forked", "changed", "asked")) >= COUNT // 30
    for what in ("memory", "worker_memory"):
        assert last[what] <= first[what] + MORE_MEMORY, what
    for what in ("files", "worker_files"):
        assert last[what] <= first[what] + MORE_FILES, what

    repo = Repo.open(folder)
    log = repo.log()
    assert [entry.step for entry in log] == list(range(COUNT, 0, -1))
    assert not repo.verify().damage
    for entry, state in zip(reversed(log), run_states(SEED), strict=False):
        if entry.exact:
            found = repo.checkout(entry.id)
            for name, weight in state["model"].items():
                assert torch.equal(found["model"][name], weight), (entry.step, name)
        else:
            assert 0 < entry.commit.error.weight_rel < 0.1

    for _ in range(2):  # what readers had open goes with the next editions
        handle(repo).catalog.store.index.editions.make_edition()
    before = index_bytes(repo)
    handle(repo).catalog.store.rebuild()
    anew = index_bytes(repo)
    print(f"index {before}, made anew {anew}")
    assert before <= AS_ANEW * anew + MiB
