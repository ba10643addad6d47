"""The Trainer of Hugging Face: every checkpoint that it writes is committed.

trainer = Trainer(..., callbacks=[CkptCallback("runs")])
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from ckptvcs.checkpoint.conventions import named_step
from ckptvcs.checkpoint.roles import Names
from ckptvcs.checkpoint.torch_objects import parameter_names
from ckptvcs.errors import BusyError, InvalidInputError, NotFoundError, missing_extra
from ckptvcs.files.removal import Originals
from ckptvcs.integrations.target import Target, Where
from ckptvcs.ops.originals import Keeper
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.series import Lines
from ckptvcs.store.ids import ObjectId

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing_extra("transformers") from error

_log = logging.getLogger("ckptvcs")

_NO_METRICS = frozenset(("step", "epoch", "total_flos"))


class CkptCallback(TrainerCallback):
    """Commits each checkpoint directory as soon as the Trainer has written it, on the first of all
    processes; with the `metrics` that were logged at its step.

    `keep_local` is how many of the newest directories stay (None: all): older ones, of earlier runs
    too, go once their commit has been read back, where that is exact (it is pinned then), or with
    `accept_near` in any form; why others stay is logged.  With the settings of a new repository
    more than one needs `accept_near`, since the newest two commits alone are exact.  The best model
    that the Trainer wants to load at the end stays, too.
    """

    def __init__(
        self,
        repo: Where = ".",
        *,
        metrics: bool = True,
        keep_local: int | None = None,
        accept_near: bool = False,
        codec: str | None = None,
    ) -> None:
        """`repo` is a repository, or where one is to be opened, or made if there is none.

        Raises:
            InvalidInputError: none is to stay.
        """
        if keep_local is not None and keep_local < 1:
            raise InvalidInputError("keep_local must be at least 1")
        self._target, self._metrics = Target(repo, codec), metrics
        self._keep_local, self._accept_near = keep_local, accept_near
        self._made: dict[Path, ObjectId] = {}
        self._said: set[Path] = set()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer when a checkpoint is complete.

        Raises:
            CkptError: it cannot be committed, which ends the training.
        """
        if not state.is_world_process_zero:
            return
        folder = _folder(Path(args.output_dir), state.global_step)
        made = self._target.commit(
            folder,
            step=state.global_step,
            metrics=_logged(state) if self._metrics else {},
            names=_names(kwargs.get("model"), kwargs.get("optimizer")),
        )
        if self._keep_local is not None:
            self._made = self._made or self._earlier(folder)
            self._made.pop(folder, None)  # a run that began again writes it anew: it is the newest
            self._made[folder] = made.id
            with contextlib.suppress(BusyError):  # gc has come: until the next checkpoint
                self._remove({folder, Path(state.best_model_checkpoint or folder)})

    def _earlier(self, folder: Path) -> dict[Path, ObjectId]:
        """What earlier runs have left beside a checkpoint, and the history has, by the order of
        their commits.
        """
        found = {
            path: name
            for path in folder.parent.glob("checkpoint-*")
            if path != folder
            and named_step(path.name) is not None
            and (name := self._target.find(path)) is not None
        }
        order = Lines(Repository(self._target.repo.folder), None).by_age(found.values())
        return dict(sorted(found.items(), key=lambda pair: order.index(pair[1])))

    def _remove(self, staying: set[Path]) -> None:
        assert self._keep_local is not None
        repository = Repository(self._target.repo.folder)
        older = list(self._made)[: -self._keep_local]
        keeper = Keeper(repository, self._target.codec)
        for folder in older:
            if folder in staying:
                continue
            if folder.is_dir():
                with keeper.at_work(), Originals(folder.parent) as originals:
                    done = keeper.remove(
                        self._made[folder],
                        folder.name,
                        originals,
                        lambda _: None,
                        accept_near=self._accept_near,
                    )
                if done.kept and folder not in self._said:
                    _log.warning("%s is not removed: %s", folder.name, done.kept)
                    self._said.add(folder)
            if not folder.exists():  # the Trainer removes some by itself
                del self._made[folder]


def _folder(output: Path, step: int) -> Path:
    """The checkpoint of a step; those of a search lie in folders of their runs."""
    name = f"checkpoint-{step}"
    found = [path for path in (output / name, *output.glob(f"run-*/{name}")) if path.is_dir()]
    if not found:
        raise NotFoundError(f"{output} contains no {name}")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _logged(state: Any) -> dict[str, float]:
    """The numbers that were logged at the step of a checkpoint."""
    return {
        key: float(value)
        for row in state.log_history
        if row.get("step") == state.global_step
        for key, value in row.items()
        if key not in _NO_METRICS and isinstance(value, int | float)
    }


def _names(model: Any, optimizer: Any) -> Names:
    """The names of the parameters in `optimizer.pt`, which does not hold them."""
    return {("optimizer.pt", ""): parameter_names(model, optimizer)}
