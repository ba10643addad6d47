"""The repositories that a process has open."""

from __future__ import annotations

from pathlib import Path

from ckptvcs.integrations.target import Where
from ckptvcs.ops.repository import Repository
from ckptvcs.repo import Repo

# What a process has coded last is the base of what it codes next.
_opened: dict[Path, Repository] = {}


def open_once(where: Where, *, make: bool = False) -> Repository:
    """A repository, opened once in a process, or made where there is none."""
    path = Path(where.root if isinstance(where, Repo) else where).resolve()
    if path not in _opened:
        made = Repository.init(path) if make else Repository(Repository.locate(path))
        _opened[path] = made
    return _opened[path]
