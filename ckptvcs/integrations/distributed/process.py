"""The repositories that a process has open."""

from __future__ import annotations

from pathlib import Path

from ckptvcs.integrations.target import Where
from ckptvcs.repo import Repo

_opened: dict[Path, Repo] = {}  # what a process has coded last is the base of what it codes next


def open_once(where: Where, *, make: bool = False) -> Repo:
    """A repository, opened once in a process, or made where there is none."""
    if isinstance(where, Repo):
        return where
    path = Path(where).resolve()
    if path not in _opened:
        _opened[path] = Repo.init(path) if make else Repo.open(path)
    return _opened[path]
