"""Lightning, its Trainer and Fabric: every checkpoint that they write is committed.

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

_PASSED_ON = ".temp.ckpt"
"""What processes that end give to the one that started them: nobody's checkpoint."""

_OWN_NAME = "last_model_path"
"""Where a ModelCheckpoint keeps that name: alone in this the two may differ."""

_log = logging.getLogger("ckptvcs")


class CkptCheckpointIO(CheckpointIO):
    """Commits each checkpoint as soon as another CheckpointIO has written it, on the first of all
    processes; under its step, with the score that a ModelCheckpoint has kept for it.

    `last.ckpt` is no commit of its own if it holds what was committed just before.  A checkpoint
    whose file is gone is loaded from its commit; `last.ckpt` from the newest of its folder.
    """

    def __init__(
        self, repo: Where = ".", *, base: CheckpointIO | None = None, codec: str | None = None
    ) -> None:
        """`repo` is a repository, or where one is to be opened, or made if there is none; `base`
        writes and reads the files, if not TorchCheckpointIO.
        """
        self._target, self._base = Target(repo, codec), base or TorchCheckpointIO()
        self._made: dict[Path, ObjectId] = {}
        self._newest: tuple[Path, str, ObjectId] | None = None  # its folder, and what it holds
        self._at_work: Path | None = None
        self._turn = Condition()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=Condition())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, and commit it.

        Raises:
            InvalidInputError: it is not to be written to this machine.
            CkptError: it cannot be committed, which ends the training.
        """
        if _is_remote(path):
            raise InvalidInputError(f"only files of this machine can be committed, not {path}")
        full = _full(path)
        if full.name == _PASSED_ON:
            self._base.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        self._work_at(full)
        try:
            self._base.save_checkpoint(checkpoint, path, storage_options=storage_options)
            if getattr(rank_zero_only, "rank", 0) == 0:
                self._made[full] = self._commit(checkpoint, full, _scores(checkpoint, path))
        finally:
            self._work_at(None)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint from its file, or where that is gone from its commit: then nothing in
        it is executed, unless `weights_only` is False.

        Raises:
            FileNotFoundError: there is neither.
            CorruptionError: the commit does not decode to its recorded hashes.
        """
        options = {"map_location": map_location, "weights_only": weights_only}
        given = {name: value for name, value in options.items() if value is not None}
        repo, full = self._target.existing(), _full(path)
        elsewhere = full.exists() or _is_remote(path)
        entry = None if repo is None or elsewhere else _find(repo, full)
        if repo is None or entry is None:
            return self._base.load_checkpoint(path, **given)
        _log.info("%s is gone: its commit %s is loaded", path, entry.id[:8])
        with tempfile.TemporaryDirectory() as folder:
            restored = Path(folder) / full.name
            repo.checkout_files(entry.id, restored)
            return self._base.load_checkpoint(restored, **{"weights_only": True, **given})

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file of a checkpoint that is committed; never its commit.  What is in no
        commit stays.
        """
        full = _full(path)
        if full.name == _PASSED_ON:
            self._base.remove_checkpoint(path)
            return
        with self._turn:  # another thread may be committing it
            self._turn.wait_for(lambda: self._at_work != full)
        if full.exists() and self._made.pop(full, None) is None and not self._target.find(full):
            _log.warning("%s stays: it is in no commit", path)
        else:
            self._base.remove_checkpoint(path)

    def teardown(self) -> None:
        """Called at the end of a training; not within AsyncCheckpointIO."""
        self._base.teardown()

    def _work_at(self, path: Path | None) -> None:
        with self._turn:
            self._at_work = path
            self._turn.notify_all()

    def _commit(
        self, checkpoint: Mapping[str, Any], path: Path, scores: Mapping[str, float]
    ) -> ObjectId:
        content = _digest(checkpoint)
        if self._newest and LIGHTNING_LAST.fullmatch(path.name):
            folder, before, name = self._newest
            if (folder, before) == (path.parent, content):
                return name
        step = checkpoint.get("global_step")
        made = self._target.commit(
            path, step=step if isinstance(step, int) else None, metrics=scores
        )
        self._newest = path.parent, content, made.id
        return made.id


def _full(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  links are kept as the user sees them


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def _find(repo: Repo, path: Path) -> LogEntry | None:
    """The newest commit of a file, on HEAD's line or else on any."""
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
    """What each ModelCheckpoint has kept as the score of this very file."""
    callbacks = checkpoint.get("callbacks")
    found = {}
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and isinstance(state.get("best_k_models"), Mapping):
            score = state["best_k_models"].get(os.fspath(path))
            if score is not None and isinstance(state.get("monitor"), str):
                found[state["monitor"]] = float(score)
    return found


class _Hashing(io.BytesIO):
    """A file that keeps nothing of what is written to it but its hash."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hasher()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _digest(checkpoint: Mapping[str, Any]) -> str:
    """The hash of all that a checkpoint holds but the name of the last one."""
    callbacks = checkpoint.get("callbacks")
    if isinstance(callbacks, Mapping):
        checkpoint = {
            **checkpoint,
            "callbacks": {
                name: {**state, _OWN_NAME: ""}
                if isinstance(state, dict) and _OWN_NAME in state
                else state
                for name, state in callbacks.items()
            },
        }
    sink = _Hashing()
    torch.save(checkpoint, sink)
    return sink.digest.hexdigest()
