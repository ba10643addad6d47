"""Repair a damaged repository, and name everything that is lost.

salvage    copy undamaged objects of damaged packs, and commits of the index, into new packs
refs       see `ckptvcs.ops.repair_refs`
fetch      copy missing objects from another repository
drop       only if asked to: drop lost commits by retention records, and delete damaged packs

Nothing is used that its id or the hashes of its slices do not prove.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptvcs.decode.chain import ChainReader
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog, Dropped, read_sound
from ckptvcs.history.commit import ERRORS, Commit, dump_commit
from ckptvcs.history.format_file import FOLDERS, raise_flags, repair_format
from ckptvcs.history.note import dump_note
from ckptvcs.history.provenance import PROVENANCE
from ckptvcs.history.reachability import mark
from ckptvcs.history.recipe import load_recipe
from ckptvcs.history.records import DropRecord
from ckptvcs.history.refs import HEAD, Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.ops.config import repair_settings
from ckptvcs.ops.repair_refs import Copy, RefRepairer, share_history
from ckptvcs.ops.repository import CONFIG, Repository
from ckptvcs.ops.verify import packs_alone
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.rows import Place
from ckptvcs.store.leases import exclusive
from ckptvcs.store.pack import Entry, find_entries, pack_name

_BLOCK = 1 << 24
_RULE = "verify --drop-damaged"
_ALONE = frozenset(("optimizer", ERRORS, PROVENANCE))  # parts that a commit can lose
_ROUNDS = 1000  # each may fetch one more commit of a history of lost commits

Record = tuple[Entry, bytes, bytes]
"""A verified object of a pack: its entry, region and payload."""


@dataclass
class Repaired:
    """The result of a repair.

    Attributes:
        salvaged: The number of objects copied from damaged packs.
        from_cache: The number of objects restored from the index.
        from_copy: The number of objects copied from the other repository.
        refs: The repaired refs.
        inferred: The refs whose newest version was inferred, with their commit or branch.
        files: The other repaired files.
        dropped: The dropped commits with the dropped parts; empty parts mean the whole commit.
        packs: The number of deleted packs.
    """

    salvaged: int = 0
    from_cache: int = 0
    from_copy: int = 0
    refs: list[str] = field(default_factory=list)
    inferred: dict[str, str | None] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    dropped: dict[ObjectId, tuple[str, ...]] = field(default_factory=dict)
    packs: int = 0


class Repairer:
    """Repairs one repository; no other process may write meanwhile."""

    def __init__(self, catalog: Catalog, memory: Catalog, refs: Refs) -> None:
        """`catalog` is that of `verify.packs_alone`; `memory` may hold more, unverified."""
        self._catalog, self._memory, self._refs = catalog, memory, refs
        self._damaged: dict[PackId, str] = {}
        self.done = Repaired()

    def run(self, other: Copy | None, *, drop: bool) -> Repaired:
        """Repair with the objects of `other`; with `drop`, then drop everything that is lost."""
        self._find_damaged()
        self._remember(Kind.COMMIT, Kind.RECORD, Kind.NOTE)
        self._salvage()
        self._remember(Kind.RECIPE)
        ref_repairer = RefRepairer(self._catalog, self._refs, other)
        ref_repairer.run(drop=drop)
        if other is not None:
            self._fetch(other.catalog)
        self._discard()
        if drop:
            self._graft()
            self._drop()
            self._delete(list(self._damaged))
        ref_repairer.rescue()
        self.done.refs, self.done.inferred = ref_repairer.refs, ref_repairer.inferred
        return self.done

    # -- objects -------------------------------------------------------------------------------

    def _copy(self, records: Iterable[Record], folder: str) -> int:
        """Copy records into a new pack, and return their number."""
        count = 0
        with self._catalog.store.packing(folder) as pack:
            for entry, region, payload in records:
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
        for note in store.ids(Kind.NOTE):
            for place in store.index.known(note):
                try:
                    read_sound(store, place)
                except (CorruptionError, FileNotFoundError):
                    self._damaged[place.pack] = place.folder

    def _entries(self, pack: PackId, folder: str) -> tuple[Entry, ...]:
        with contextlib.suppress(CkptError, FileNotFoundError):  # it may be a folder or a link
            return find_entries(self._catalog.store.backend, pack_name(folder, pack))
        return ()

    def _salvage(self) -> None:
        """Copy the undamaged objects of damaged packs, unless they exist elsewhere.

        An exact patch is useless in pieces, and only the values that it decodes to prove it.  A
        pack with exact patches is therefore copied as a whole or not at all.
        """
        for pack, folder in self._damaged.items():
            entries, patches = self._entries(pack, folder), self._catalog.patches()
            exact = [patches[entry.id] for entry in entries if entry.id in patches]
            if not exact:
                rows = self._sound(pack, folder, entries)
                self.done.salvaged += self._copy(rows, folder)
            elif all(map(self._decodes, exact)):
                rows = (
                    (entry, *self._catalog.store.read_record(Place(pack, folder, entry)))
                    for entry in entries
                    if not self._elsewhere(entry.id)
                )
                self.done.salvaged += self._copy(rows, folder)

    def _decodes(self, exact: ObjectId) -> bool:
        """Return whether exact values decode to their hashes."""
        chain = ChainReader(self._catalog)
        for name in self._catalog.commits_of_exact(exact):
            with contextlib.suppress(CkptError):
                commit = self._catalog.commit(name)
                schema = self._catalog.schema(commit.schema)
                (part,) = commit.parts_of_exact(exact)
                for position, number in enumerate(schema.stored(part)):
                    deque(chain.slices(exact, position, schema.tensors[number]), 0)
                return True
        return False

    def _sound(self, pack: PackId, folder: str, entries: Iterable[Entry]) -> Iterator[Record]:
        store = self._catalog.store
        for entry in entries:
            if not self._elsewhere(entry.id):
                with contextlib.suppress(CkptError):
                    yield entry, *read_sound(store, Place(pack, folder, entry))

    def _elsewhere(self, name: ObjectId) -> bool:
        """Return whether an undamaged pack contains an object."""
        return any(p.pack not in self._damaged for p in self._catalog.store.index.known(name))

    def _remember(self, *kinds: Kind) -> None:
        """Write objects of these kinds again that only the index has; recipes if complete."""
        store, index = self._catalog.store, self._memory.store.index
        with store.packing("meta") as pack:
            for kind in kinds:
                for name in index.ids(kind):
                    content = index.content(name, kind)
                    if content is None or self._has(name, kind):
                        continue
                    bundles = load_recipe(content).bundles if kind == Kind.RECIPE else ()
                    if all(map(self._elsewhere, bundles)):
                        pack.add(kind, content)
                        self.done.from_cache += 1
        self._catalog.forget()

    def _has(self, name: ObjectId, kind: Kind) -> bool:
        with contextlib.suppress(CorruptionError):
            self._catalog.store.get(name, kind)
            return True
        return False

    # -- fetch ---------------------------------------------------------------------------------

    def _fetch(self, other: Catalog) -> None:
        """Copy from `other` the packs that are damaged here, and those with lost objects.

        A fetched commit may need more objects, so this repeats until nothing is left to fetch.
        """
        tried = other.store.list_packs().keys() & self._damaged.keys()
        for pack in tried:  # nothing refers to retention records: only a whole pack restores them
            self._fetch_pack(other, pack, self._damaged[pack])
        for _ in range(_ROUNDS):
            wanted: dict[PackId, str] = {}
            for name in self._lost():
                for needed in (name, *_with_bundles(other, name)):
                    places = [p for p in other.store.index.known(needed) if p.pack not in tried]
                    if places and not self._elsewhere(needed):
                        wanted[places[0].pack] = places[0].folder
            if not wanted:
                return
            for pack, folder in wanted.items():
                tried.add(pack)
                self._fetch_pack(other, pack, folder)

    def _fetch_pack(self, other: Catalog, pack: PackId, folder: str) -> None:
        """Copy a pack, or its undamaged objects if it is damaged in `other`, too."""
        store, file = self._catalog.store, pack_name(folder, pack)
        try:
            other.store.verify_pack(pack, folder)
        except (CkptError, FileNotFoundError):
            with contextlib.suppress(CkptError, FileNotFoundError):
                rows = [
                    (entry, *read_sound(other.store, Place(pack, folder, entry)))
                    for entry in other.store.entries(pack, folder)
                ]
                self.done.from_copy += self._copy(rows, folder)
            return
        if self._damaged.pop(pack, None):
            self._delete([pack], folder)
        store.backend.delete(file)  # its name may belong to a folder or a link
        writer = store.backend.writer()
        try:
            for at in range(0, other.store.backend.size(file), _BLOCK):
                writer.write(other.store.backend.read(file, at, _BLOCK))
            writer.publish(file)
        finally:
            writer.abort()
        self._catalog.reload()
        self.done.from_copy += len(store.entries(pack, folder))

    def _lost(self) -> set[ObjectId]:
        """Return the objects that commits need and no undamaged pack contains."""
        needed, lost = self._needed()
        return lost | {name for name in needed if not self._elsewhere(name)}

    def _needed(self) -> tuple[set[ObjectId], set[ObjectId]]:
        """Return the objects that commits need, and the missing ones among them."""
        lost: set[ObjectId] = set()
        commits: dict[ObjectId, Commit] = {}
        for tip in self._refs.readable_targets(self._refs.every()):
            above, hole, _ = self._catalog.above_lost(tip)
            commits |= above
            lost |= {hole} if hole else set()
        dropped = self._catalog.dropped()
        for name in commits.keys() - dropped.commits:
            lost |= {table for _, table in self._catalog.lost_patches(name, commits[name])}
        return mark(self._catalog, commits, dropped, lost=lost).objects | lost, lost

    # -- drop ----------------------------------------------------------------------------------

    def _graft(self) -> None:
        """Replace the descendants of a lost commit by copies with another parent.

        The new parent is the commit that the branch was at before.  The copies are new commits
        with the same content.
        """
        moved: dict[ObjectId, ObjectId] = {}
        for ref, tip in Revisions(self._catalog, self._refs).tips().items():
            above, hole, _ = self._catalog.above_lost(tip)
            if hole is None or (ref == HEAD and self._refs.current_branch()):
                continue
            self.done.dropped[hole] = ()
            parent = self._before(hole)
            with self._catalog.store.packing("meta") as pack:
                for name in reversed(above):
                    if name not in moved:
                        parents = (parent,) if parent else ()
                        commit = self._catalog.original(name)
                        content = dump_commit(replace(commit, parents=parents))
                        moved[name] = pack.add(Kind.COMMIT, content)
                        for _, note in self._catalog.notes(name):
                            pack.add(Kind.NOTE, dump_note(replace(note, commit=moved[name])))
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
        self._archive_again(moved)

    def _archive_again(self, moved: Mapping[ObjectId, ObjectId]) -> None:
        """Record the archived forms of commits for their copies."""
        for record in self._catalog.archives().values():
            rows = [
                replace(
                    row,
                    commit=moved[row.commit],
                    between=tuple(moved.get(n, n) for n in row.between),
                )
                for row in record.archived
                if row.commit in moved
            ]
            if rows:
                names = tuple(row.commit for row in rows)
                again = replace(record, commits=names, archived=tuple(rows))
                self._catalog.record([again])

    def _before(self, hole: ObjectId) -> ObjectId | None:
        """Return the newest readable commit that a branch was at before a lost one."""
        for branch in self._refs.names("heads"):
            commits = [move.commit for move in self._refs.readable(f"heads/{branch}")]
            if hole in commits:
                older = filter(None, commits[commits.index(hole) + 1 :])
                return next(
                    (name for name in older if self._catalog.above_lost(name)[1] is None), None
                )
        return None

    def _drop(self) -> None:
        """Drop the commits, parts and exact patches that cannot be restored."""
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
        """Return the parts of a commit (or its recorded errors) that cannot be restored."""
        dropped = self._catalog.dropped().parts.get(name, frozenset())
        parts, lost = {ERRORS, PROVENANCE, *commit.parts}, []
        for part in sorted(parts - dropped):
            others = Dropped(frozenset(), {name: frozenset(parts - {part})})
            faded = {state.exact for state in commit.parts.values() if state.exact}
            missing: set[ObjectId] = set()
            marked = mark(self._catalog, {name: commit}, others, faded, missing)
            if missing or not all(map(self._elsewhere, marked.objects)):
                lost.append(part)
        return tuple(lost)

    def _sound_table(self, table: ObjectId) -> bool:
        """Return whether no damaged pack holds a recipe or a bundle of an exact patch."""
        return all(map(self._elsewhere, _with_bundles(self._catalog, table)))

    def _discard(self) -> None:
        """Delete the damaged packs whose needed objects all exist elsewhere."""
        try:
            Revisions(self._catalog, self._refs).tips()
        except CkptError:
            return  # the needed objects are unknown
        needed, _ = self._needed()
        for pack, folder in list(self._damaged.items()):
            names = [entry.id for entry in self._entries(pack, folder)]
            names += [
                name
                for name in needed
                if pack in {place.pack for place in self._catalog.store.index.known(name)}
            ]
            if names and all(name not in needed or self._elsewhere(name) for name in names):
                self._delete([pack], folder)

    def _delete(self, packs: list[PackId], folder: str | None = None) -> None:
        for pack in packs:
            where = self._damaged.pop(pack, folder)
            if where is not None:
                self._catalog.store.delete_packs({pack: where})
                self.done.packs += 1
        self._catalog.forget()


def _with_bundles(catalog: Catalog, table: ObjectId) -> Iterator[ObjectId]:
    """Yield the recipes of a hash table and the bundles that they need."""
    for name, recipe in catalog.recipes(table):
        yield from (name, *recipe.bundles)


def repair(folder: Path, source: Path | None, *, drop: bool) -> Repaired:
    """Repair the repository in `folder`, with the one in `source` if given.

    With `drop`, drop everything that is lost.  The files that opening needs are repaired first.
    """
    backend = Repository.backend_at(folder)
    files = _repair_files(folder, backend, source, drop=drop)
    repository = Repository(folder, backend)
    copy = None
    if source is not None:
        other = Repository(source)
        copy = Copy(other.catalog, other.refs if share_history(backend, other.backend) else None)
    with exclusive(repository.backend), packs_alone(repository.catalog) as catalog:
        if drop:
            raise_flags(backend, "gc", "drops")
        done = Repairer(catalog, repository.catalog, repository.refs).run(copy, drop=drop)
        shutil.rmtree(repository.bases, ignore_errors=True)
        repository.catalog.store.rebuild()
    done.files = files
    return done


def _repair_files(folder: Path, backend: Backend, source: Path | None, *, drop: bool) -> list[str]:
    """Repair the files that opening needs, and return the names of the repaired files.

    With `drop`, unreadable settings are dropped.
    """
    copy = None if source is None else Repository.backend_at(source)
    if copy is not None and not share_history(backend, copy):
        source = copy = None
    lost = backend.make_folders(FOLDERS)
    with exclusive(backend):
        repaired = {
            "format": repair_format(backend, copy),
            CONFIG: repair_settings(
                folder / CONFIG, backend, source and source / CONFIG, drop=drop
            ),
        }
    return lost + [name for name, done in repaired.items() if done]
