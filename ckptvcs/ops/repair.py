"""Repair: what can be saved of a damaged repository is saved, and the rest is named.

salvage    what is sound in damaged packs, and commits that the index remembers, into new packs
refs       see `ckptvcs.ops.repair_refs`
fetch      what is missing, from another repository that has it
drop       only when told to: what cannot be saved is let go by record, and damaged packs deleted

Nothing is believed that is not proven by its id or by the hashes of its slices.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptvcs.decode.chain import ChainReader
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog, Dropped, read_sound
from ckptvcs.history.commit import ERRORS, Commit, dump_commit
from ckptvcs.history.format_file import FOLDERS, raise_flags, repair_format
from ckptvcs.history.reachability import mark
from ckptvcs.history.recipe import DropRecord, load_recipe
from ckptvcs.history.refs import HEAD, Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.ops.config import repair_settings
from ckptvcs.ops.repair_refs import Copy, RefMender, is_kin
from ckptvcs.ops.repository import CONFIG, Repository
from ckptvcs.ops.verify import packs_alone
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.index import Place
from ckptvcs.store.leases import exclusive
from ckptvcs.store.pack import Entry, find_entries, pack_name

_BLOCK = 1 << 24
_RULE = "verify --drop-damaged"
_ALONE = frozenset(("optimizer", ERRORS))  # what a commit can do without
_ROUNDS = 1000  # each finds what was hidden behind the one before: a line of lost commits

Record = tuple[Entry, bytes, bytes]
"""An object as it lies in a pack, proven: its entry, region and payload."""


@dataclass
class Repaired:
    """The result of a repair.

    Attributes:
        salvaged: The number of objects copied from damaged packs.
        remembered: The number of objects restored from the index.
        fetched: The number of objects copied from the other repository.
        refs: The repaired refs.
        told: The refs whose newest version was inferred, with their commit or branch.
        files: The other repaired files.
        dropped: The dropped commits with the dropped parts; empty parts mean the whole commit.
        packs: The number of deleted packs.
    """

    salvaged: int = 0
    remembered: int = 0
    fetched: int = 0
    refs: list[str] = field(default_factory=list)
    told: dict[str, str | None] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    dropped: dict[ObjectId, tuple[str, ...]] = field(default_factory=dict)
    packs: int = 0


class Repairer:
    """Repairs one repository, while nobody else writes."""

    def __init__(self, catalog: Catalog, memory: Catalog, refs: Refs) -> None:
        """`catalog` is that of `verify.packs_alone`; `memory` may know more, unproven."""
        self._catalog, self._memory, self._refs = catalog, memory, refs
        self._damaged: dict[PackId, str] = {}
        self.done = Repaired()

    def run(self, other: Copy | None, *, drop: bool) -> Repaired:
        """Repair, with what `other` has; then let go what cannot be saved, if told to.

        Raises:
            StorageError: it cannot be written.
        """
        self._find_damaged()
        self._remember(Kind.COMMIT, Kind.RECORD)
        self._salvage()
        self._remember(Kind.RECIPE)
        mender = RefMender(self._catalog, self._refs, other)
        mender.run(drop=drop)
        if other is not None:
            self._fetch(other.catalog)
        self._discard()
        if drop:
            self._graft()
            self._drop()
            self._delete(list(self._damaged))
        mender.rescue()
        self.done.refs, self.done.told = mender.done.refs, mender.done.told
        return self.done

    # -- objects -------------------------------------------------------------------------------

    def _copy(self, found: Iterable[Record], folder: str) -> int:
        """Put records into a new pack; how many."""
        count = 0
        with self._catalog.store.packing(folder) as pack:
            for entry, region, payload in found:
                if entry.id not in pack:
                    pack.copy(entry, region, payload)
                    count += 1
        self._catalog.forget()
        return count

    def _find_damaged(self) -> None:
        store = self._catalog.store
        for name, folder in store.list_packs().items():
            with contextlib.suppress(FileNotFoundError):
                try:
                    store.verify_pack(name, folder)
                except CorruptionError:
                    self._damaged[name] = folder

    def _entries(self, pack: PackId, folder: str) -> tuple[Entry, ...]:
        with contextlib.suppress(CkptError, FileNotFoundError):  # something else is in its place
            return find_entries(self._catalog.store.backend, pack_name(folder, pack))
        return ()

    def _salvage(self) -> None:
        """Copy what is sound in damaged packs and lies nowhere else.  An exact patch is no good in
        pieces, and cannot be proven but as a whole, by what it decodes to.
        """
        for pack, folder in self._damaged.items():
            entries, patches = self._entries(pack, folder), self._catalog.patches()
            exact = [patches[entry.id] for entry in entries if entry.id in patches]
            if not exact:
                rows = self._sound(pack, folder, entries)
                self.done.salvaged += self._copy(rows, folder)
            elif all(map(self._decodes, exact)):
                places = [Place(pack, folder, entry) for entry in entries]
                rows = (
                    (p.entry, *self._catalog.store.read_record(p))
                    for p in places
                    if not self._elsewhere(p.entry.id)
                )
                self.done.salvaged += self._copy(rows, folder)

    def _decodes(self, exact: ObjectId) -> bool:
        """Whether exact values of a commit come out as their hashes say."""
        chain = ChainReader(self._catalog)
        for name in self._catalog.commits_of_exact(exact):
            with contextlib.suppress(CkptError):
                commit = self._catalog.commit(name)
                schema = self._catalog.schema(commit.schema)
                (part,) = (part for part, state in commit.parts.items() if state.exact == exact)
                for position, number in enumerate(schema.stored(part)):
                    deque(chain.slices(exact, position, schema.tensors[number]), 0)
                return True
        return False

    def _sound(self, pack: PackId, folder: str, entries: Iterable[Entry]) -> Iterator[Record]:
        store = self._catalog.store
        for entry in entries:
            if not self._elsewhere(entry.id):
                with contextlib.suppress(CkptError):
                    place = Place(pack, folder, entry)
                    yield entry, *read_sound(store, place)

    def _elsewhere(self, name: ObjectId) -> bool:
        """Whether an object lies in a pack that is whole."""
        return any(p.pack not in self._damaged for p in self._catalog.store.index.known(name))

    def _remember(self, *kinds: Kind) -> None:
        """Write commits, records and recipes again that only the index remembers; recipes of what
        is there.
        """
        store, kept = self._catalog.store, self._memory.store.index
        with store.packing("meta") as pack:
            for kind in kinds:
                for name in kept.ids(kind):
                    content = kept.content(name, kind)
                    if content is None or self._has(name, kind):
                        continue
                    if kind != Kind.RECIPE or all(
                        map(self._elsewhere, load_recipe(content).bundles)
                    ):
                        pack.add(kind, content)
                        self.done.remembered += 1
        self._catalog.forget()

    def _has(self, name: ObjectId, kind: Kind) -> bool:
        if not self._catalog.store.contains(name):
            return False
        try:
            self._catalog.store.get(name, kind)
        except CorruptionError:
            return False
        return True

    # -- from elsewhere ------------------------------------------------------------------------

    def _fetch(self, other: Catalog) -> None:
        """Copy packs that are damaged here, and those that hold what is lost, until nothing more
        turns up: what a commit needs is known when it is there.
        """
        tried = other.store.list_packs().keys() & self._damaged.keys()
        for pack in tried:  # nothing leads to a record: of what was let go only a whole pack tells
            self._fetch_pack(other, pack, self._damaged[pack])
        for _ in range(_ROUNDS):
            wanted: dict[PackId, str] = {}
            for name in self._lost():
                names = {name} | {
                    one
                    for recipe, content in other.recipes(name)
                    for one in (recipe, *content.bundles)
                }
                for one in names:
                    places = [p for p in other.store.index.known(one) if p.pack not in tried]
                    if places and not self._elsewhere(one):
                        wanted[places[0].pack] = places[0].folder
            if not wanted:
                return
            for pack, folder in wanted.items():
                tried.add(pack)
                self._fetch_pack(other, pack, folder)

    def _fetch_pack(self, other: Catalog, pack: PackId, folder: str) -> None:
        """Copy a pack as it is; of one that is damaged, too, what is sound in it."""
        store, file = self._catalog.store, pack_name(folder, pack)
        try:
            other.store.verify_pack(pack, folder)
        except (CkptError, FileNotFoundError):
            with contextlib.suppress(CkptError, FileNotFoundError):
                rows = [
                    (p.entry, *read_sound(other.store, p))
                    for p in (
                        Place(pack, folder, entry) for entry in other.store.entries(pack, folder)
                    )
                ]
                self.done.fetched += self._copy(rows, folder)
            return
        if self._damaged.pop(pack, None):
            self._delete([pack], folder)
        store.backend.delete(file)  # what is no pack may have its name
        writer = store.backend.writer()
        try:
            for at in range(0, other.store.backend.size(file), _BLOCK):
                writer.write(other.store.backend.read(file, at, _BLOCK))
            writer.publish(file)
        finally:
            writer.abort()
        store.refresh()
        self._catalog.forget()
        self.done.fetched += len(store.entries(pack, folder))

    def _lost(self) -> set[ObjectId]:
        """What commits need and cannot be read, or has no pack that is whole."""
        needed, lost = self._needed()
        return lost | {name for name in needed if not self._elsewhere(name)}

    def _needed(self) -> tuple[set[ObjectId], set[ObjectId]]:
        """What commits need, and those of it that are not there."""
        lost: set[ObjectId] = set()
        commits: dict[ObjectId, Commit] = {}
        for tip in self._tips():
            above, hole = self._above(tip)
            commits |= above
            lost |= {hole} if hole else set()
        gone = self._catalog.dropped()
        for name in commits.keys() - gone.commits:
            lost |= {table for _, table in self._catalog.lost_patches(name, commits[name])}
        return mark(self._catalog, commits, gone, lost=lost).objects | lost, lost

    def _tips(self) -> Iterator[ObjectId]:
        """Where the refs lead that can be read."""
        for ref in self._refs.every():
            with contextlib.suppress(CkptError):
                move = self._refs.read(ref)
                if move is not None and move.commit is not None:
                    yield move.commit

    # -- what cannot be saved ------------------------------------------------------------------

    def _graft(self) -> None:
        """Where a commit itself is lost, put those above it on the one that its branch was at
        before.  They are new commits then, of the same content.
        """
        moved: dict[ObjectId, ObjectId] = {}
        for ref, tip in Revisions(self._catalog, self._refs).tips().items():
            above, hole = self._above(tip)
            if hole is None or (ref == HEAD and self._refs.read(HEAD).branch):  # type: ignore[union-attr]
                continue
            self.done.dropped[hole] = ()
            parent = self._before(hole)
            with self._catalog.store.packing("meta") as pack:
                for name, commit in reversed(above.items()):
                    if name not in moved:
                        parents = (parent,) if parent else ()
                        content = dump_commit(replace(commit, parents=parents))
                        moved[name] = pack.add(Kind.COMMIT, content)
                    parent = moved[name]
            self._catalog.forget()
            old = self._refs.read(ref)
            if ref.startswith("pins/"):
                self._refs.publish(ref, old, commit=None, time=now(), action="repair")
                ref, old = f"pins/{parent}", None
            self._refs.publish(ref, old, commit=parent, time=now(), action="repair")
        records = {record for name in moved for record in self._catalog.drop_records(name)}
        self._catalog.record(
            [
                replace(record, commits=tuple(moved.get(name, name) for name in record.commits))
                for record in sorted(records, key=repr)
            ]
        )

    def _above(self, tip: ObjectId) -> tuple[dict[ObjectId, Commit], ObjectId | None]:
        """The commits from a tip down to one that is lost, and that one."""
        above: dict[ObjectId, Commit] = {}
        below: ObjectId | None = tip
        try:
            for name, commit in self._catalog.ancestors(tip):
                above[name], below = commit, next(iter(commit.parents), None)
        except CorruptionError:
            return above, below
        return above, None

    def _before(self, hole: ObjectId) -> ObjectId | None:
        """The newest commit that a branch was at before one that is lost, if it leads somewhere."""
        for branch in self._refs.names("heads"):
            commits = [move.commit for move in self._refs.readable(f"heads/{branch}")]
            if hole in commits:
                older = [one for one in commits[commits.index(hole) + 1 :] if one is not None]
                return next((one for one in older if self._above(one)[1] is None), None)
        return None

    def _drop(self) -> None:
        """Let go the commits, or the parts of them, or their patches, that cannot be restored."""
        drops: dict[tuple[str, ...], list[ObjectId]] = {}
        fades: dict[tuple[str, ...], list[ObjectId]] = {}
        for name, commit in Revisions(self._catalog, self._refs).visible().items():
            lost = self._lost_parts(name, commit)
            if lost:
                self.done.dropped[name] = lost if _ALONE.issuperset(lost) else ()
                drops.setdefault(self.done.dropped[name], []).append(name)
            faded = {part for part, _ in self._catalog.lost_patches(name, commit)}
            faded |= {
                part
                for part, state in commit.parts.items()
                if state.exact and not self._sound_table(state.exact)
            }
            faded -= self._catalog.recorded_parts(name)
            if faded:
                fades.setdefault(tuple(sorted(faded)), []).append(name)
        self._catalog.record(
            [
                DropRecord(what, tuple(sorted(names)), parts, _RULE, now())
                for what, rows in (("drop", drops), ("fade", fades))
                for parts, names in rows.items()
            ]
        )

    def _lost_parts(self, name: ObjectId, commit: Commit) -> tuple[str, ...]:
        """What cannot be restored of a commit: parts, or the errors of its tensors."""
        dropped = self._catalog.dropped().parts.get(name, frozenset())
        parts, lost = {ERRORS, *commit.parts}, []
        for part in sorted(parts - dropped):
            others = Dropped(frozenset(), {name: frozenset(parts - {part})})
            faded = {state.exact for state in commit.parts.values() if state.exact}
            missing: set[ObjectId] = set()
            marked = mark(self._catalog, {name: commit}, others, faded, missing)
            if missing or not all(map(self._elsewhere, marked.objects)):
                lost.append(part)
        return tuple(lost)

    def _sound_table(self, table: ObjectId) -> bool:
        """Whether there is nothing to be said against a patch: its pack is whole, or gone."""
        return all(
            map(
                self._elsewhere,
                [
                    one
                    for name, recipe in self._catalog.recipes(table)
                    for one in (name, *recipe.bundles)
                ],
            )
        )

    def _discard(self) -> None:
        """Delete damaged packs of which nothing is needed that does not lie elsewhere."""
        try:
            Revisions(self._catalog, self._refs).tips()
        except CkptError:
            return  # nobody can say what is needed
        needed, _ = self._needed()
        for pack, folder in list(self._damaged.items()):
            left = [entry.id for entry in self._entries(pack, folder)]
            left += [
                name
                for name in needed
                if pack in {place.pack for place in self._catalog.store.index.known(name)}
            ]
            if left and all(name not in needed or self._elsewhere(name) for name in left):
                self._delete([pack], folder)

    def _delete(self, packs: list[PackId], folder: str | None = None) -> None:
        for pack in packs:
            where = self._damaged.pop(pack, folder)
            if where is not None:
                self._catalog.store.delete_packs({pack: where})
                self.done.packs += 1
        self._catalog.forget()


def repair(folder: Path, source: Path | None, *, drop: bool) -> Repaired:
    """Save what can be saved of the repository in `folder`, with what the one in `source` has;
    `drop` what cannot.  First the files that it is opened by are repaired.

    Raises:
        BusyError: somebody is at work.
        CorruptionError, UnsupportedVersionError: it cannot be opened even so.
        StorageError: it cannot be written.
    """
    backend = Repository.backend_at(folder)
    files = _repair_files(folder, backend, source, drop=drop)
    repository = Repository(folder, backend)
    copy = None
    if source is not None:
        other = Repository(source)
        copy = Copy(other.catalog, other.refs if is_kin(backend, other.backend) else None)
    with exclusive(repository.backend), packs_alone(repository.catalog) as catalog:
        if drop:
            raise_flags(backend, "gc", "drops")
        done = Repairer(catalog, repository.catalog, repository.refs).run(copy, drop=drop)
        shutil.rmtree(repository.bases, ignore_errors=True)
        repository.catalog.store.rebuild()
    done.files = files
    return done


def _repair_files(folder: Path, backend: Backend, source: Path | None, *, drop: bool) -> list[str]:
    """Repair the files that a repository is opened by; with `drop` without settings that cannot be
    read.  Returns the names of the repaired files.
    """
    copy = None if source is None else Repository.backend_at(source)
    if copy is not None and not is_kin(backend, copy):
        source = copy = None
    lost = backend.make_folders(FOLDERS)
    with exclusive(backend):
        mended = {
            "format": repair_format(backend, copy),
            CONFIG: repair_settings(
                folder / CONFIG, backend, source and source / CONFIG, drop=drop
            ),
        }
    return lost + [name for name, done in mended.items() if done]
