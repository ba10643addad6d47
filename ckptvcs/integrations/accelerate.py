"""accelerate: commit the directories that `Accelerator.save_state` writes.

commit_state(accelerator, "runs", "out/step-100", step=100)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptvcs.checkpoint.optimizer_state import Names
from ckptvcs.errors import missing_extra
from ckptvcs.integrations.target import Target, Where
from ckptvcs.ops.commit import CommitResult

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing_extra("accelerate") from error


def commit_state(
    accelerator: Accelerator,
    repo: Where,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    codec: str | None = None,
    **saving: Any,
) -> CommitResult | None:
    """Save the training state with `accelerator.save_state`, and commit the directory.

    Call it on every process: the main process commits, and the others wait for it.

    Args:
        accelerator: The accelerator of the training.
        repo: A repository, or the directory of one; it is created if it does not exist.
        output_dir: As for `save_state`.
        step: The training step; None reads it from the checkpoint or the directory name.
        metrics: Metrics by name.
        codec: The codec for this commit; None uses the setting `codec`.
        **saving: Further arguments of `save_state`.

    Returns:
        The new commit on the main process, None on the others.

    Raises:
        CkptError: The directory cannot be committed.
    """
    output = None if output_dir is None else os.fspath(output_dir)
    folder = Path(accelerator.save_state(output, **saving))
    accelerator.wait_for_everyone()
    result = None
    if accelerator.is_main_process:
        target = Target(repo, codec)
        result = target.commit(folder, step=step, metrics=metrics or {}, names=_names(accelerator))
    accelerator.wait_for_everyone()
    return result


def _names(accelerator: Accelerator) -> Names:
    """Return the parameter names of `optimizer.bin`, `optimizer_1.bin` ..., which lack them.

    Only private lists of the accelerator lead to its models and optimizers.  If a version of
    accelerate does not have them, the commit has no names.
    """
    models = getattr(accelerator, "_models", [])
    weights = {id(weight): name for model in models for name, weight in model.named_parameters()}
    return {
        (f"optimizer_{number}.bin" if number else "optimizer.bin", ""): [
            [weights.get(id(weight)) for weight in group["params"]]
            for group in optimizer.param_groups
        ]
        for number, optimizer in enumerate(getattr(accelerator, "_optimizers", []))
    }
