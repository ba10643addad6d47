"""gc: plan what can go, show it, record it, sweep it.

    drop     commits, or their optimizer parts, that no rule of the user keeps
    fade     exact patches that the settings do not keep
    mark     every commit that a ref reaches, and all that the kept ones need; for a tensor that is
             the chain down to its keyframe
    record   what is dropped and fades, durably, before anything is deleted
    sweep    index first, files after

Writers are at work while gc plans.  It records and sweeps under the exclusive mark, a batch of
packs at a time, and looks each time at what came since the plan: what that needs stays, and where
it contradicts the plan there is a new one.

A missing or unreadable object stops the mark: nothing is deleted on half a picture.  Headers of
commits that were dropped stay, so that the history stays whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime

from ckptvcs.errors import CkptError, CorruptionError, InvalidInputError
from ckptvcs.gc.fading import Fader, Patch
from ckptvcs.gc.repack import Merge, plan_merges
from ckptvcs.gc.retention import Best, Policy, Row
from ckptvcs.history.catalog import Catalog, Dropped
from ckptvcs.history.commit import Commit
from ckptvcs.history.reachability import Marked, bases, mark
from ckptvcs.history.recipe import DropRecord, dump_drop_record, load_drop_record
from ckptvcs.history.refs import Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.index import Place
from ckptvcs.store.leases import dead_leases, live_leases
from ckptvcs.store.pack import FOLDERS, PackWriter, packed_size

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Decision:
    """The decision of gc about one commit.

    Attributes:
        name: The id of the commit.
        commit: The commit.
        action: `keep`, `drop` or `drop optimizer`.
        reasons: The rules that keep the commit, or the reasons of the drop.
        freed_bytes: The bytes that gc deletes.
        chained_bytes: The bytes of a dropped commit that are kept, because deltas depend on them.
    """

    name: ObjectId
    commit: Commit
    action: str
    reasons: tuple[str, ...]
    freed_bytes: int = 0
    chained_bytes: int = 0


@dataclass(frozen=True)
class GcPlan:
    """The commits, patches and files that gc deletes or would delete.

    Attributes:
        decisions: A decision for each commit; empty without retention rules.
        fading: The exact patches that expire.
        packs: The folders of the deleted packs, by pack.
        debris: The names of files that interrupted processes left.
        freed_bytes: By how many bytes the repository and the debris shrink, less the new records.
        kept_bytes: The size of the repository afterwards, in bytes.
        drops: The drop records to write.
        loose: Unreachable commits that never were on a ref.
        picture: The state of the repository from which the plan was made.
    """

    decisions: tuple[Decision, ...]
    fading: tuple[Patch, ...]
    packs: dict[PackId, str]
    debris: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int
    drops: tuple[DropRecord, ...] = ()
    loose: tuple[ObjectId, ...] = ()
    picture: Picture | None = None


@dataclass(frozen=True)
class Picture:
    """What a plan was made of: the commits in the history, the records of what was let go, what
    the refs lead to; and what it marked.
    """

    commits: Set[ObjectId]
    records: Set[ObjectId]
    tips: Set[ObjectId]
    marked: Marked


class OutdatedError(CkptError):
    """What came since a plan contradicts it."""


COUNTED = (*FOLDERS, "refs", "leases", "marks")
"""The folders of a repository that hold more than what can be made anew."""


def stored_bytes(backend: Backend) -> int:
    """Bytes of a repository on disk, without its cache and files on their way."""
    names = (name for folder in COUNTED for name in backend.names(folder))
    return files_bytes(backend, [*names, "format", "config.toml"])


def files_bytes(backend: Backend, names: Iterable[str]) -> int:
    """Bytes of files, but of those that have gone meanwhile, or that are none."""
    found = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError, CorruptionError):
            found += backend.size(name)
    return found


@dataclass(frozen=True)
class Going:
    """A pack that goes: its folder, and the objects of it that another pack has now."""

    folder: str
    copied: frozenset[ObjectId] = frozenset()


class _Nowhere:
    """Takes what is written, and keeps nothing."""

    def write(self, data: bytes | memoryview) -> None:
        pass

    def publish(self, name: str) -> None:
        pass

    def abort(self) -> None:
        pass


class Collector:
    """Plans and sweeps one repository."""

    def __init__(self, catalog: Catalog, refs: Refs, fader: Fader, best: Best | None) -> None:
        """`best` is what the settings keep."""
        self._catalog, self._refs, self._fader, self._best = catalog, refs, fader, best
        self._revisions = Revisions(catalog, refs)

    # -- planning ------------------------------------------------------------------------------

    def plan(self, policy: Policy, time: str, *, recorded: bool = False) -> GcPlan:
        """Decide what can go at a time.  Deletes nothing.  Where it is `recorded`, that takes no
        room any more.

        Raises:
            CorruptionError: something that is needed is missing or unreadable.
            InvalidInputError: the rules keep nothing at all.
        """
        store = self._catalog.store
        store.rebuild()  # nothing is deleted on the word of an index that may be rotten
        self._catalog.forget()
        # First what there is, then what leads to it: writers are at work.
        headers, records = store.ids(Kind.COMMIT), frozenset(store.ids(Kind.RECORD))
        listed = self._packs()
        tips = frozenset(self._revisions.tips().values())
        commits = dict(self._revisions.reachable(sorted(tips)))
        gone = self._catalog.dropped()
        rows = self._judge(policy, commits, gone, datetime.fromisoformat(time))
        drops = _drops(rows, policy, time, self._refs.branches())
        after = _with(gone, rows)
        visible = {name: made for name, made in commits.items() if name not in after.commits}
        fading = self._fader.everywhere(visible)
        marked = self._mark(commits, after, fading)
        packs = self._unmarked(listed, marked)
        debris = self._debris()
        coming = [] if recorded else self._packed([*drops, *self._fader.record(fading, time)])
        merges = plan_merges(self._catalog, marked, coming)
        freed = self._freed(packs, merges, coming) + self._size(debris)
        counted: set[ObjectId] = set()
        merged = {pack for merge in merges for pack in merge.packs}
        decisions = tuple(
            self._with_bytes(row, marked, merged.union(packs), counted) for row in rows
        )
        loose = self._revisions.unreachable(set(headers) - commits.keys())
        for name in self._revisions.lost_lines() if len(loose) > 1 else ():
            raise CorruptionError(
                f"no ref leads to commit {name[:8]}, which stands on others that none leads to",
                hint="a ref is lost: see 'ckpt verify --repair'",
            )
        kept = self.held_bytes(debris=True) - freed
        return GcPlan(
            decisions,
            tuple(fading),
            packs,
            tuple(debris),
            freed,
            kept,
            tuple(drops),
            tuple(loose),
            Picture(frozenset(commits), records, tips, marked),
        )

    def after(self, plan: GcPlan, time: str) -> GcPlan:
        """A plan that was recorded, with what can go of the disk now."""
        again = self.plan(Policy(), time, recorded=True)
        return replace(again, decisions=plan.decisions, fading=plan.fading, drops=plan.drops)

    def held_bytes(self, *, debris: bool) -> int:
        """Bytes of the repository as `stats` counts them, but of what says that somebody is at
        work; with `debris` also of what writers that are gone left in other folders.
        """
        backend = self._catalog.store.backend
        at_work = [*live_leases(backend), *live_leases(backend, "marks/")]
        found = stored_bytes(backend) - self._size(at_work)
        if debris:
            names = (name for name in self._debris() if name.partition("/")[0] not in COUNTED)
            found += self._size(names)
        return found

    def foreign_bytes(self, plan: GcPlan, before: Set[PackId]) -> int:
        """Bytes of packs that writers have added since there were those `before`: they hold what a
        plan does not mark.
        """
        assert plan.picture is not None
        store, known, found = self._catalog.store, plan.picture.marked.objects, 0
        for pack, (folder, size) in store.pack_sizes().items():
            if pack not in before:
                with contextlib.suppress(CorruptionError, FileNotFoundError):
                    names = {entry.id for entry in store.entries(pack, folder)}
                    found += 0 if names <= known else size
        return found

    def _size(self, names: Iterable[str]) -> int:
        return files_bytes(self._catalog.store.backend, names)

    def _packed(self, records: list[DropRecord]) -> list[Place]:
        """Where records will be once they are written, as large as they will be."""
        pack = PackWriter(_Nowhere(), "meta")
        for record in records:
            pack.add(Kind.RECORD, dump_drop_record(record))
        return [Place(PackId(""), "meta", entry) for entry in pack.entries]

    def _freed(self, packs: dict[PackId, str], merges: Iterable[Merge], coming: list[Place]) -> int:
        """By how much packs will be less when some are deleted, and others are merged."""
        size = self._catalog.store.pack_sizes()
        new = packed_size(place.entry for place in coming) if coming else 0
        size[PackId("")] = "meta", new
        freed = sum(size[pack][1] for pack in packs) - new
        for merge in merges:
            freed += sum(size[pack][1] for pack in merge.packs) - merge.size_bytes
        return freed

    def _lines(self, hidden: frozenset[ObjectId]) -> dict[str, list[Row]]:
        """Every branch, newest first; then what only tags, pins or HEAD lead to."""
        store, lines = self._catalog.store, {}
        seen: set[ObjectId] = set()
        tips = self._revisions.tips()
        for ref in sorted(tips, key=lambda ref: not ref.startswith("heads/")):
            whole = list(self._catalog.ancestors(tips[ref]))
            rows: list[Row] = []
            for age, (name, commit) in enumerate(whole):
                if name in seen and not ref.startswith("heads/"):
                    break  # only what no branch has is a line of its own
                seen.add(name)
                if name not in hidden:
                    stored = commit.data_bytes + store.home_size(name)
                    ordinal = len(whole) - 1 - age
                    rows.append(Row(name, commit, len(rows), age, ordinal, stored))
            lines[ref] = rows
        return lines

    def _judge(
        self, policy: Policy, commits: Mapping[ObjectId, Commit], gone: Dropped, now: datetime
    ) -> list[Decision]:
        """A decision on every commit, if there are rules."""
        if not policy.drops and policy.optimizer_last is None:
            return []
        known = {name: made for name, made in commits.items() if name not in gone.commits}
        protected = self._protected(known)
        lines = list(self._lines(gone.commits).values())
        kept = policy.kept(lines, self._refs.targets("tags"), now)
        if policy.drops and not kept and commits:
            raise InvalidInputError(
                "these rules keep no commit at all", hint="add one, as --keep-last 10"
            )
        old = _old(policy, lines, protected.keys() | kept.keys()) - protected.keys()
        decisions = []
        for name, commit in known.items():
            why = tuple(dict.fromkeys((*protected.get(name, ()), *kept.get(name, ()))))
            stored = commit.parts.keys() - gone.parts.get(name, frozenset())
            if policy.drops and not why:
                decision = Decision(name, commit, "drop", ("no rule keeps it",))
            elif name in old and OPTIMIZER in stored:
                why = (*why, f"optimizer of the last {policy.optimizer_last}")
                decision = Decision(name, commit, "drop optimizer", why)
            else:
                decision = Decision(name, commit, "keep", why)
            decisions.append(decision)
        return decisions

    def _protected(self, commits: Mapping[ObjectId, Commit]) -> dict[ObjectId, list[str]]:
        """Return why commits stay whole whatever the rules say: refs, and what the settings keep
        of `commits`.
        """
        reasons: dict[ObjectId, list[str]] = {}
        head = self._revisions.head()
        if head is not None:
            reasons[head] = ["HEAD"]
        for ref, name in self._revisions.tips().items():
            space, _, label = ref.partition("/")
            titles = {"heads": f"branch {label}", "tags": f"tag {label}", "pins": "pin"}
            if space in titles:
                reasons.setdefault(name, []).append(titles[space])
        if self._best is not None:
            for name in self._best.pick(commits.items()):
                reasons.setdefault(name, []).append(f"best {self._best.metric}")
        return reasons

    def _with_bytes(
        self, row: Decision, marked: Marked, going: set[PackId], counted: set[ObjectId]
    ) -> Decision:
        """A decision with what comes of it on the disk: of bundles in packs that are `going`; each
        is `counted` once.
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
        """The bundles that came with the newest recipe of a table, as far as there is one."""
        recipes = self._catalog.recipes(values)
        return {
            bundle
            for _, recipe in recipes[:1]
            for bundle in recipe.bundles
            if self._catalog.store.contains(bundle)
        }

    # -- marking -------------------------------------------------------------------------------

    def _mark(
        self, commits: Mapping[ObjectId, Commit], gone: Dropped, fading: Iterable[Patch] = ()
    ) -> Marked:
        marked = mark(self._catalog, commits, gone, {patch.values for patch in fading})
        records = self._catalog.store.ids(Kind.RECORD)
        marked.objects |= {*records, *bases(self._catalog, records)}
        return marked

    def _packs(self) -> dict[PackId, str]:
        """Every pack that is there and that the index knows, with its folder."""
        sizes = self._catalog.store.pack_sizes()
        there = self._catalog.store.list_packs()
        return {pack: folder for pack, folder in there.items() if pack in sizes}

    def _unmarked(self, listed: Mapping[PackId, str], marked: Marked) -> dict[PackId, str]:
        """The packs in which nothing is marked, with their folders."""
        needed = self._packs_of(marked.objects)
        return {pack: folder for pack, folder in listed.items() if pack not in needed}

    def _packs_of(self, names: Iterable[ObjectId]) -> set[PackId]:
        return {place.pack for name in names for place in self._catalog.store.places(name)}

    def _debris(self) -> list[str]:
        backend = self._catalog.store.backend
        debris = [*backend.names("tmp"), *dead_leases(backend)]
        # Bases that are being written begin with a dot; while gc sweeps, nobody writes.
        return debris + [name for name in backend.names("cache/bases") if "/." in name]

    # -- sweeping ------------------------------------------------------------------------------

    def require_current(self, plan: GcPlan) -> set[ObjectId]:
        """What commits need that came since a plan was made; nobody writes meanwhile.

        Raises:
            OutdatedError: refs lead to what it drops or lets fade; records were undone.
            CorruptionError: something that is needed is missing.
        """
        seen, store = plan.picture, self._catalog.store
        assert seen is not None
        self._refs.settle_all()  # others may have been killed between publishing and syncing
        store.refresh()
        self._catalog.forget()
        for name in set(store.ids(Kind.RECORD)) - seen.records:
            record = load_drop_record(store.get(name, Kind.RECORD))
            if record.what != "fade":  # commits let patches fade, too
                raise OutdatedError("others dropped commits, or took that back")
        going = {name for record in plan.drops for name in record.commits}
        going |= {name for patch in plan.fading for name in patch.commits}
        tips = frozenset(self._revisions.tips().values())
        if going & (tips - seen.tips):
            raise OutdatedError("refs lead to what was to be dropped")
        new = dict(self._revisions.reachable(sorted(tips - seen.tips), seen.commits))
        return self._mark(new, self._catalog.dropped()).objects if new else set()

    def record(self, plan: GcPlan, time: str) -> GcPlan:
        """Say durably what is let go.  The plan, which knows of that."""
        known = self._catalog.patches()
        fading = [
            patch for patch in plan.fading if any(table == patch.values for table in known.values())
        ]
        self._catalog.record([*plan.drops, *self._fader.record(fading, time)])
        assert plan.picture is not None
        records = self._catalog.store.ids(Kind.RECORD)
        plan.picture.marked.objects.update(records, bases(self._catalog, records))
        return replace(plan, picture=replace(plan.picture, records=frozenset(records)))

    def delete(self, packs: Mapping[PackId, Going], needed: Set[ObjectId]) -> None:
        """Delete packs, unless they hold what is `needed` and nothing else has."""
        stay = set()
        for name in needed:
            for place in self._catalog.store.places(name):
                if place.pack in packs and name not in packs[place.pack].copied:
                    stay.add(place.pack)
        going = {pack: one.folder for pack, one in packs.items() if pack not in stay}
        self._catalog.store.delete_packs(going)
        self._catalog.forget()

    def delete_debris(self) -> None:
        """Delete what writers left that are gone; nobody writes meanwhile."""
        for name in self._debris():
            self._catalog.store.backend.delete(name)


