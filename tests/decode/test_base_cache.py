"""Materialised bases in the cache hold what the history holds, or are not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import Repo
from ckptvcs.codec.frame import SLICE_WORDS, slices_of
from ckptvcs.decode.base_cache import BaseWriter, CachedTable
from ckptvcs.gc.retention import Policy
from ckptvcs.history.schema import TensorInfo
from ckptvcs.ops.history_reader import handle
from ckptvcs.store.ids import ObjectId
from tests.helpers.comparing import same
from tests.helpers.histories import Weights, plain, rekeyed

CODECS = ["near", "lossless", "excp", "excp-max"]


def bases(repo: Repo) -> dict[ObjectId, CachedTable]:
    """The bases that the cache has, by the tables that they are of."""
    found = {}
    for entry in repo.log(all_branches=True):
        schema, values = (
            handle(repo).catalog.schema(entry.commit.schema),
            entry.commit.parts["model"].values,
        )
        infos = [schema.tensors[number] for number in schema.stored("model")]
        path = repo.folder / "cache" / "bases" / values
        if path.exists():
            found[values] = CachedTable(
                path, infos, handle(repo).catalog.all_values(values, len(infos))
            )
    return found


def assert_sound(repo: Repo) -> None:
    """Each base is what a commit that stands on it is to read, slice by slice."""
    for base in bases(repo).values():
        assert base.is_sound()
        for tensor, info in enumerate(base.infos):
            for number in slices_of(info.words):
                assert base.slice(tensor, number, info.type.word) is not None
    report = repo.verify()
    assert not report.damage
    assert not report.discarded


@given(
    seed=st.integers(0, 2**32),
    codec=st.sampled_from(CODECS),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ties=st.lists(st.integers(0, 3), max_size=2),
    every=st.integers(2, 4),
    in_file=st.booleans(),
    exact=st.integers(0, 2),
)
def test_rekeying_leaves_sound_bases(
    seed: int,
    codec: str,
    groups: list[int],
    ties: list[int],
    every: int,
    in_file: bool,
    exact: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("run")
    repo, run = Repo.init(root), Weights(seed, groups, ties)
    repo.configure("keep-exact", str(exact))

    def commit(step: int) -> None:
        if in_file:
            import torch

            state = {
                k: v if k == "noise" else {n: torch.from_numpy(w) for n, w in v.items()}
                for k, v in run.step().items()
            }
            state["noise"] = torch.from_numpy(state["noise"])
            torch.save(state, root / "model.pt")
            repo.commit_path(root / "model.pt", message="", step=step, codec=codec)
        else:
            repo.commit(run.step(), step=step, codec=codec)

    for step in range(1, 7):
        commit(step)
    kept = [step for step in range(1, 7) if step % every == 0 or step == 6]
    repo.configure("keep-exact", "0")
    repo.gc(Policy(every=every, last=1), now=True)
    true = {step: repo.checkout(step) for step in kept}
    repo.gc(rekey=True)
    repo = Repo.open(root)
    assert_sound(repo)
    assert all(same(plain(repo.checkout(step)), plain(true[step])) for step in kept)
    commit(7)
    assert_sound(repo)
    shutil.rmtree(repo.folder / "cache")
    again = Repo.open(root)
    assert all(same(plain(again.checkout(step)), plain(true[step])) for step in kept)
    assert_sound(again)


@pytest.mark.parametrize("codec", ["near", "lossless"])
def test_a_base_with_equal_tensors_is_published_by_rekeying(codec: str, tmp_path: Path) -> None:
    repo = rekeyed(tmp_path, codec)
    tables = {entry.commit.parts["model"].values for entry in repo.log()}
    assert bases(repo).keys() <= tables
    first = repo.log()[-1].commit.parts["model"].values  # the one whose base was dropped
    assert first in bases(repo)
    assert_sound(repo)


def test_a_base_that_nobody_wrote_in_full_is_not_published(tmp_path: Path) -> None:
    words = np.arange(SLICE_WORDS + 5, dtype=np.uint32)
    first, second = words[:SLICE_WORDS], words[SLICE_WORDS:]
    infos = [TensorInfo("w", "U32", (count,), "model", "weight") for count in (words.size, 0, 2)]

    def write(*slices: tuple[int, int, Any]) -> Path:
        writer, values = BaseWriter(tmp_path, infos), ObjectId("ab" * 32)
        for tensor, number, some in slices:
            writer.write(tensor, number, some)
        writer.finish(values)
        writer.abort()
        return tmp_path / values

    small = np.zeros(2, np.uint32)
    assert not write((0, 0, first), (0, 1, second)).exists()
    assert not write((0, 0, first), (2, 0, small)).exists()
    assert not write((0, 0, first), (0, 0, first), (2, 0, small)).exists()
    assert not [*tmp_path.iterdir()]
    whole = write((0, 1, second), (2, 0, small), (0, 0, first), (0, 0, first))
    assert whole.read_bytes() == words.tobytes() + bytes(8)
