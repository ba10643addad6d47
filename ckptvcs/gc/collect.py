"""gc: plan deletions, show them, record them, and delete.

    drop     commits, or their optimizer parts, that no rule of the user keeps; their data stays
             until the grace period ends
    fade     exact patches that the settings do not keep
    mark     all commits that refs reach, and all objects that the kept commits need (for a tensor,
             its chain down to the keyframe)
    record   drops and fades, durably, before anything is deleted
    sweep    delete packs, from the index first and then from the disk

Writers may run while gc plans.  gc records and sweeps under the exclusive mark, a batch of packs at
a time.  Each time, it looks for new commits and records: it keeps what the new commits need, and
plans again if they contradict the plan.

A missing or unreadable object stops the mark phase, and then nothing is deleted.  The headers of
dropped commits stay, so that the history stays complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType

from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.gc.decide import OPTIMIZER, Decision, Judge, drop_records, dropped_with
from ckptvcs.gc.fading import Faded, Fader, Patch
from ckptvcs.gc.grace import first_end, waiting_archives, waiting_drops, wants_rekey
from ckptvcs.gc.repack import Merge, plan_merges
from ckptvcs.gc.retention import Best, Policy
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog, Dropped
from ckptvcs.history.commit import Commit
from ckptvcs.history.reachability import Marked, bases, mark
from ckptvcs.history.records import Archived, DropRecord, dump_drop_record, load_drop_record
from ckptvcs.history.refs import Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.rows import Place
from ckptvcs.store.leases import dead_leases, live_leases
from ckptvcs.store.pack import FOLDERS, PackWriter, packed_size


@dataclass(frozen=True)
class Picture:
    """The state on which a plan is based: reachable commits, drop records, notes, targets of refs,
    and the marked objects.
    """

    commits: Set[ObjectId] = frozenset()
    records: Set[ObjectId] = frozenset()
    notes: Set[ObjectId] = frozenset()
    tips: Set[ObjectId] = frozenset()
    marked: Marked = field(default_factory=Marked)


@dataclass(frozen=True)
class GcPlan:
    """The commits, patches and files that gc deletes or would delete.

    Attributes:
        decisions: A decision for each commit; empty without retention rules.
        fading: The exact patches that expire.
        faded: The commits that become near because of that.
        packs: The folders of the deleted packs, by pack.
        stale_files: The names of files that interrupted processes left.
        freed_bytes: The bytes of deleted packs and stale files, less those of new records.
        kept_bytes: The size of the repository afterwards, in bytes.
        drops: The drop records to write.
        unreachable: Unreachable commits that never were on a ref.
        waiting: The dropped commits whose data stays until their grace period ends.
        waiting_bytes: The bytes that gc deletes when all grace periods have ended.
        next_deletion: The end of the first of these grace periods, ISO 8601 in UTC; None if no
            commit waits.
        archived: The commits that this gc archives, with the errors of that form.
        replaced: The archived commits whose form before waits for the end of a grace period.
        abandoned: The commits that an undo or a deleted branch left, which no ref reaches.
        picture: The state of the repository from which the plan was made.
    """

    decisions: tuple[Decision, ...]
    fading: tuple[Patch, ...]
    faded: tuple[Faded, ...]
    packs: dict[PackId, str]
    stale_files: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int
    drops: tuple[DropRecord, ...] = ()
    unreachable: tuple[ObjectId, ...] = ()
    waiting: tuple[ObjectId, ...] = ()
    waiting_bytes: int = 0
    next_deletion: str | None = None
    abandoned: tuple[ObjectId, ...] = ()
    archived: tuple[Archived, ...] = ()
    replaced: tuple[ObjectId, ...] = ()
    picture: Picture = field(default_factory=Picture)


@dataclass(frozen=True)
class Deletion:
    """The needed objects, and the packs to delete and to merge."""

    marked: Marked
    packs: dict[PackId, str]
    merges: list[Merge]
    freed_bytes: int


class OutdatedError(CkptError):
    """Changes since a plan contradict it."""


COUNTED = (*FOLDERS, "refs", "leases", "marks")
"""The folders of a repository without derived data and unfinished files."""


def stored_bytes(backend: Backend) -> int:
    """Return the bytes of a repository on disk, without its cache and unfinished files."""
    names = (name for folder in COUNTED for name in backend.names(folder))
    return files_bytes(backend, [*names, "format", "config.toml"])


def files_bytes(backend: Backend, names: Iterable[str]) -> int:
    """Return the bytes of those names that still exist and are files."""
    total = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError, CorruptionError):
            total += backend.size(name)
    return total


class _Nowhere:
    """A writer that discards everything."""

    def write(self, data: bytes | memoryview) -> None:
        pass

    def publish(self, name: str) -> None:
        pass

    def abort(self) -> None:
        pass


class Collector:
    """Plans and sweeps one repository."""

    def __init__(
        self,
        catalog: Catalog,
        refs: Refs,
        fader: Fader,
        best: Best | None,
        grace: float = 0.0,
        at_once: frozenset[ObjectId] = frozenset(),
    ) -> None:
        """`best` is the rule of the settings for the best commits; `grace` is in seconds.

        A drop of the commits `at_once` has no grace period.
        """
        self._catalog, self._refs, self._fader, self._grace = catalog, refs, fader, grace
        self._at_once = at_once
        self._judge = Judge(catalog, refs, best)
        self._revisions = Revisions(catalog, refs)

    # -- planning ------------------------------------------------------------------------------

    def plan(self, policy: Policy, time: str, *, recorded: bool = False) -> GcPlan:
        """Plan the deletions at a time, without deleting.

        Unless `recorded`, the plan counts the bytes of the new records.

        Raises:
            CorruptionError: a needed object is missing or unreadable.
            InvalidInputError: the rules keep no commit.
        """
        store = self._catalog.store
        store.rebuild()  # never delete on the word of an index that may be wrong
        self._catalog.forget()
        # Writers are running: list the objects first, then the refs that lead to them.
        headers, records = store.ids(Kind.COMMIT), frozenset(store.ids(Kind.RECORD))
        notes = frozenset(store.ids(Kind.NOTE))
        listed = self._packs()
        tips = frozenset(self._revisions.tips().values())
        commits = dict(self._revisions.reachable(sorted(tips)))
        left = self._left(commits, policy, headers, time)
        gone = self._catalog.dropped()
        judged = commits | {name: left[name] for name in policy.named & left.keys()}
        rows = self._judge.decide(policy, judged, gone, datetime.fromisoformat(time))
        commits |= left
        drops = drop_records(rows, policy, time, self._refs.branches())
        hidden = dropped_with(gone, rows)
        visible = {name: made for name, made in commits.items() if name not in hidden.commits}
        fading = self._fader.everywhere(visible)
        if recorded:  # a note or a deleted tag may have let more patches fade since
            fading = [patch for patch in fading if self._catalog.is_fading(patch.values)]
        coming = [] if recorded else self._packed([*drops, *self._fader.record(fading, time)])
        late = self._deletion(commits, hidden, fading, listed, coming)  # after all grace periods
        swept = hidden if not self._grace else self._swept_with(rows, time)
        before = self.unarchived(time)
        same = swept == hidden and not before
        soon = late if same else self._deletion(commits, swept, fading, listed, coming, before)
        debris = self._debris()
        freed = soon.freed_bytes + self._size(debris)
        counted: set[ObjectId] = set()
        going = {pack for merge in late.merges for pack in merge.packs}.union(late.packs)
        decisions = tuple(self._with_bytes(row, late.marked, going, counted) for row in rows)
        loose = self._never_reached(set(headers) - commits.keys())
        kept = self.held_bytes(debris=True) - freed
        return GcPlan(
            decisions,
            tuple(fading),
            self._fader.faded(fading),
            soon.packs,
            tuple(debris),
            freed,
            kept,
            tuple(drops),
            tuple(loose),
            tuple(sorted((hidden.commits - swept.commits) & commits.keys())),
            late.freed_bytes - soon.freed_bytes,
            self._next_deletion(time, drops),
            tuple(sorted(set(headers) - commits.keys() - set(loose) - gone.commits)),
            (),
            tuple(sorted(before.keys() & commits.keys())),
            Picture(frozenset(commits), records, notes, tips, soon.marked),
        )

    def _never_reached(self, names: Set[ObjectId]) -> list[ObjectId]:
        """Return those of some commits that no version of a ref reaches.

        Raises:
            CorruptionError: There are so many that a ref must be lost.
        """
        loose = self._revisions.unreachable(names)
        for name in self._revisions.lost_lines() if len(loose) > 1 else ():
            raise CorruptionError(
                f"commit {name[:8]} and its parent are unreachable: a ref is lost",
                hint="run 'ckpt verify --repair'",
            )
        return loose

    def _swept_with(self, rows: Iterable[Decision], time: str) -> Dropped:
        """Return `swept`, after a drop at once has been carried out."""
        return dropped_with(self.swept(time), [row for row in rows if row.name in self._at_once])

    def swept(self, time: str) -> Dropped:
        """Return the dropped commits and parts whose grace period has ended at a time."""
        return self._catalog.dropped(*self._waiting(time))

    def _waiting(self, time: str) -> list[ObjectId]:
        found = waiting_drops(self._catalog, datetime.fromisoformat(time), self._grace)
        if not self._at_once:
            return found
        drops = self._catalog.drops()
        return [name for name in found if not self._at_once.issuperset(drops[name].commits)]

    def unarchived(self, time: str) -> dict[ObjectId, Commit]:
        """Return archived commits in the form from before, while its grace period runs."""
        records = self._archives(time).values()
        return {name: self._catalog.original(name) for record in records for name in record.commits}

    def _archives(self, time: str) -> dict[ObjectId, DropRecord]:
        return waiting_archives(self._catalog, datetime.fromisoformat(time), self._grace)

    def owes_rekey(self, time: str) -> bool:
        """Return whether deltas must be re-encoded before what they need can be deleted."""
        return wants_rekey(self._catalog, self.swept(time), self._archives(time))

    def _left(
        self,
        commits: Mapping[ObjectId, Commit],
        policy: Policy,
        headers: Iterable[ObjectId],
        time: str,
    ) -> dict[ObjectId, Commit]:
        """Return the commits that no ref reaches but that stay.

        They were dropped at the end of a branch, and wait; a drop `at_once` leaves all others, too.
        `commits` are those that a ref reaches, and `headers` all that are stored.
        """
        drops, catalog = self._catalog.drops(), self._catalog
        names = {one for name in self._waiting(time) for one in drops[name].commits}
        names |= {name for name in policy.named if catalog.store.contains(name)}
        if self._at_once:
            others = set(headers) - commits.keys() - catalog.dropped().commits
            names |= others - set(self._revisions.unreachable(others))
        found: dict[ObjectId, Commit] = {}
        for name in sorted(names - commits.keys(), key=lambda one: catalog.commit(one).time):
            commit = catalog.commit(name)
            if commit.parent is None or commit.parent in commits or commit.parent in found:
                found[name] = commit
        return found

    def _next_deletion(self, time: str, drops: Sequence[DropRecord]) -> str | None:
        """Return when the first grace period ends, of the recorded drops and the new `drops`."""
        recorded = self._catalog.drops()
        waiting = [recorded[name] for name in self._waiting(time)]
        waiting += self._archives(time).values()
        return first_end([*waiting, *drops], self._grace) if self._grace else None

    def _deletion(
        self,
        commits: Mapping[ObjectId, Commit],
        gone: Dropped,
        fading: Sequence[Patch],
        listed: Mapping[PackId, str],
        coming: list[Place],
        before: Mapping[ObjectId, Commit] = MappingProxyType({}),
    ) -> Deletion:
        """Return the packs to delete and to merge if the data of `gone` commits goes.

        `before` are archived commits in the form from before, which stays.
        """
        marked = self._mark(commits, gone, fading, before)
        packs = self._unmarked(listed, marked)
        merges = plan_merges(self._catalog, marked, coming)
        return Deletion(marked, packs, merges, self._freed(packs, merges, coming))

    def after(self, plan: GcPlan, time: str) -> GcPlan:
        """Return a recorded plan with the packs and debris that can be deleted now."""
        again = self.plan(Policy(), time, recorded=True)
        return replace(
            again, decisions=plan.decisions, fading=plan.fading, faded=plan.faded, drops=plan.drops
        )

    def held_bytes(self, *, debris: bool) -> int:
        """Return the bytes of the repository as `stats` counts them, without live leases and marks.

        With `debris`, this includes debris in the folders that `stats` does not count.
        """
        backend = self._catalog.store.backend
        total = stored_bytes(backend)
        total -= self._size([*live_leases(backend), *live_leases(backend, "marks/")])
        if debris:
            names = (name for name in self._debris() if name.partition("/")[0] not in COUNTED)
            total += self._size(names)
        return total

    def foreign_bytes(self, plan: GcPlan, before: Set[PackId]) -> int:
        """Return the bytes of packs that writers added: not in `before`, with unmarked objects."""
        store, marked, total = self._catalog.store, plan.picture.marked.objects, 0
        for pack, (folder, size) in store.pack_sizes().items():
            if pack not in before:
                with contextlib.suppress(CorruptionError, FileNotFoundError):
                    names = {entry.id for entry in store.entries(pack, folder)}
                    total += 0 if names <= marked else size
        return total

    def _size(self, names: Iterable[str]) -> int:
        return files_bytes(self._catalog.store.backend, names)

    def _packed(self, records: list[DropRecord]) -> list[Place]:
        """Return the future places of records, with their exact sizes."""
        pack = PackWriter(_Nowhere(), "meta")
        for record in records:
            pack.add(Kind.RECORD, dump_drop_record(record))
        return [Place(PackId(""), "meta", entry) for entry in pack.entries]

    def _freed(self, packs: dict[PackId, str], merges: Iterable[Merge], coming: list[Place]) -> int:
        """Return the bytes freed by deleting `packs` and by merges, minus the new records."""
        size = self._catalog.store.pack_sizes()
        new = packed_size(place.entry for place in coming) if coming else 0
        size[PackId("")] = "meta", new
        freed = sum(size[pack][1] for pack in packs) - new
        for merge in merges:
            freed += sum(size[pack][1] for pack in merge.packs) - merge.size_bytes
        return freed

    def _with_bytes(
        self, row: Decision, marked: Marked, going: set[PackId], counted: set[ObjectId]
    ) -> Decision:
        """Return a decision with its bytes on disk.

        Bundles in packs that are `going` are freed.  `counted` ensures that each counts once.
        """
        if row.action == "keep":
            return row
        freed = chained = 0
        for part, state in row.commit.parts.items():
            if row.action == "drop" or part == OPTIMIZER:
                for bundle in self._own_bundles(state.values) - counted:
                    counted.add(bundle)
                    for place in self._catalog.store.places(bundle):
                        if bundle in marked.objects:
                            chained += place.entry.record_bytes
                        elif place.pack in going:
                            freed += place.entry.record_bytes
        return Decision(row.name, row.commit, row.action, row.reasons, freed, chained)

    def _own_bundles(self, values: ObjectId) -> set[ObjectId]:
        """Return the existing bundles of the newest recipe of a tensor hash table."""
        recipes = self._catalog.recipes(values)
        return {
            bundle
            for _, recipe in recipes[:1]
            for bundle in recipe.bundles
            if self._catalog.store.contains(bundle)
        }

    # -- marking -------------------------------------------------------------------------------

    def _mark(
        self,
        commits: Mapping[ObjectId, Commit],
        gone: Dropped,
        fading: Iterable[Patch],
        before: Mapping[ObjectId, Commit],
    ) -> Marked:
        faded = {patch.values for patch in fading}
        marked = mark(self._catalog, commits, gone, faded)
        if before:
            kept = mark(self._catalog, before, gone, faded)
            marked.objects |= kept.objects
            marked.bundles |= kept.bundles
        records = self._catalog.store.ids(Kind.RECORD)
        marked.objects |= {*records, *bases(self._catalog, records)}
        return marked

    def _packs(self) -> dict[PackId, str]:
        """Return the indexed packs that exist, with their folders."""
        sizes = self._catalog.store.pack_sizes()
        listed = self._catalog.store.list_packs()
        return {pack: folder for pack, folder in listed.items() if pack in sizes}

    def _unmarked(self, listed: Mapping[PackId, str], marked: Marked) -> dict[PackId, str]:
        """Return the packs without marked objects, with their folders."""
        places = self._catalog.store.places
        needed = {place.pack for name in marked.objects for place in places(name)}
        return {pack: folder for pack, folder in listed.items() if pack not in needed}

    def _debris(self) -> list[str]:
        backend = self._catalog.store.backend
        debris = [*backend.names("tmp"), *dead_leases(backend)]
        # Unfinished cached bases begin with a dot; no writer runs while gc deletes them.
        return debris + [name for name in backend.names("cache/bases") if "/." in name]

    # -- sweeping ------------------------------------------------------------------------------

    def require_current(self, plan: GcPlan) -> set[ObjectId]:
        """Return the objects that commits made after the plan need.  No writer may run.

        Raises:
            OutdatedError: a ref leads to a commit that the plan drops or fades, or a drop was
                recorded or undone.
            CorruptionError: a needed object is missing.
        """
        seen, store = plan.picture, self._catalog.store
        self._refs.settle_all()  # a writer may have been killed between publishing and syncing
        self._catalog.reload()
        for name in set(store.ids(Kind.RECORD)) - seen.records:
            record = load_drop_record(store.get(name, Kind.RECORD))
            if record.what != "fade":  # commits record fades too
                raise OutdatedError("another process dropped commits, or undid a drop")
        going = {name for record in plan.drops for name in record.commits}
        going |= {name for patch in plan.fading for name in patch.commits}
        tips = frozenset(self._revisions.tips().values())
        if going & (tips - seen.tips):
            raise OutdatedError("a ref leads to a commit that the plan drops or fades")
        new = dict(self._revisions.reachable(sorted(tips - seen.tips), seen.commits))
        if not new:
            return set()
        return self._mark(new, self.swept(now()), (), self.unarchived(now())).objects

    def record(self, plan: GcPlan, time: str) -> GcPlan:
        """Record the drops and fades durably; return the plan with these records.

        Raises:
            OutdatedError: a note was written, which may change the best commits.
        """
        if set(self._catalog.store.ids(Kind.NOTE)) - plan.picture.notes:
            raise OutdatedError("another process wrote a note")
        tables = set(self._catalog.patches().values())
        fading = [patch for patch in plan.fading if patch.values in tables]
        self._catalog.record([*plan.drops, *self._fader.record(fading, time)])
        records = self._catalog.store.ids(Kind.RECORD)
        plan.picture.marked.objects.update(records, bases(self._catalog, records))
        return replace(plan, picture=replace(plan.picture, records=frozenset(records)))

    def delete(self, packs: Mapping[PackId, str], needed: Set[ObjectId]) -> None:
        """Delete packs, by their folders, except those that hold `needed` objects."""
        stay = {place.pack for name in needed for place in self._catalog.store.places(name)}
        folders = {pack: folder for pack, folder in packs.items() if pack not in stay}
        self._catalog.store.delete_packs(folders)
        self._catalog.forget()

    def delete_debris(self) -> None:
        """Delete the files that dead processes left behind.  No writer may run."""
        for name in self._debris():
            self._catalog.store.backend.delete(name)
