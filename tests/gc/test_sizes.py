"""The sizes that gc reports are those that stats shows before and after."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import Repo
from ckptvcs.gc.retention import Policy
from tests.helpers.histories import commits

_DIGITS = 8  # bytes that the time of a record may make more or less of, compressed


def stored(repo: Repo) -> int:
    return Repo.open(repo.folder).stats().stored_bytes


@given(
    seed=st.integers(0, 2**20),
    codec=st.sampled_from(["near", "near:step=4", "lossless"]),
    count=st.integers(1, 6),
    kept=st.integers(0, 3),
    policy=st.sampled_from(
        [
            Policy(),
            Policy(last=1),
            Policy(last=3),
            Policy(every=2),
            Policy(optimizer_last=1),
            Policy(last=2, optimizer_last=1),
        ]
    ),
    debris=st.integers(0, 5000),
)
def test_what_is_freed_and_kept_adds_up(
    seed: int,
    codec: str,
    count: int,
    kept: int,
    policy: Policy,
    debris: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    repo = Repo.init(tmp_path_factory.mktemp("repo"))
    commits(repo, seed, count, codec)
    repo.configure("keep-exact", str(kept))
    left = repo.folder / "tmp" / "left"
    for rekey in (False, True):
        left.write_bytes(bytes(debris))
        before = stored(repo)
        plan = repo.plan_gc(policy, now=True)
        assert stored(repo) == before
        assert plan.freed_bytes + plan.kept_bytes == before + debris
        done = repo.gc(policy, rekey=rekey, now=True)
        after = stored(repo)
        assert done.kept_bytes == after
        assert done.freed_bytes == before + debris - after
        parts = sum(row.freed_bytes for row in done.decisions)
        assert parts <= done.freed_bytes + 1000 * len(done.drops) or rekey
        if not rekey:
            assert abs(plan.freed_bytes - done.freed_bytes) <= _DIGITS * (len(done.drops) + 1)
            assert [row.freed_bytes for row in plan.decisions] == [
                row.freed_bytes for row in done.decisions
            ]
        commits(repo, seed + 1, 1, codec, first=100 + rekey)
    again = repo.gc()
    assert again.kept_bytes == stored(repo)


def test_what_the_next_sweep_frees_is_what_it_frees(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    commits(repo, 1, 8, "near")
    said = repo.gc(Policy(last=2), sweep=False)
    before = stored(repo)
    assert said.freed_bytes > 0
    assert said.freed_bytes + said.kept_bytes == before
    done = repo.gc()
    assert done.kept_bytes == stored(repo)
    assert done.freed_bytes == before - stored(repo)
    # The sweep that was announced had its records to write; this one has none.
    assert abs(said.freed_bytes - done.freed_bytes) <= 2000


@pytest.mark.parametrize("rekey", [False, True])
def test_sizes_add_up_while_drops_wait(rekey: bool, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    commits(repo, 1, 20, "near")  # more than the waste that gc leaves in a pack
    before = stored(repo)
    planned = repo.plan_gc(Policy(last=2))
    assert planned.freed_bytes + planned.kept_bytes == before == stored(repo)
    done = repo.gc(Policy(last=2), rekey=rekey)
    assert len(done.waiting) == Repo.open(tmp_path).stats().waiting == 18
    assert done.kept_bytes == stored(repo) == before - done.freed_bytes
    for plan in (repo.plan_gc(), repo.gc()):
        assert (plan.freed_bytes, plan.kept_bytes) == (0, stored(repo))
        assert plan.waiting_bytes == done.waiting_bytes > 0
    before = stored(repo)
    now = repo.plan_gc(now=True)
    assert now.freed_bytes == done.waiting_bytes
    done = repo.gc(now=True)
    assert done.freed_bytes == before - stored(repo)
    assert done.kept_bytes == stored(repo)
    if rekey:  # plans do not know what the rekeying frees that the drop asked for
        assert done.freed_bytes > now.freed_bytes
    else:
        assert done.freed_bytes == now.freed_bytes
    assert Repo.open(tmp_path).stats().waiting == 0


def test_the_date_of_the_next_deletion(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    commits(repo, 1, 4, "near")
    assert repo.plan_gc().next_deletion is None
    assert repo.plan_gc(Policy(last=1), now=True).next_deletion is None
    repo.configure("gc-grace", "3d")
    begin = datetime.now(UTC).replace(microsecond=0)
    repo.gc(Policy(last=3))
    end = datetime.now(UTC)
    first = repo.plan_gc().next_deletion
    assert first is not None
    assert begin <= datetime.fromisoformat(first) - timedelta(days=3) <= end
    assert repo.gc(Policy(last=2)).next_deletion == first  # the earlier drop ends earlier
    repo.undo()
    repo.undo()
    assert repo.plan_gc().next_deletion is None


def test_packs_that_are_merged_count_in_a_dry_run(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path, codec="lossless")
    for step in range(12):
        repo.commit({"w": np.full(3000, step, np.float32), "n": step}, step=step)
    before, plan = stored(repo), repo.plan_gc()
    assert not plan.packs
    assert plan.freed_bytes > 0  # heads and tails of small packs
    done = repo.gc()
    assert done.freed_bytes == plan.freed_bytes == before - stored(repo)
    assert done.kept_bytes == plan.kept_bytes == stored(repo)


def test_each_bundle_is_freed_once(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path, codec="lossless")
    state = {"w": np.random.default_rng(0).standard_normal(50_000, np.float32)}
    for step in range(1, 5):
        repo.commit(state, step=step)  # all share what the first one stored
    repo.commit({"w": state["w"] + 1}, step=5)
    repo.commit({"other": np.arange(9000)}, step=6)
    done = repo.gc(Policy(last=1), now=True)
    assert sum(row.freed_bytes for row in done.decisions) <= done.freed_bytes
