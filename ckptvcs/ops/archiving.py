"""Archive commits, or measure in a temporary folder what that would free."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from datetime import datetime

from ckptvcs.gc.archiving import ArchiveRule, Pathfinder
from ckptvcs.gc.collect import Collector, GcPlan
from ckptvcs.gc.decide import Judge
from ckptvcs.gc.fading import Fader
from ckptvcs.gc.retention import Policy
from ckptvcs.history.catalog import Catalog, keys_of
from ckptvcs.history.format_file import raise_flags
from ckptvcs.history.records import DIRECT, DropRecord
from ckptvcs.history.refs import Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.ops.config import Config
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress
from ckptvcs.store.disk import scratch_folder
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.layered import Layered
from ckptvcs.store.leases import exclusive
from ckptvcs.store.object_store import ObjectStore


def archive(
    repository: Repository,
    policy: Policy,
    mark: str,
    time: str,
    progress: Progress,
    direct: Set[ObjectId] = frozenset(),
) -> DropRecord | None:
    """Store the archived forms of the commits that the rules name, and record them.

    `mark` is that of `leases.sole`.  With `direct`, only these commits are archived, from their
    exact form, and no undo reverts that.  Nothing is recorded if a ref protects one of them by now:
    the next gc tries again.  Return the record.

    Raises:
        CorruptionError: A tensor does not decode to its recorded hash.
        StorageError: The disk is full; nothing has changed.
    """
    from ckptvcs.encode.archive import ARCHIVE_FLAGS  # noqa: PLC0415  needs numpy

    work = Work(repository.catalog, repository.refs, repository.config, policy, time, direct)
    raise_flags(repository.backend, "read", *ARCHIVE_FLAGS)
    record = work.archive(progress)
    if record is None:
        return None
    with exclusive(repository.backend, mark, wait=True):
        repository.catalog.reload()
        if work.kept() & set(record.commits):
            return None
        repository.catalog.record([record])
    return record


def preview(repository: Repository, policy: Policy, time: str, progress: Progress) -> GcPlan:
    """Return what gc would do with `archive`, after all grace periods.

    The archived forms are made in a temporary folder.
    """
    from ckptvcs.encode.rekey import Rekeyer  # noqa: PLC0415  needs numpy

    with scratch_folder("ckpt-archive-") as folder:
        backend = Layered(folder / "files", repository.backend)
        backend.make_folders(["tmp"])
        store = ObjectStore(backend, folder / "index", keys_of)
        try:
            store.refresh()
            work = Work(Catalog(store), Refs(backend), repository.config, policy, time)
            before = work.collector().held_bytes(debris=True)
            record = work.archive(progress)
            if record is not None:
                work.catalog.record([record])
                visible = work.revisions().visible()
                rekeyer = Rekeyer(
                    work.catalog, folder / "bases", work.config.keyframe_depth, progress
                )
                rekeyer.run(visible, work.catalog.dropped().parts, always=False)
            plan = work.collector().plan(policy.without_drops, time)
            archived = () if record is None else record.archived
            freed = before - plan.kept_bytes
            return replace(plan, freed_bytes=freed, archived=archived)
        finally:
            store.index.close()


def rule_of(config: Config) -> ArchiveRule:
    """Return the rule of the settings; without one, commits that stay exact are not archived."""
    after, lag = config.archive_after, config.archive_lag
    return ArchiveRule(
        config.keep_exact if isinstance(after, str) else max(after, config.keep_exact),
        config.archive_every,
        None if isinstance(lag, str) else lag,
    )


@dataclass(frozen=True)
class Work:
    """The archiving of one repository, by the rules of its settings and of `policy`."""

    catalog: Catalog
    refs: Refs
    config: Config
    policy: Policy
    time: str
    direct: Set[ObjectId] = frozenset()

    def revisions(self) -> Revisions:
        """Return the present commits of the repository."""
        return Revisions(self.catalog, self.refs)

    def kept(self) -> Set[ObjectId]:
        """Return the commits that refs, settings or rules protect, or that stay exact."""
        commits = self.revisions().visible()
        judge = Judge(self.catalog, self.refs, self.config.exact_rule.best)
        kept = set(judge.protected(commits))
        if self.policy.drops:
            now = datetime.fromisoformat(self.time)
            decisions = judge.decide(self.policy, commits, self.catalog.dropped(), now)
            kept |= {row.name for row in decisions if row.action != "drop"}
        if self.direct:
            return kept | (commits.keys() - self.direct)
        fader = Fader(self.catalog, self.refs, self.config.exact_rule)
        fading = {patch.pack for patch in fader.everywhere(commits)}
        lasting = (patch for patch in fader.patches() if patch.pack not in fading)
        return kept.union(*(patch.commits for patch in lasting))

    def archive(self, progress: Progress) -> DropRecord | None:
        """Store archived forms, and return the record to write; None if there are none."""
        from ckptvcs.encode.archive import Archiver  # noqa: PLC0415  needs numpy

        rule, depth = rule_of(self.config), self.config.keyframe_depth
        paths = list(Pathfinder(self.catalog, self.revisions(), self.kept(), rule).paths())
        archiver = Archiver(self.catalog, rule, depth, progress)
        rows = tuple(archiver.run(paths)) if paths else ()
        if not rows:
            return None
        names = tuple(row.commit for row in rows)
        after = self.refs.branches()
        text = DIRECT if self.direct else rule.text
        return DropRecord("archive", names, (), text, self.time, after=after, archived=rows)

    def collector(self) -> Collector:
        """Return a collector without a grace period."""
        rule = self.config.exact_rule
        fader = Fader(self.catalog, self.refs, rule)
        return Collector(self.catalog, self.refs, fader, rule.best)
