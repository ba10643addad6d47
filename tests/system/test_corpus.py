"""Whatever trains, and however its state is laid out, a run goes on from a near commit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.corpus.optimizers import ENTRIES, run_of
from tests.corpus.outcome import ALL_LAYOUTS, pairs, ratio_of, try_out
from tests.helpers.profiles import short

FEW = [("AdamW", "zero 3"), ("Lion", "trainer")]
"""What the short profile tries."""

SHRINKING = [
    "AdEMAMix",
    "Sophia",
    "Adagrad",
    "schedule-free AdamW",
    "SparseAdam",
    "AdamW complex",
    "AdamW",
    "Adam amsgrad",
    "Adafactor",
    "Lion",
    "Muon",
    "SGD momentum",
    "RMSprop momentum",
    "masters",
    "Adadelta",
    "Adamax",
    "ASGD",
    "schedule-free SGD",
    "AdaBelief",
    "AdamW double",
]
"""Optimizers whose states are averages, sums or weights, all of which can be coded near."""

PARTLY = {"Adan": 5, "Prodigy": 5, "MARS": 4, "Rprop": 2.4, "MADGRAD": 2.4, "NovoGrad": 2.2}
"""Those that keep something else, too, which is exact; and how small their commits are at least."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns of its own doings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def _check(optimizer: str, layout: str, folder: Path) -> None:
    found = try_out(optimizer, layout, folder)
    assert not found.faults, "; ".join(found.faults)


@pytest.mark.parametrize(("optimizer", "layout"), FEW)
def test_a_run_goes_on_from_a_near_commit(optimizer: str, layout: str, tmp_path: Path) -> None:
    _check(optimizer, layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "layout"), [pair for pair in pairs() if pair not in FEW])
def test_any_run_goes_on_from_a_near_commit(optimizer: str, layout: str, tmp_path: Path) -> None:
    _check(optimizer, layout, tmp_path)


@pytest.mark.parametrize("optimizer", short(SHRINKING, ["AdEMAMix"]))
def test_a_known_optimizer_makes_small_commits(optimizer: str, tmp_path: Path) -> None:
    # AdamW's are 50 times smaller: matrices are small here.
    assert ratio_of(optimizer, "plain", tmp_path) > 12


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "least"), PARTLY.items())
def test_what_is_known_of_an_optimizer_makes_its_commits_smaller(
    optimizer: str, least: float, tmp_path: Path
) -> None:
    assert ratio_of(optimizer, "plain", tmp_path) > least


@pytest.mark.parametrize("layout", short(ALL_LAYOUTS, ["objects", "zero 3", "safetensors"]))
def test_a_lossless_commit_gives_the_state_back(layout: str, tmp_path: Path) -> None:
    found = try_out("AdamW groups", layout, tmp_path, codec="lossless")
    assert found.exact
    assert not found.faults


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ENTRIES)
def test_every_optimizer_trains(optimizer: str) -> None:
    run = run_of(optimizer)
    assert run.loss < run.begun - 0.5
    assert 0 <= run.luck < 0.1
