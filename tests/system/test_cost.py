"""What a commit costs does not grow with the history: counted, not timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs.decode import chain
from ckptvcs.repo import Repo
from ckptvcs.store.local import LocalBackend, LocalWriter
from tests.helpers.states import adam_state


class Counts:
    """Bytes written, files written and deleted, frames decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = self.files = self.frames = 0
        for owner, name in (
            (LocalWriter, "write"),
            (LocalWriter, "publish"),
            (LocalBackend, "delete"),
            (chain, "decode_slice"),
        ):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.bytes += len(args[1]) if name == "write" else 0
            self.files += name in ("publish", "delete")
            self.frames += name == "decode_slice"
            return function(*args, **options)

        return call

    def take(self) -> tuple[int, int, int]:
        found = self.bytes, self.files, self.frames
        self.bytes = self.files = self.frames = 0
        return found


@pytest.mark.parametrize("length", [70, pytest.param(1010, marks=pytest.mark.slow)])
def test_a_late_commit_costs_what_an_early_one_does(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo.init(tmp_path)
    counts = Counts(monkeypatch)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(60, 50, generator=draw)
    walk = torch.zeros(60, 50)
    costs = []
    for step in range(length):
        walk = 0.9 * walk + torch.randn(60, 50, generator=draw) * 1e-2  # stationary
        if step % 40 == 9:  # as a training job that is started again
            repo = Repo.open(tmp_path)
        repo.commit(adam_state({"w": start + walk}, step), step=step, message=f"step {step:06}")
        costs.append((repo.log(1)[0].commit.kind, *counts.take()))
    kinds = [kind for kind, *_ in costs]
    early = [cost for kind, *cost in costs[5:15] if kind == "delta"]
    late = [cost for kind, *cost in costs[-10:] if kind == "delta"]
    assert "keyframe" in kinds[1:]
    for column, slack in ((0, 1.05), (1, 1.0), (2, 1.0)):
        small, large = (sorted(cost[column] for cost in rows) for rows in (early, late))
        assert large[len(large) // 2] <= slack * small[len(small) // 2] + (column == 2)


def test_verify_decodes_each_delta_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo.init(tmp_path)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 50, generator=draw)
    counts = Counts(monkeypatch)
    found = []
    for step in range(20):
        weight = weight + torch.randn(60, 50, generator=draw) * 1e-3
        repo.commit(adam_state({"w": weight}, step), step=step)
        if step in (9, 19):
            counts.take()
            assert not repo.verify().damage
            found.append(counts.take()[2])
    assert repo.log(1)[0].commit.depth == 19
    assert found[1] < 2.2 * found[0]
