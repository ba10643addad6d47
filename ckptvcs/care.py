"""Care of a repository: what is kept, taken back, proven, measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptvcs.config import Config, mend_settings
from ckptvcs.errors import InvalidInputError, StorageError
from ckptvcs.gc.fading import Fader
from ckptvcs.gc.retention import Policy
from ckptvcs.history.canonical_json import now
from ckptvcs.history.format_file import mend_folders, mend_format, raise_flags, require_flags
from ckptvcs.opened import CACHE, CONFIG, Opened
from ckptvcs.store import disk
from ckptvcs.store.leases import exclusive, sole
from ckptvcs.store.local import LocalBackend
from ckptvcs.store.reserve import give_up_reserve, keep_reserve

if TYPE_CHECKING:
    from ckptvcs.gc.collect import Collector, GcPlan
    from ckptvcs.history.reflog import Event, Past, Undone
    from ckptvcs.repair import Repaired
    from ckptvcs.verify import Report

Progress = Callable[[int], None]

_NO_RULES = Policy()


def quiet(_: int) -> None:
    """No progress is shown."""


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


class Care(Opened):
    """A repository that can be looked after."""

    def reflog(self, branch: str | None = None) -> list[Event]:
        """What happened to a branch (HEAD's), newest first."""
        return self._past().events(branch)

    def undo(self) -> Undone:
        """Take back the last move of HEAD's branch, or the last drop of its commits.

        Raises:
            NotFoundError: there is nothing to take back.
            ConflictError: what it was about has been swept; or another writer moved the branch.
        """
        with self.leading_to(None):
            return self._past().undo(now())

    def _past(self) -> Past:
        from ckptvcs.history.reflog import Past  # noqa: PLC0415

        return Past(self.catalog, self.refs)

    def _collector(self) -> Collector:
        from ckptvcs.gc.collect import Collector  # noqa: PLC0415

        require_flags(self.folder, "gc")
        best = self.config.exact_rule.best
        return Collector(self.catalog, self.refs, self.fader(), best)

    def plan_gc(self, policy: Policy = _NO_RULES) -> GcPlan:
        """What `gc` would drop, fade and delete now.  What rekeying frees is not known before it is
        done.

        Raises:
            CorruptionError: something that is needed is missing.
            InvalidInputError: the rules keep nothing at all.
        """
        return self._collector().plan(policy, now())

    def gc(
        self, policy: Policy = _NO_RULES, *, sweep: bool = True, rekey: bool = False,
        progress: Progress = quiet,
    ) -> GcPlan:  # fmt: skip
        """Drop what the rules do not keep, let fade what the settings do not keep, and delete what
        nothing reaches; tiny packs are merged.  What was done, and the sizes that it made on disk,
        which `stats` shows.

        `rekey` merges deltas across commits that were dropped, and bounds every chain by the
        settings.  Without `sweep` it is only said what goes: until the next sweep `undo` takes it
        back.  A full disk is no hindrance, but for what rekeying takes.

        Raises:
            BusyError: a writer is at work.
            CorruptionError: something that is needed is missing: nothing was deleted.
            InvalidInputError: the rules keep nothing at all.
            StorageError: the disk fails.
        """
        if rekey and not sweep:
            raise InvalidInputError("what is rekeyed is swept at once")
        cache, held = self.folder / CACHE, list[int]()
        try:
            plan = self._gc(policy, progress, held, sweep=sweep, rekey=rekey)
        except StorageError as error:
            if not disk.is_full(error):
                raise
            self.catalog.store.move_index_out()
            try:
                give_up_reserve(cache)
            except OSError:
                raise error from None
            plan = self._gc(policy, progress, held, sweep=sweep, rekey=rekey)
        keep_reserve(cache)
        return plan

    def _gc(
        self, policy: Policy, progress: Progress, held: list[int], *, sweep: bool, rekey: bool
    ) -> GcPlan:
        """`held` takes the size of the repository, before this and a try that came before it."""
        from ckptvcs.gc.sweep import Sweep  # noqa: PLC0415

        collector = self._collector()
        with sole(self._backend) as mark:
            before = self.catalog.store.list_packs().keys()
            held.append(collector.held_bytes(debris=True))
            plan = Sweep(collector, self.catalog, mark).run(
                policy, now(), sweep=sweep,
                before_drop=lambda: raise_flags(self.folder, "gc", "drops"),
                rekey=(lambda: self._rekey(progress)) if rekey else None,
            )  # fmt: skip
            left = collector.held_bytes(debris=not sweep)
            held[0] += collector.foreign_bytes(plan, before)
            if not sweep:
                return replace(plan, kept_bytes=left - plan.freed_bytes)
            return replace(plan, freed_bytes=held[0] - left, kept_bytes=left)

    def _rekey(self, progress: Progress) -> None:
        from ckptvcs.encode.rekey import Rekeyer  # noqa: PLC0415

        raise_flags(self.folder, "read", "near", "near-2", "types")
        cache = self.folder / CACHE / "bases"
        Rekeyer(self.catalog, cache, self.config.keyframe_depth, progress).run(
            self.revisions.visible()
        )

    def verify(self, progress: Progress = quiet, *, subset: str | None = None) -> Report:
        """Prove that everything can be read; see `ckptvcs.verify`.  A `subset` of `5%`, `10G` or
        `15m` is what was checked longest ago.

        Raises:
            InvalidInputError: there is no such subset.
        """
        from ckptvcs.budget import Budget  # noqa: PLC0415
        from ckptvcs.verify import Verifier, packs_alone  # noqa: PLC0415

        budget = None if subset is None else Budget.parse(subset)
        with packs_alone(self.catalog) as catalog:
            cache = self.folder / CACHE
            return Verifier(catalog, self.refs, cache, progress, budget).run(self.catalog.store)

    @classmethod
    def mend_files(
        cls, path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None, *,
        drop: bool = False,
    ) -> list[str]:  # fmt: skip
        """Mend what a repository at `path` is opened by, with what the one at `source` has; with
        `drop` without the settings that cannot be read.  The names of the files that were mended.

        Raises:
            BusyError: somebody is at work.
            NotFoundError: there is no repository at `path`, or at `source`.
            StorageError: it cannot be written.
        """
        from ckptvcs.mending import is_kin  # noqa: PLC0415

        folder, copy = cls.locate(path), None if source is None else cls.locate(source)
        if copy is not None and not is_kin(folder, copy):
            copy = None
        settings = None if copy is None else copy / CONFIG
        lost = mend_folders(folder)
        with exclusive(LocalBackend(folder)):
            mended = {
                "format": mend_format(folder, copy),
                CONFIG: mend_settings(folder / CONFIG, settings, drop=drop),
            }
        return lost + [name for name, done in mended.items() if done]

    def repair(
        self, source: str | os.PathLike[str] | None = None, *, drop: bool = False
    ) -> Repaired:
        """Save what can be saved, with what the repository at `source` has; `drop` what cannot.

        Raises:
            BusyError: somebody is at work.
            NotFoundError: there is no repository at `source`.
            StorageError: it cannot be written.
        """
        from ckptvcs.mending import Copy, is_kin  # noqa: PLC0415
        from ckptvcs.repair import Repairer  # noqa: PLC0415
        from ckptvcs.verify import packs_alone  # noqa: PLC0415

        copy = None
        if source is not None:
            other = type(self).open(source)
            kin = is_kin(self.folder, other.folder)
            copy = Copy(other.catalog, other.refs if kin else None)
        files = self.mend_files(self.folder, source, drop=drop)
        with exclusive(self._backend), packs_alone(self.catalog) as catalog:
            if drop:
                raise_flags(self.folder, "gc", "drops")
            done = Repairer(catalog, self.catalog, self.refs).run(copy, drop=drop)
            shutil.rmtree(self.folder / CACHE / "bases", ignore_errors=True)
            self.catalog.store.rebuild()
            self.catalog.forget()
        done.files += files
        return done

    def stats(self) -> Stats:
        """Sizes on disk."""
        from ckptvcs.gc.collect import files_bytes, stored_bytes  # noqa: PLC0415

        commits = self.revisions.visible()
        backend = self._backend
        stored, cached = stored_bytes(backend), files_bytes(backend, backend.names(CACHE))
        fader = Fader(self.catalog, self.refs, Config().exact_rule)  # no setting is asked for
        patches = sum(patch.size_bytes for patch in fader.patches())
        return Stats(
            len(commits), sum(c.raw_bytes for c in commits.values()), stored, stored - patches,
            patches, cached, len(self.catalog.store.list_packs()),
        )  # fmt: skip
