"""transformers: commit every checkpoint that the Hugging Face Trainer writes.

trainer = Trainer(..., callbacks=[CkptCallback("runs")])
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from ckptvcs.checkpoint.conventions import named_step
from ckptvcs.checkpoint.optimizer_state import Names
from ckptvcs.checkpoint.torch_objects import parameter_names
from ckptvcs.errors import BusyError, InvalidInputError, NotFoundError, missing_extra
from ckptvcs.history.refs import LATEST_GOOD
from ckptvcs.integrations.target import Target, Where, on_first_process
from ckptvcs.ops.lines import Lines
from ckptvcs.ops.originals import Keeper
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing_extra("transformers") from error

_log = logging.getLogger("ckptvcs")

_NO_METRICS = frozenset(("step", "epoch", "total_flos"))


class CkptCallback(TrainerCallback):
    """Commits each checkpoint directory as soon as the Trainer has written it.

    The world's first process commits.  With `keep_local` the callback also deletes older checkpoint
    directories, including those of earlier runs.  It deletes a directory only after it has restored
    the commit and compared the bytes.  Unless `accept_near` is set, the commit must be exact; it is
    then pinned.  The callback logs why it keeps a directory, and always keeps the best model that
    the Trainer loads at the end.

    By default a repository keeps only the newest two commits exact, so `keep_local` above 1 needs
    `accept_near` or the setting `keep-exact`.
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
        """Create the callback.

        Args:
            repo: A repository, or the directory of one; it is created if it does not exist.
            metrics: Whether to record the metrics that the Trainer logged at the same step.
            keep_local: How many of the newest checkpoint directories to keep; None keeps all.
            accept_near: Also delete directories whose commit is only near.
            codec: The codec for the commits; None uses the setting `codec`.

        Raises:
            InvalidInputError: `keep_local` is below 1.
        """
        if keep_local is not None and keep_local < 1:
            raise InvalidInputError("keep_local must be at least 1")
        self._target, self._metrics = Target(repo, codec), metrics
        self._keep_local, self._accept_near = keep_local, accept_near
        self._commits: dict[Path, ObjectId] = {}
        self._reported: set[Path] = set()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit a complete checkpoint; the Trainer calls this.

        Raises:
            CkptError: The commit failed; this ends the training.
        """
        if not state.is_world_process_zero:
            return
        folder = _folder(Path(args.output_dir), state.global_step)
        result = self._target.commit(
            folder,
            step=state.global_step,
            metrics=_logged(state) if self._metrics else {},
            names=_names(kwargs.get("model"), kwargs.get("optimizer")),
        )
        if self._keep_local is not None:
            self._commits = self._commits or self._earlier(folder)
            self._commits.pop(folder, None)  # a restarted run wrote it again: move it to the end
            self._commits[folder] = result.id
            with contextlib.suppress(BusyError):  # gc is running: the next checkpoint tries again
                self._remove({folder, Path(state.best_model_checkpoint or folder)})

    def latest(self, output_dir: str | os.PathLike[str] | None = None) -> str | None:
        """Restore the newest checkpoint that proves itself, to resume from it.

        A warning says why a newer checkpoint was skipped, and whether this one is only near.  With
        several processes, call this in each of them: the first process restores the directory.

        Args:
            output_dir: The `output_dir` of the Trainer.  None uses the path that the commit
                recorded, relative to the repository, or to the working directory if the path was
                outside.

        Returns:
            The directory, for `resume_from_checkpoint`; None if there is no commit yet.

        Raises:
            CorruptionError: There are commits, but none proves itself.
            ConflictError: The directory exists, and has content that no commit contains.
            InvalidInputError: The commit is not a checkpoint of the Trainer.

        Example:
            >>> trainer.train(resume_from_checkpoint=callback.latest())
        """
        return on_first_process(lambda: self._restore_latest(output_dir))

    def _restore_latest(self, output_dir: str | os.PathLike[str] | None) -> str | None:
        repo = self._target.existing()
        if repo is None or not repo.log(1, all_branches=True):
            return None
        entry = repo.entry(repo.resolve(LATEST_GOOD))
        if entry.commit.source != "directory":
            raise InvalidInputError(f"commit {entry.id[:8]} is not a directory of the Trainer")
        if output_dir is None:
            top, target = repo.root if entry.commit.inside else Path.cwd(), None
            folder = top / entry.commit.path
        else:
            folder = target = Path(output_dir) / f"checkpoint-{entry.step}"
        repo.checkout_files(entry.id, target)
        if not entry.exact:
            error = f"{entry.commit.error.weight_rel:.2g}"
            _log.warning("step %s is near (%s): the run changes a little", entry.step, error)
        return str(folder)

    def _earlier(self, folder: Path) -> dict[Path, ObjectId]:
        """Return the committed directories of earlier runs beside `folder`, oldest commit first."""
        commits = {
            path: commit
            for path in folder.parent.glob("checkpoint-*")
            if path != folder
            and named_step(path.name) is not None
            and (commit := self._target.find(path)) is not None
        }
        order = Lines(Repository(self._target.repo.folder), None).by_age(commits.values())
        return dict(sorted(commits.items(), key=lambda pair: order.index(pair[1])))

    def _remove(self, protected: set[Path]) -> None:
        assert self._keep_local is not None
        repository = Repository(self._target.repo.folder)
        older = list(self._commits)[: -self._keep_local]
        keeper = Keeper(repository, self._target.codec)
        for folder in older:
            if folder in protected:
                continue
            if folder.is_dir():
                with keeper.removing(folder.parent, accept_near=self._accept_near) as remove:
                    done = remove(self._commits[folder], folder.name)
                if done.keep_reason and folder not in self._reported:
                    _log.warning("%s is not removed: %s", folder.name, done.keep_reason)
                    self._reported.add(folder)
            if not folder.exists():  # the Trainer also removes directories
                del self._commits[folder]


def _folder(output: Path, step: int) -> Path:
    """Return the checkpoint of a step; a hyperparameter search has a folder for each run."""
    name = f"checkpoint-{step}"
    paths = [path for path in (output / name, *output.glob(f"run-*/{name}")) if path.is_dir()]
    if not paths:
        raise NotFoundError(f"{output} contains no {name}")
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


def _logged(state: Any) -> dict[str, float]:
    """Return the numbers that the Trainer logged at the step of a checkpoint."""
    return {
        key: float(value)
        for row in state.log_history
        if row.get("step") == state.global_step
        for key, value in row.items()
        if key not in _NO_METRICS and isinstance(value, int | float)
    }


def _names(model: Any, optimizer: Any) -> Names:
    """Return the parameter names of `optimizer.pt`, which lacks them."""
    return {("optimizer.pt", ""): parameter_names(model, optimizer)}
