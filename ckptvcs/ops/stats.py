"""Sizes of a repository on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from ckptvcs.errors import InvalidInputError
from ckptvcs.gc.collect import files_bytes, stored_bytes
from ckptvcs.gc.fading import Fader
from ckptvcs.gc.grace import waiting_commits
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
        waiting: The number of dropped commits whose data waits for the end of the grace period.
    """

    commits: int
    raw_bytes: int
    stored_bytes: int
    history_bytes: int
    patch_bytes: int
    cache_bytes: int
    packs: int
    waiting: int = 0

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
        _waiting(repository),
    )


def _waiting(repository: Repository) -> int:
    """Return the number of dropped commits that undo can restore."""
    if not repository.catalog.drops():
        return 0
    time, reachable = datetime.now(UTC), repository.revisions.commits()
    try:
        seconds = repository.config.grace_seconds
    except InvalidInputError:  # the settings are unreadable, so that gc deletes nothing
        seconds = math.inf
    return len(waiting_commits(repository.catalog, time, seconds) & reachable.keys())
