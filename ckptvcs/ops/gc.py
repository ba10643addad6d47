"""gc: drop commits that no rule keeps, and delete what nothing reaches."""

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
    """Return what `collect` would drop, fade and delete now; raises as `collect`."""
    return _collector(repository).plan(policy, now())


def collect(
    repository: Repository,
    policy: Policy,
    *,
    sweep: bool = True,
    rekey: bool = False,
    progress: Progress = quiet,
) -> GcPlan:
    """Collect garbage; see `Repo.gc`.

    Raises:
        BusyError: a writer is at work.
        CorruptionError: something that is needed is missing: nothing was deleted.
        InvalidInputError: the rules keep nothing at all.
        StorageError: the disk fails.
    """
    if rekey and not sweep:
        raise InvalidInputError("--rekey cannot be combined with --no-sweep")
    held = list[int]()
    try:
        done = _collect(repository, policy, progress, held, sweep=sweep, rekey=rekey)
    except StorageError as error:
        if not disk.is_full(error):
            raise
        repository.catalog.store.move_index_out()
        try:
            give_up_reserve(repository.cache)
        except OSError:
            raise error from None
        done = _collect(repository, policy, progress, held, sweep=sweep, rekey=rekey)
    keep_reserve(repository.cache)
    return done


def _collect(
    repository: Repository,
    policy: Policy,
    progress: Progress,
    held: list[int],
    *,
    sweep: bool,
    rekey: bool,
) -> GcPlan:
    """`held` takes the size of the repository, before this and a try that came before it."""
    collector, store = _collector(repository), repository.catalog.store
    with sole(repository.backend) as mark:
        before = store.list_packs().keys()
        held.append(collector.held_bytes(debris=True))
        done = Sweep(collector, repository.catalog, mark).run(
            policy,
            now(),
            sweep=sweep,
            before_drop=lambda: raise_flags(repository.backend, "gc", "drops"),
            rekey=(lambda: _rekey(repository, progress)) if rekey else None,
        )
        left = collector.held_bytes(debris=not sweep)
        held[0] += collector.foreign_bytes(done, before)
        if not sweep:
            return replace(done, kept_bytes=left - done.freed_bytes)
        return replace(done, freed_bytes=held[0] - left, kept_bytes=left)


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
