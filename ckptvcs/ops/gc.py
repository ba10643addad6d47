"""gc: drop commits that no rule keeps, and delete unreachable objects."""

from __future__ import annotations

from dataclasses import replace

from ckptvcs.errors import InvalidInputError, StorageError
from ckptvcs.gc.collect import Collector, GcPlan
from ckptvcs.gc.retention import Policy
from ckptvcs.gc.sweep import Sweep
from ckptvcs.history.canonical_json import now
from ckptvcs.history.format_file import raise_flags, require_flags
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store import disk
from ckptvcs.store.leases import sole
from ckptvcs.store.reserve import give_up_reserve, keep_reserve


def plan(repository: Repository, policy: Policy) -> GcPlan:
    """Return what `collect` would do now; raises the same errors."""
    return _collector(repository).plan(policy, now())


def collect(
    repository: Repository,
    policy: Policy,
    *,
    sweep: bool = True,
    rekey: bool = False,
    progress: Progress = quiet,
) -> GcPlan:
    """Collect garbage; see `Repo.gc`."""
    if rekey and not sweep:
        raise InvalidInputError("--rekey cannot be combined with --no-sweep")
    sizes = list[int]()
    try:
        done = _collect(repository, policy, progress, sizes, sweep=sweep, rekey=rekey)
    except StorageError as error:
        if not disk.is_full(error):
            raise
        repository.catalog.store.move_index_out()
        try:
            give_up_reserve(repository.cache)
        except OSError:
            raise error from None
        done = _collect(repository, policy, progress, sizes, sweep=sweep, rekey=rekey)
    keep_reserve(repository.cache)
    return done


def _collect(
    repository: Repository,
    policy: Policy,
    progress: Progress,
    sizes: list[int],
    *,
    sweep: bool,
    rekey: bool,
) -> GcPlan:
    """Collect once; `sizes` gets the size of the repository before the first try."""
    collector, store = _collector(repository), repository.catalog.store
    with sole(repository.backend) as mark:
        before = store.list_packs().keys()
        sizes.append(collector.held_bytes(debris=True))
        done = Sweep(collector, repository.catalog, mark).run(
            policy,
            now(),
            sweep=sweep,
            before_drop=lambda: raise_flags(repository.backend, "gc", "drops"),
            rekey=(lambda: _rekey(repository, progress)) if rekey else None,
        )
        kept = collector.held_bytes(debris=not sweep)
        sizes[0] += collector.foreign_bytes(done, before)
        if not sweep:
            return replace(done, kept_bytes=kept - done.freed_bytes)
        return replace(done, freed_bytes=sizes[0] - kept, kept_bytes=kept)


def _collector(repository: Repository) -> Collector:
    require_flags(repository.backend, "gc")
    best = repository.config.exact_rule.best
    return Collector(repository.catalog, repository.refs, repository.fader(), best)


def _rekey(repository: Repository, progress: Progress) -> None:
    from ckptvcs.encode.rekey import Rekeyer  # noqa: PLC0415  needs numpy

    raise_flags(repository.backend, "read", "near", "near-2", "types")
    depth = repository.config.keyframe_depth
    Rekeyer(repository.catalog, repository.bases, depth, progress).run(
        repository.revisions.visible()
    )
