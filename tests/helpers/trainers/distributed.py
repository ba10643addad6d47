"""A small model that is trained, saved and loaded by several processes; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.helpers.trainers.distributed KIND REPO FOLDER ACTION...

KIND is `fsdp`, `ddp` or `plain`.  Actions: `train` (one step, or so many), `save`, `async` (or
`async=process`), `torch` (a directory of torch's own), `load=REVISION`, `truth` (the whole state
into FOLDER), `check` (that it is the state now), `die=MOMENT` (the last process kills itself in the
next save).
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save
from torch.distributed.fsdp import fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ckptvcs.integrations.distributed import CkptReader, CkptWriter
from ckptvcs.ops import join
from tests.helpers.patching import wrap

MASK = torch.arange(200) % 2 == 0


class Trained:
    """A model, its optimizer, and how far they are."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40, bias=False), nn.Linear(40, 7)]
        self.model: Any = nn.Sequential(*layers)
        if kind == "fsdp":
            for layer in self.model:
                fully_shard(layer)
            fully_shard(self.model)
        elif kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.step = 0

    def train(self) -> None:
        torch.manual_seed(self.step)
        inputs, targets = torch.randn(16, 24), torch.randn(16, 7)
        self.optimizer.zero_grad()
        loss: Any = nn.functional.mse_loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def state(self, *, full: bool = False) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=full)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        notes = {"step": self.step, "words": ["a", ("b", 2.5)], "mask": MASK.clone()}
        return {"model": model, "optim": optimizer, "notes": notes}

    def load(self, reader: CkptReader, revision: str) -> None:
        state = self.state()
        load(state, checkpoint_id=revision, storage_reader=reader)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )
        self.step = state["notes"]["step"]
        assert state["notes"]["words"] == ["a", ("b", 2.5)]
        assert torch.equal(state["notes"]["mask"], MASK)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states are not the same."""
    if isinstance(a, dict):
        return [row for k in {*a, *b} for row in differences(a.get(k), b.get(k), f"{path}.{k}")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a.contiguous(), b.contiguous())
        return [] if same else [path]
    return [] if a == b else [path]


def die(moment: str) -> None:
    """Have the last process killed in its next save."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    owner, name = {
        "before": (CkptWriter, "write_data"),
        "coding": (join, "encode_shard"),
        "coded": (Future, "set_result"),
    }[moment]

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    wrap(owner, name, kill)


def main() -> None:
    kind, repo, folder, *actions = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    trained = Trained(kind)
    writer, reader = CkptWriter(repo, metrics={"loss": 1.5}), CkptReader(repo)
    for action in actions:
        what, _, argument = action.partition("=")
        name = f"step-{trained.step}"
        truth = Path(folder) / f"truth-{trained.step}.pt"
        if what == "train":
            for _ in range(int(argument or 1)):
                trained.train()
        elif what == "save":
            save(trained.state(), checkpoint_id=name, storage_writer=writer)
        elif what == "async":
            how = AsyncCheckpointerType(argument or "thread")
            future: Any = async_save(
                trained.state(),
                checkpoint_id=name,
                storage_writer=writer,
                async_checkpointer_type=how,
            )
            future.result()
        elif what == "torch":
            save(trained.state(), checkpoint_id=Path(folder) / name)
        elif what == "load":
            trained.load(reader, argument)
        elif what == "die":
            die(argument)
        elif what in ("truth", "check"):
            full = trained.state(full=True)
            if dist.get_rank() == 0 and what == "truth":
                torch.save(full, truth)
            elif dist.get_rank() == 0:
                assert not differences(torch.load(truth, weights_only=True), full)
    dist.destroy_process_group()
    # All is written and checked by now.  torch aborts a process now and then whose interpreter ends
    # right after a collective: a thread of gloo is still there when its owner goes.
    atexit._run_exitfuncs()
    os._exit(0)


if __name__ == "__main__":
    main()
