"""Directories that torch.distributed.checkpoint writes by itself."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from ckptvcs import Repo
from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.errors import CkptError, InvalidInputError
from tests.helpers.fuzzing import little_room, mutated


def write(folder: Path, steps: int = 1, **options: Any) -> Path:
    """A checkpoint of a model and its optimizer, in one process."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 20, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Any = model(torch.ones(4, 20)).square().sum()
        loss.backward()
        optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = FileSystemWriter(folder, **options)
        save({"model": weights, "optim": state}, storage_writer=writer, no_dist=True)
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"thread_count": 3}, {"single_file_per_rank": False}, {"below": "pytorch_model_fsdp_0"}],
    ids=str,
)
def test_tensors_are_found(
    options: dict[str, Any], tmp_path: Path, round_trip: Callable[[Path], None]
) -> None:
    below = options.pop("below", "")
    write(tmp_path / "dcp" / below, **options)
    infos = open_checkpoint(tmp_path / "dcp").schema.tensors
    names = {info.name.partition(":")[2]: info for info in infos}
    assert names["model.1.weight"].role == "weight"
    assert names["model.1.weight"].shape == (20, 30)
    moment = names["optim.state.1.weight.exp_avg"]
    assert (moment.part, moment.role) == ("optimizer", "exp_avg")
    if not options:  # else they stand in other files, and nothing says that these are one process'
        assert moment.pair is not None
        assert infos[moment.pair].name.endswith("model.1.weight")
    round_trip(tmp_path / "dcp")


def test_the_next_one_is_small(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    sizes = [
        repo.commit_path(write(tmp_path / f"step-{steps}", steps), message="").stored_bytes
        for steps in (20, 21)
    ]
    assert repo.log()[0].commit.kind == "delta"
    assert sizes[1] < sizes[0]
    repo.checkout_files(repo.resolve("HEAD"), tmp_path / "again")
    for path in (tmp_path / "step-21").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_without_metadata_it_is_incomplete(tmp_path: Path) -> None:
    (write(tmp_path / "dcp") / ".metadata").unlink()
    with pytest.raises(InvalidInputError, match="incomplete"):
        open_checkpoint(tmp_path / "dcp")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dcp") / "dcp")


@given(st.data())
def test_hostile_directories(good: Path, data: st.DataObject) -> None:
    """Whatever they claim, their bytes come back, or they are refused."""
    folder = good.with_name("hostile")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    name = data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    (folder / name).write_bytes(data.draw(mutated((good / name).read_bytes())))
    repo = Repo.init(good.with_name("repo"), codec="lossless")
    with little_room():
        try:
            made = repo.commit_path(folder, message="")
        except CkptError:
            return
    target = good.with_name("out")
    shutil.rmtree(target, ignore_errors=True)
    repo.checkout_files(made.id, target)
    for path in folder.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
