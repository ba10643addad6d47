"""accelerate: the directories of `save_state` are committed.

commit_state(accelerator, "runs", "out/step-100", step=100)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptvcs.checkpoint.roles import Names
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
    """Save the state of a training by `accelerator.save_state`, and commit the directory on the
    main process; the others wait for it.  What was committed, or None on these.

    `repo` is a repository, or where one is to be opened, or made if there is none; `saving` is
    what `save_state` takes besides.

    Raises:
        CkptError: it cannot be committed.
    """
    given = None if output_dir is None else os.fspath(output_dir)
    folder = Path(accelerator.save_state(given, **saving))
    accelerator.wait_for_everyone()
    made = None
    if accelerator.is_main_process:
        target = Target(repo, codec)
        made = target.commit(folder, step=step, metrics=metrics or {}, names=_names(accelerator))
    accelerator.wait_for_everyone()
    return made


def _names(accelerator: Accelerator) -> Names:
    """The names of the parameters in `optimizer.bin`, `optimizer_1.bin` ..., which do not hold
    them; only private lists lead to what is prepared, so that without these it goes without names.
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
