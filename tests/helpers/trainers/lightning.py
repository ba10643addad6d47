"""A small training by the Trainer of Lightning, each epoch of 2 steps.

As a process it kills itself in the second epoch, at a MOMENT: `half` (the file is not whole),
`file` (it is, and not committed), `commit` (before the branch moves), `published` (just after); or
it is two processes, which do not.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from ckptvcs.integrations.lightning import CkptCheckpointIO
from ckptvcs.ops.commit import Committer
from tests.helpers.patching import wrap


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 64),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 1),
        )

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        torch.manual_seed(self.global_step)  # Lightning keeps no state of random numbers
        loss: torch.Tensor = self.layers(batch[0]).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def data() -> torch.utils.data.DataLoader[Any]:
    rows = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=8)


def trainer(
    io: CheckpointIO, out: str | Path, epochs: int, devices: int = 1, **options: Any
) -> Trainer:
    """Keeps the best file by its loss, and the last; or what a callback `beside` keeps."""
    beside = [options.pop("beside")] if "beside" in options else []
    chosen: dict[str, Any] = {"monitor": "loss", "save_last": True} | options
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        plugins=[io],
        callbacks=[ModelCheckpoint(dirpath=out, **chosen), *beside],
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(
    io: CheckpointIO, out: str | Path, epochs: int, resume: str | Path | None = None, **options: Any
) -> bytes:
    """The weights and the state of the optimizer at the end."""
    seed_everything(1, verbose=False)
    model = Net()
    used = trainer(io, out, epochs, **options)
    used.fit(model, data(), ckpt_path=resume)
    Path(out).mkdir(exist_ok=True)  # where nothing was left to train nothing was written
    target = Path(out) / "end.pt"
    torch.save([model.state_dict(), used.optimizers[0].state_dict()], target)
    return target.read_bytes()


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Dying(TorchCheckpointIO):
    def __init__(self, moment: str) -> None:
        self._moment = moment

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        if checkpoint["global_step"] < 4:
            return
        if self._moment == "half":
            os.truncate(path, Path(path).stat().st_size // 2)
        if self._moment in ("half", "file"):
            _die()

        def last_words(publish: Callable[..., None], *args: Any) -> None:
            if self._moment == "published":
                publish(*args)
            _die()

        wrap(Committer, "publish", last_words)


def main(out: str, repo: str, moment: str, epochs: str = "3", resume: str = "") -> None:
    if moment == "two":
        io = CkptCheckpointIO(repo)
        train(io, out, int(epochs), resume or None, devices=2, monitor=None)
        return
    io = CkptCheckpointIO(repo, base=_Dying(moment.removeprefix("async ")))
    train(AsyncCheckpointIO(io) if moment.startswith("async ") else io, out, 3)


if __name__ == "__main__":
    main(*sys.argv[1:])
