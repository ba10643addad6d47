"""reflog and undo: list the moves of a branch, and undo the last one."""

from __future__ import annotations

from ckptvcs.history.canonical_json import now
from ckptvcs.history.reflog import Past, ReflogEvent, Undone
from ckptvcs.ops.repository import Repository


def events(repository: Repository, branch: str | None = None) -> list[ReflogEvent]:
    """Return the reflog of a branch (default: HEAD's), newest first."""
    return Past(repository.catalog, repository.refs).events(branch)


def undo(repository: Repository) -> Undone:
    """Undo the last move of HEAD's branch, or the last drop; see `Repo.undo`."""
    with repository.leading_to(None):
        return Past(repository.catalog, repository.refs).undo(now())
