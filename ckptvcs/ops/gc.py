"""gc and drop: drop commits, and delete unreachable objects."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

from ckptvcs.errors import ConflictError, InvalidInputError, StorageError, after
from ckptvcs.gc.collect import Collector, GcPlan
from ckptvcs.gc.decide import Judge, is_followed
from ckptvcs.gc.grace import must_rekey
from ckptvcs.gc.retention import Policy
from ckptvcs.gc.sweep import Sweep
from ckptvcs.history.canonical_json import now as current_time
from ckptvcs.history.format_file import raise_flags, require_flags
from ckptvcs.history.reflog import DROPPED
from ckptvcs.history.refs import Generation
from ckptvcs.ops import archiving
from ckptvcs.ops.config import OFF
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.leases import sole
from ckptvcs.store.reserve import keep_reserve
from ckptvcs.text import counted


def plan(
    repository: Repository,
    policy: Policy,
    *,
    now: bool = False,
    archive: bool | None = None,
    progress: Progress = quiet,
) -> GcPlan:
    """Return what `collect` would do now; raises the same errors."""
    if archives(repository) if archive is None else archive:
        return archiving.preview(repository, policy, current_time(), progress)
    return _collector(repository, now=now).plan(policy, current_time())


def collect(
    repository: Repository,
    policy: Policy,
    *,
    sweep: bool = True,
    now: bool = False,
    rekey: bool = False,
    archive: bool | None = None,
    progress: Progress = quiet,
) -> GcPlan:
    """Collect garbage; see `Repo.gc`."""
    if rekey and not sweep:
        raise InvalidInputError("--rekey cannot be combined with --no-sweep")
    archive = archives(repository) if archive is None else archive
    policy = replace(policy, rekey=rekey)
    return _Collection(repository, policy, progress, sweep, now, archive).run()


def archive_directly(
    repository: Repository, names: Set[ObjectId], progress: Progress = quiet
) -> GcPlan:
    """Archive commits from their exact form, and delete what that replaces."""
    return _Collection(repository, Policy(), progress, True, False, True, names).run()


def archives(repository: Repository) -> bool:
    """Return whether every gc archives commits, by the settings."""
    return repository.config.archive_after != OFF


def drop(
    repository: Repository,
    names: Iterable[ObjectId],
    *,
    now: bool = False,
    progress: Progress = quiet,
) -> GcPlan:
    """Drop single commits; see `Repo.drop`.

    Raises:
        BusyError: A writer is running.
        ConflictError: HEAD, a tag, a pin or `keep-best` keeps one of the commits, or they are all
            commits of a branch.
        CorruptionError: A needed object is missing; nothing was deleted.
        StorageError: The disk fails.
    """
    named = frozenset(names)
    judge = Judge(repository.catalog, repository.refs, repository.config.exact_rule.best)
    protected = judge.protected(repository.revisions.visible())
    is_detached = repository.refs.current_branch() is None
    for name in sorted(named & protected.keys()):
        for reason in protected[name]:
            if not is_followed(reason) or (is_detached and reason == "HEAD"):
                raise ConflictError(
                    f"cannot drop commit {name[:8]}: {reason} keeps it",
                    hint=_how_to_release(name, reason),
                )
    _branches_back(repository, named)  # raises
    return _Collection(repository, Policy(named=named), progress, now, now).run()


def _branches_back(
    repository: Repository, named: Set[ObjectId]
) -> list[tuple[str, Generation, ObjectId]]:
    """Return the branches that end with a commit of `named`, and where each goes back to.

    Raises:
        ConflictError: A branch would have no commit left.
    """
    found = []
    for ref, tip in repository.revisions.tips().items():
        branch = ref.removeprefix("heads/")
        old = repository.refs.read(ref) if branch != ref and tip in named else None
        if old is None:
            continue
        line = repository.catalog.ancestors(tip)
        hidden = repository.catalog.dropped().commits | named
        target = next((name for name, _ in line if name not in hidden), None)
        if target is None:
            raise ConflictError(
                f"cannot drop every commit of branch '{branch}'",
                hint=f"delete the branch: 'ckpt branch --delete {branch}'",
            )
        found.append((ref, old, target))
    return found


def _how_to_release(name: ObjectId, reason: str) -> str:
    kind, _, label = reason.partition(" ")
    hints = {
        "HEAD": "check out another commit first",
        "tag": f"run 'ckpt tag --delete {label}' first",
        "pin": f"run 'ckpt unpin {name[:8]}' first",
    }
    return hints.get(kind, "change the setting keep-best first")


class _Collection:
    """One gc, which tries again without the caches if the disk is full."""

    def __init__(
        self,
        repository: Repository,
        policy: Policy,
        progress: Progress,
        sweep: bool,
        now: bool,
        archive: bool = False,
        direct: Set[ObjectId] = frozenset(),
    ) -> None:
        self._repository, self._policy, self._progress = repository, policy, progress
        self._sweep, self._archive, self._direct = sweep, archive, direct
        self._collector = _collector(repository, now=now, named=policy.named)
        self._before: int | None = None  # bytes of the repository before the first try
        self._dropped = 0  # commits, whatever fails later

    def run(self) -> GcPlan:
        """Collect garbage, and return the plan that was carried out."""
        try:
            done = self._collect()
        except StorageError as error:
            self._repository.make_room(error)
            done = self._collect()
        keep_reserve(self._repository.cache)
        return done

    def _collect(self) -> GcPlan:
        collector, catalog = self._collector, self._repository.catalog
        time = current_time()
        with sole(self._repository.backend) as mark:
            packs = catalog.store.list_packs().keys()
            if self._before is None:
                self._before = collector.held_bytes(debris=True)
            record = None
            if self._archive:  # what no rule keeps is archived, not dropped
                record = archiving.archive(
                    self._repository, self._policy, mark, time, self._progress, self._direct
                )
                self._policy = self._policy.without_drops
                self._archive = False
            rekey = self._sweep and (self._policy.asks_rekey or collector.owes_rekey(time))
            work = Sweep(collector, catalog, mark)
            with after(lambda: self._said(work)):
                done = work.run(
                    self._policy,
                    time,
                    sweep=self._sweep,
                    before_drop=self._before_drop,
                    rekey=(lambda: self._rekey(time)) if rekey else None,
                )
            if record is not None:
                done = replace(done, archived=record.archived)
            kept = collector.held_bytes(debris=not self._sweep)
            self._before += collector.foreign_bytes(done, packs)
            if not self._sweep:
                return replace(done, kept_bytes=kept - done.freed_bytes)
            if done.waiting or done.replaced:  # the merges of packs changed what their data takes
                later = collector.plan(Policy(), time, recorded=True)
                done = replace(done, waiting_bytes=later.waiting_bytes)
            return replace(done, freed_bytes=self._before - kept, kept_bytes=kept)

    def _said(self, work: Sweep) -> str:
        """Return what stays done if the rest of a run fails."""
        self._dropped = max(self._dropped, work.dropped)
        return f"dropped {counted(self._dropped, 'commit')}" if self._dropped else ""

    def _before_drop(self) -> None:
        """Raise the flags, and move the branches back that end with a named commit."""
        raise_flags(self._repository.backend, "gc", "drops")
        for ref, old, target in _branches_back(self._repository, self._policy.named):
            self._repository.refs.publish(
                ref, old, commit=target, time=current_time(), action=DROPPED
            )

    def _rekey(self, time: str) -> None:
        """Re-encode the deltas that need commits whose data is deleted."""
        from ckptvcs.encode.rekey import REKEY_FLAGS, Rekeyer  # noqa: PLC0415  needs numpy

        repository, gone = self._repository, self._collector.swept(time)
        raise_flags(repository.backend, "read", *REKEY_FLAGS)
        commits = repository.revisions.commits()
        kept = {name: made for name, made in commits.items() if name not in gone.commits}
        depth = repository.config.keyframe_depth
        rekeyer = Rekeyer(repository.catalog, repository.bases, depth, self._progress)
        before = self._collector.unarchived(time).values()
        waiting = {state.values for commit in before for state in commit.parts.values()}
        always = bool(self._policy.named) or must_rekey(repository.catalog, gone)
        rekeyer.run(kept, gone.parts, waiting, always=always)


def _collector(
    repository: Repository, *, now: bool, named: frozenset[ObjectId] = frozenset()
) -> Collector:
    """Return a collector; with `now`, the `named` drops have no grace period, or all without."""
    require_flags(repository.backend, "gc")
    config = repository.config
    grace = 0.0 if now and not named else config.grace_seconds
    best, at_once = config.exact_rule.best, named if now else frozenset()
    return Collector(repository.catalog, repository.refs, repository.fader(), best, grace, at_once)