def _old(policy: Policy, lines: Iterable[Sequence[Row]], stay: Set[ObjectId]) -> set[ObjectId]:
    """Return the commits that are too old for their optimizers to be kept: of the commits that
    `stay`, none of the newest of a line is.
    """
    rows, young = set[ObjectId](), set[ObjectId]()
    for line in lines:
        names = [row.name for row in line]
        rows.update(names)
        staying = [name for name in names if not policy.drops or name in stay]
        young.update(staying[: policy.optimizer_last])
    return rows - young


def _drops(
    rows: Iterable[Decision], policy: Policy, time: str, after: tuple[tuple[str, int], ...]
) -> list[DropRecord]:
    """The records of what is dropped."""
    whole = tuple(row.name for row in rows if row.action == "drop")
    parts = tuple(row.name for row in rows if row.action == "drop optimizer")
    found = [(whole, tuple[str, ...]()), (parts, (OPTIMIZER,))]
    return [
        DropRecord("drop", names, gone, policy.text, time, after=after)
        for names, gone in found
        if names
    ]


def _with(gone: Dropped, rows: Iterable[Decision]) -> Dropped:
    """What is gone when decisions are carried out."""
    commits, parts = set(gone.commits), dict(gone.parts)
    for row in rows:
        if row.action == "drop":
            commits.add(row.name)
        elif row.action == "drop optimizer":
            parts[row.name] = parts.get(row.name, frozenset()) | {OPTIMIZER}
    return Dropped(frozenset(commits), parts)
