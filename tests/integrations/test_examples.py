"""The examples of docs/training.md, as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs import Repo
from tests.helpers.docs_examples import blocks, run


def _train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()


def test_the_examples_without_a_trainer_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    names: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "train_step": _train_step,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10),
    }
    assert len(blocks()) == 3
    for block in blocks():
        run(block, names)
    assert [entry.step for entry in Repo.open("runs/background").log()] == [100, 80, 60, 40, 20]
    assert not Repo.open("runs/objects").verify().damage


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_torch_distributed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": torch.nn.Linear(16, 16)}
    (block,) = blocks("distributed")
    run(block, names)
    assert names["whole"]["step"] == 2000
    assert torch.equal(names["whole"]["model"]["weight"], names["model"].weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tests.helpers.trainers.huggingface import parts

    monkeypatch.chdir(tmp_path)
    model, arguments, data = parts("out")
    names = {"model": model, "arguments": arguments, "data": data}
    (block,) = blocks("transformers")
    run(block, names)
    assert [entry.step for entry in Repo.open("runs/hf").log()] == [8, 6, 4, 2]
