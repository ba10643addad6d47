"""A small training with accelerate, each epoch of 4 steps, whose state is saved behind each.

As a process it kills itself behind the second epoch, at a MOMENT: `half` (the state is not whole),
`files` (it is, and not committed), `commit` (before the branch moves); at `none` it does not.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ckptvcs.integrations.accelerate import commit_state
from ckptvcs.integrations.target import Target
from ckptvcs.ops.commit import Committer
from tests.helpers.patching import wrap


class Mean:
    """An average of the loss, which the state has in a file of its own."""

    def __init__(self) -> None:
        self.value = torch.zeros(16, 16)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def prepared() -> tuple[Accelerator, list[Any], Mean]:
    """A model with dropout, two groups of parameters, a scheduler and data that are shuffled."""
    set_seed(1)
    accelerator, mean = Accelerator(cpu=True), Mean()
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64),
        torch.nn.Dropout(0.1),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
    )
    # In an order that none of the files tells.
    groups: list[dict[str, Any]] = [
        {"params": [model[5].weight, model[0].weight]},
        {"params": [model[3].weight]},
        {"params": [model[number].bias for number in (5, 3, 0)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    rows = torch.utils.data.TensorDataset(torch.randn(32, 16))
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    accelerator.register_for_checkpointing(mean)
    return accelerator, list(accelerator.prepare(model, optimizer, scheduler, loader)), mean


def train(out: Path, repo: Path, epochs: int, resume: Path | None = None) -> dict[str, bytes]:
    """The files of the state behind the last epoch."""
    accelerator, (model, optimizer, scheduler, loader), mean = prepared()
    done = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        done = int(resume.name.partition("-")[2]) // 4
    for epoch in range(done + 1, epochs + 1):
        for (rows,) in loader:
            loss = model(rows).square().mean()
            accelerator.backward(loss)
            mean.value = 0.9 * mean.value + 0.1 * loss.detach()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        made = commit_state(
            accelerator,
            repo,
            out / f"step-{4 * epoch}",
            step=4 * epoch,
            metrics={"loss": loss.item()},
        )
        assert (made is not None) == accelerator.is_main_process
    return contents(out / f"step-{4 * epochs}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half(_: object, _accelerator: Accelerator, folder: str) -> None:
    Path(folder).mkdir()
    (Path(folder) / "model.safetensors").write_bytes(bytes(9))
    _die()


def main(out: str, repo: str, moment: str) -> None:
    train(Path(out), Path(repo), 1)
    if moment == "half":
        wrap(Accelerator, "save_state", _half)
    if moment == "files":
        wrap(Target, "commit", _die)
    if moment == "commit":
        wrap(Committer, "publish", _die)
    train(Path(out), Path(repo), 2, Path(out) / "step-4")


if __name__ == "__main__":
    main(*sys.argv[1:])
