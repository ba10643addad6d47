"""The open repositories of this process."""

from __future__ import annotations

from pathlib import Path

from ckptvcs.integrations.target import Where
from ckptvcs.ops.repository import Repository
from ckptvcs.repo import Repo

# A repository keeps the tensors of its last commit in memory as the base of the next one.
_opened: dict[Path, Repository] = {}


def open_once(where: Where, *, make: bool = False) -> Repository:
    """Return a repository that stays open in this process; `make` creates it if it is missing."""
    path = Path(where.root if isinstance(where, Repo) else where).resolve()
    if path not in _opened:
        _opened[path] = Repository.init(path) if make else Repository(Repository.locate(path))
    return _opened[path]
