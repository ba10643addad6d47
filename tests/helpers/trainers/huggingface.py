"""A small training by the Trainer of Hugging Face: it is to be of 8 steps and stops behind STOP.

At a MOMENT it kills itself in the second save: `half` (the directory is not whole), `files` (it is,
and not committed), `commit` (before the branch moves), `done` (behind that).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ckptvcs.integrations.transformers import CkptCallback
from ckptvcs.ops.commit import Committer
from tests.helpers.patching import wrap


class _Data(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 64, (16,), generator=draw)
        return {"input_ids": ids, "labels": ids}


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def parts(out: str) -> tuple[GPT2LMHeadModel, TrainingArguments, _Data]:
    """A model, arguments for 8 steps, and data: the same each time."""
    set_seed(1)
    config = GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    arguments = TrainingArguments(
        out,
        max_steps=8,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        learning_rate=1e-3,
    )
    return GPT2LMHeadModel(config), arguments, _Data()


def _die_in_second(owner: type, name: str, *, after: bool = False) -> None:
    calls = []

    def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            if after:
                method(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    wrap(owner, name, call)


def main(
    out: str, repo: str, stop: str, resume: str = "", keep_local: str = "", moment: str = ""
) -> None:
    if moment:
        _die_in_second(
            *{
                "half": (Trainer, "_save_optimizer_and_scheduler"),
                "files": (CkptCallback, "on_save"),
                "commit": (Committer, "publish"),
                "done": (Committer, "publish"),
            }[moment],
            after=moment == "done",
        )
    model, arguments, data = parts(out)
    callback = CkptCallback(
        repo, keep_local=int(keep_local) if keep_local else None, accept_near=bool(keep_local)
    )
    callbacks = [callback, _Stop(int(stop))]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    if resume == "latest":
        resume = callback.latest(out) or ""
    trainer.train(resume_from_checkpoint=resume or None)


if __name__ == "__main__":
    main(*sys.argv[1:])
