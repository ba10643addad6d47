"""Target: the repository that the checkpoints of a trainer go to."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.roles import Names
from ckptvcs.checkpoint.survey import Found
from ckptvcs.errors import CkptError, NotFoundError
from ckptvcs.ops.commit import CommitResult
from ckptvcs.ops.originals import Contents
from ckptvcs.ops.repository import Repository
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId

_log = logging.getLogger("ckptvcs")

Where = str | os.PathLike[str] | Repo
"""A repository, or where one is to be opened, or made if there is none."""


class Target:
    """Opened when it is first needed, so that only the process that commits does so."""

    def __init__(self, where: Where, codec: str | None) -> None:
        self._where, self.codec = where, codec

    def __getstate__(self) -> dict[str, object]:
        where = self._where.root if isinstance(self._where, Repo) else self._where
        return {**self.__dict__, "_where": where}

    @property
    def repo(self) -> Repo:
        """The repository, open."""
        if not isinstance(self._where, Repo):
            self._where = Repo.init(self._where)
        return self._where

    def existing(self) -> Repo | None:
        """The same, if there is one: nothing is made."""
        with contextlib.suppress(NotFoundError):
            if not isinstance(self._where, Repo):
                self._where = Repo.open(self._where)
            return self._where
        return None

    def find(self, path: Path) -> ObjectId | None:
        """The commit that has a file, or a directory, byte for byte."""
        repo = self.existing()
        if repo is None:
            return None
        kind = "directory" if path.is_dir() else "file"
        try:
            found = Found(path.name, path, kind, open_checkpoint(path).size_bytes, None)
            return Contents(Repository(repo.folder)).find(found, lambda _: None)
        except CkptError:  # nothing that could have been committed
            return None

    def commit(
        self,
        path: Path,
        *,
        step: int | None,
        metrics: Mapping[str, float],
        names: Names | None = None,
    ) -> CommitResult:
        """Commit a checkpoint that is complete; notes about it are logged.

        Raises:
            CkptError: it cannot be committed; BusyError if gc deletes for as long as a minute.
        """
        made = self.repo.commit_path(
            path, message=path.name, step=step, metrics=metrics, codec=self.codec, names=names
        )
        for note in made.notes:
            _log.warning("%s: %s", path.name, note)
        return made
