"""Target: the repository to which a training library commits its checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.optimizer_state import Names
from ckptvcs.checkpoint.survey import Found
from ckptvcs.errors import CkptError, NotFoundError
from ckptvcs.ops.commit import CommitResult
from ckptvcs.ops.originals import Contents
from ckptvcs.ops.repository import Repository
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId

T = TypeVar("T")
_log = logging.getLogger("ckptvcs")

Where = str | os.PathLike[str] | Repo
"""A repository, or the directory of one; it is created if it does not exist."""


class Target:
    """A repository that is opened on first use, so that only the committing process opens it."""

    def __init__(self, where: Where, codec: str | None) -> None:
        self._where, self.codec = where, codec

    def __getstate__(self) -> dict[str, object]:
        where = self._where.root if isinstance(self._where, Repo) else self._where
        return {**self.__dict__, "_where": where}

    @property
    def repo(self) -> Repo:
        """The open repository; it is created if it does not exist."""
        if not isinstance(self._where, Repo):
            self._where = Repo.init(self._where)
        return self._where

    def existing(self) -> Repo | None:
        """Return the open repository, or None if it does not exist."""
        with contextlib.suppress(NotFoundError):
            if not isinstance(self._where, Repo):
                self._where = Repo.open(self._where)
            return self._where
        return None

    def find(self, path: Path) -> ObjectId | None:
        """Return the commit that contains a file or directory byte for byte, or None."""
        repo = self.existing()
        if repo is None:
            return None
        kind = "directory" if path.is_dir() else "file"
        try:
            found = Found(path.name, path, kind, open_checkpoint(path).size_bytes, None)
            return Contents(Repository(repo.folder)).find(found)
        except CkptError:  # the path is not a complete checkpoint
            return None

    def commit(
        self,
        path: Path,
        *,
        step: int | None,
        metrics: Mapping[str, float],
        names: Names | None = None,
    ) -> CommitResult:
        """Commit a complete checkpoint, and log its notes."""
        result = self.repo.commit_path(
            path, message=path.name, step=step, metrics=metrics, codec=self.codec, names=names
        )
        for note in result.notes:
            _log.warning("%s: %s", path.name, note)
        return result


def on_first_process(act: Callable[[], T]) -> T:
    """Call a function in the first process of a distributed run; return its result in all.

    Raises:
        CkptError: The function failed; all processes raise the error.
    """
    from torch import distributed  # noqa: PLC0415  needs torch

    if not distributed.is_available() or not distributed.is_initialized():
        return act()
    results: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            results[0] = act()
        except CkptError as error:
            results[1] = error
    distributed.broadcast_object_list(results)
    if results[1] is not None:
        raise results[1]
    result: T = results[0]
    return result


# A repository keeps the tensors of its last commit in memory as the base of the next one.
_opened: dict[Path, Repository] = {}


def open_once(where: Where, *, make: bool = False) -> Repository:
    """Return a repository that stays open in this process; `make` creates it if it is missing."""
    path = Path(where.root if isinstance(where, Repo) else where).resolve()
    if path not in _opened:
        _opened[path] = Repository.init(path) if make else Repository(Repository.locate(path))
    return _opened[path]
