"""Sweep: one run of gc, from its plan to the last deleted pack.

    plan      writers may run
    record    drops and fades; no writer may run
    delete    unmarked packs, a batch at a time; no writer may run during a batch
    merge     tiny packs and packs that are mostly waste; writers may run
    delete    the merged packs, in the same way

So a writer waits for one batch at most.  If a change contradicts the plan, gc begins again.  During
the last attempt no writer may run, so that gc always ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext

from ckptvcs.errors import CorruptionError, StorageError
from ckptvcs.gc.collect import Collector, GcPlan, OutdatedError
from ckptvcs.gc.repack import copy_kept, plan_merges
from ckptvcs.gc.retention import Policy
from ckptvcs.history.catalog import Catalog
from ckptvcs.store import disk
from ckptvcs.store.ids import ObjectId, PackId
from ckptvcs.store.leases import exclusive

BATCH = 2000  # packs that are deleted while writers wait
_BESIDE = 3  # attempts while writers may run

Step = Callable[[], None]


class Sweep:
    """One gc of a repository, which holds the `mark` of `leases.sole`."""

    def __init__(self, collector: Collector, catalog: Catalog, mark: str) -> None:
        self._collector, self._catalog, self._mark = collector, catalog, mark
        self._lets_in = True
        self.dropped = 0
        """The commits whose drop is recorded."""

    def run(
        self, policy: Policy, time: str, *, sweep: bool, before_drop: Step, rekey: Step | None
    ) -> GcPlan:
        """Plan, record and, with `sweep`, delete.

        `before_drop` is called before the first drop is recorded, and `rekey` after all records.

        Raises:
            BusyError: a writer is still running at the end of the wait.
            CorruptionError: a needed object is missing; nothing was deleted.
            StorageError: the disk is failing.
        """
        plan: GcPlan | None = None
        for attempt in range(_BESIDE + 1):
            is_last = attempt == _BESIDE
            with self._alone() if is_last else nullcontext():
                self._lets_in = not is_last
                try:
                    if plan is None:
                        plan = self._recorded(self._collector.plan(policy, time), time, before_drop)
                    else:
                        plan = self._collector.after(plan, time)
                    if rekey is not None:
                        rekey()
                        rekey, plan = None, self._collector.after(plan, time)
                    if sweep:
                        self._sweep(plan)
                    return plan
                except (OutdatedError, CorruptionError):
                    if is_last:
                        raise
                finally:
                    self._lets_in = True
        raise AssertionError("the last attempt returns or raises")

    def _alone(self) -> AbstractContextManager[None]:
        """Keep writers out, unless the whole attempt does so already."""
        backend = self._catalog.store.backend
        return exclusive(backend, self._mark, wait=True) if self._lets_in else nullcontext()

    def _recorded(self, plan: GcPlan, time: str, before_drop: Step) -> GcPlan:
        if not plan.drops and not plan.fading:
            return plan
        with self._alone():
            self._collector.require_current(plan)
            if plan.drops:
                before_drop()
            done = self._collector.record(plan, time)
        self.dropped = len({name for drop in plan.drops for name in drop.commits})
        return done

    def _sweep(self, plan: GcPlan) -> None:
        self._delete(plan, plan.packs)
        merged: dict[PackId, str] = {}
        copied: set[ObjectId] = set()  # to the new packs
        for merge in plan_merges(self._catalog, plan.picture.marked):
            try:
                copy_kept(self._catalog, merge)
            except StorageError as error:
                if not disk.is_full(error):
                    raise
                break  # merging is optional: the packs stay as they are
            copied |= {place.entry.id for place in merge.places}
            merged |= dict.fromkeys(merge.packs, merge.folder)
        if merged:
            self._delete(plan, merged, copied)

    def _delete(
        self, plan: GcPlan, packs: Mapping[PackId, str], copied: Set[ObjectId] = frozenset()
    ) -> None:
        """Delete packs in batches, except those with objects that only they have."""
        folders = list(packs.items())
        for start in range(0, len(folders) or 1, BATCH):
            with self._alone():
                needed = self._collector.require_current(plan)
                self._collector.delete_debris()
                self._collector.delete(dict(folders[start : start + BATCH]), needed - copied)
