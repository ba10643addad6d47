"""Lightning: commit every checkpoint that the Trainer or Fabric writes.

Trainer(plugins=[CkptCheckpointIO("runs")])    Fabric(plugins=[CkptCheckpointIO("runs")])
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from threading import Condition
from typing import Any

from ckptvcs.checkpoint.conventions import LIGHTNING_LAST
from ckptvcs.errors import InvalidInputError, missing_extra
from ckptvcs.hashing import hasher
from ckptvcs.history.log import LogEntry
from ckptvcs.integrations.target import Target, Where
from ckptvcs.ops.repository import Repository
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId

try:
    import torch
    from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
    from lightning.fabric.utilities.rank_zero import rank_zero_only
except ImportError as error:
    raise missing_extra("lightning") from error

_TEMPORARY = ".temp.ckpt"
"""A file by which spawned processes return their weights; it is not a checkpoint."""

_LAST_PATH = "last_model_path"
"""The entry in a ModelCheckpoint that may differ between `last.ckpt` and its copy."""

_log = logging.getLogger("ckptvcs")


class CkptCheckpointIO(CheckpointIO):
    """Commits each checkpoint as soon as another CheckpointIO has written it.

    The process of rank 0 commits, and records the step and the score of the ModelCheckpoint.  A
    `last.ckpt` with the content of the previous commit is not committed again.  If the file of a
    checkpoint does not exist, it is loaded from its commit; `last.ckpt` is loaded from the newest
    commit of its folder.
    """

    def __init__(
        self, repo: Where = ".", *, base: CheckpointIO | None = None, codec: str | None = None
    ) -> None:
        """Create the plugin.

        Args:
            repo: A repository, or the directory of one; it is created if it does not exist.
            base: The CheckpointIO that writes and reads the files; None uses TorchCheckpointIO.
            codec: The codec for the commits; None uses the setting `codec`.
        """
        self._target, self._base = Target(repo, codec), base or TorchCheckpointIO()
        self._commits: dict[Path, ObjectId] = {}
        self._newest: tuple[Path, str, ObjectId] | None = None  # folder, content hash, commit
        self._saving: Path | None = None
        self._turn = Condition()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=Condition())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint and commit it.

        Raises:
            InvalidInputError: `path` is a URL.
            CkptError: The commit failed; this ends the training.
        """
        if _is_remote(path):
            raise InvalidInputError(f"cannot commit {path}: only local files can be committed")
        full = _full(path)
        if full.name == _TEMPORARY:
            self._base.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        self._set_saving(full)
        try:
            self._base.save_checkpoint(checkpoint, path, storage_options=storage_options)
            if getattr(rank_zero_only, "rank", 0) == 0:
                self._commits[full] = self._commit(checkpoint, full, _scores(checkpoint, path))
        finally:
            self._set_saving(None)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint from its file, or from its commit if the file does not exist.

        A commit is loaded with `weights_only=True`, so that it cannot run code, unless the caller
        passes False.

        Raises:
            FileNotFoundError: Neither the file nor a commit of it exists.
            CorruptionError: The commit does not decode to its recorded hashes.
        """
        options = {"map_location": map_location, "weights_only": weights_only}
        options = {name: value for name, value in options.items() if value is not None}
        repo, full = self._target.existing(), _full(path)
        has_file = full.exists() or _is_remote(path)
        entry = None if repo is None or has_file else _find(repo, full)
        if repo is None or entry is None:
            return self._base.load_checkpoint(path, **options)
        _log.info("%s does not exist: loading its commit %s", path, entry.id[:8])
        with tempfile.TemporaryDirectory() as folder:
            restored = Path(folder) / full.name
            repo.checkout_files(entry.id, restored)
            return self._base.load_checkpoint(restored, **{"weights_only": True, **options})

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file if it is committed; the commit is kept."""
        full = _full(path)
        if full.name == _TEMPORARY:
            self._base.remove_checkpoint(path)
            return
        with self._turn:  # another thread may be committing the file
            self._turn.wait_for(lambda: self._saving != full)
        if full.exists() and self._commits.pop(full, None) is None and not self._target.find(full):
            _log.warning("%s is not removed: no commit contains it", path)
        else:
            self._base.remove_checkpoint(path)

    def teardown(self) -> None:
        """End the training; AsyncCheckpointIO does not call this."""
        self._base.teardown()

    def _set_saving(self, path: Path | None) -> None:
        with self._turn:
            self._saving = path
            self._turn.notify_all()

    def _commit(
        self, checkpoint: Mapping[str, Any], path: Path, scores: Mapping[str, float]
    ) -> ObjectId:
        content = _digest(checkpoint)
        if self._newest and LIGHTNING_LAST.fullmatch(path.name):
            folder, newest_content, commit = self._newest
            if (folder, newest_content) == (path.parent, content):
                return commit
        step = checkpoint.get("global_step")
        result = self._target.commit(
            path, step=step if isinstance(step, int) else None, metrics=scores
        )
        self._newest = path.parent, content, result.id
        return result.id


def _full(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  links are kept as the user sees them


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def _find(repo: Repo, path: Path) -> LogEntry | None:
    """Return the newest commit of a file: on HEAD's first-parent history, otherwise on any."""
    name, inside = Repository(repo.folder).naming(path)
    is_last = LIGHTNING_LAST.fullmatch(path.name)
    for everywhere in (False, True):
        for entry in repo.log(all_branches=everywhere):
            commit = entry.commit
            if commit.source == "state" or commit.inside != inside:
                continue
            beside = PurePosixPath(commit.path).parent == PurePosixPath(name).parent
            if commit.path == name or (is_last and beside):
                return entry
    return None


def _scores(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, float]:
    """Return the scores that ModelCheckpoint callbacks recorded for this file, by metric."""
    callbacks = checkpoint.get("callbacks")
    scores = {}
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and isinstance(state.get("best_k_models"), Mapping):
            score = state["best_k_models"].get(os.fspath(path))
            if score is not None and isinstance(state.get("monitor"), str):
                scores[state["monitor"]] = float(score)
    return scores


class _Hashing(io.BytesIO):
    """A file that hashes the written bytes and does not store them."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hasher()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _digest(checkpoint: Mapping[str, Any]) -> str:
    """Return the hash of a checkpoint without its `_LAST_PATH` entries."""
    callbacks = checkpoint.get("callbacks")
    if isinstance(callbacks, Mapping):
        checkpoint = {
            **checkpoint,
            "callbacks": {
                name: {**state, _LAST_PATH: ""}
                if isinstance(state, dict) and _LAST_PATH in state
                else state
                for name, state in callbacks.items()
            },
        }
    sink = _Hashing()
    torch.save(checkpoint, sink)
    return sink.digest.hexdigest()
