"""Sizes of a repository on disk."""

from __future__ import annotations

from dataclasses import dataclass

from ckptvcs.gc.collect import files_bytes, stored_bytes
from ckptvcs.gc.fading import Fader
from ckptvcs.ops.config import Config
from ckptvcs.ops.repository import CACHE, Repository


@dataclass(frozen=True)
class Stats:
    """Sizes of a repository in bytes, as they are on disk."""

    commits: int
    raw_bytes: int
    stored_bytes: int
    history_bytes: int
    patch_bytes: int
    cache_bytes: int
    packs: int

    @property
    def ratio(self) -> float:
        """How many times smaller the repository is than the files that were committed."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 0.0


def measure(repository: Repository) -> Stats:
    """Return the sizes as they are now."""
    commits, backend = repository.revisions.visible(), repository.backend
    stored, cached = stored_bytes(backend), files_bytes(backend, backend.names(CACHE))
    fader = Fader(repository.catalog, repository.refs, Config().exact_rule)  # any rule would do
    patches = sum(patch.size_bytes for patch in fader.patches())
    return Stats(
        len(commits),
        sum(c.raw_bytes for c in commits.values()),
        stored,
        stored - patches,
        patches,
        cached,
        len(repository.catalog.store.list_packs()),
    )
