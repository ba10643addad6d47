"""reflog and undo: what happened to a branch, and how to take it back."""

from __future__ import annotations

from ckptvcs.history.canonical_json import now
from ckptvcs.history.reflog import Past, ReflogEvent, Undone
from ckptvcs.ops.repository import Repository


def events(repository: Repository, branch: str | None = None) -> list[ReflogEvent]:
    """Return what happened to a branch (HEAD's), newest first."""
    return Past(repository.catalog, repository.refs).events(branch)


def undo(repository: Repository) -> Undone:
    """Take back the last move of HEAD's branch, or the last drop; see `Repo.undo`."""
    with repository.leading_to(None):
        return Past(repository.catalog, repository.refs).undo(now())
