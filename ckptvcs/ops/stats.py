"""Sizes of a repository on disk."""

from __future__ import annotations

from dataclasses import dataclass

from ckptvcs.gc.collect import files_bytes, stored_bytes
from ckptvcs.gc.fading import Fader
from ckptvcs.ops.config import Config
from ckptvcs.ops.repository import CACHE, Repository


@dataclass(frozen=True)
class Stats:
    """Sizes of a repository, in bytes on disk.

    Attributes:
        commits: The number of commits.
        raw_bytes: The total size of the committed files.
        stored_bytes: The size of the repository without its cache.
        history_bytes: `stored_bytes` without exact patches.
        patch_bytes: The size of the exact patches.
        cache_bytes: The size of the cache, which can always be deleted.
        packs: The number of packs.
    """

    commits: int
    raw_bytes: int
    stored_bytes: int
    history_bytes: int
    patch_bytes: int
    cache_bytes: int
    packs: int

    @property
    def ratio(self) -> float:
        """`raw_bytes` divided by `stored_bytes`."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 0.0


def measure(repository: Repository) -> Stats:
    """Return the present sizes."""
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
