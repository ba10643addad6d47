"""Verify that every commit can be restored.

packs     hash every byte of each pack; of a damaged pack, name the damaged objects
commits   check that every object that a commit needs exists and matches its id
tensors   decode each distinct tensor hash table once, along a branch from commit to commit
files     check that each file template fits its schema, and each exact file its hash
notes     check that each note can be read
cache     delete wrong cached bases, which are no damage; compare the index with the packs

Pack contents are read directly, without the index of the repository.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ckptvcs.decode.base_cache import CachedTable, RecentTables, Room
from ckptvcs.decode.chain import ChainReader
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import CkptError, CorruptionError, MissingObjectError
from ckptvcs.files.names import safe_path
from ckptvcs.history.catalog import Catalog, Dropped, keys_of, read_sound
from ckptvcs.history.commit import Commit
from ckptvcs.history.format_file import FOLDERS, check_seal
from ckptvcs.history.note import load_note
from ckptvcs.history.reachability import mark
from ckptvcs.history.revision import Revisions
from ckptvcs.history.schema import TensorInfo
from ckptvcs.ops.config import load_config
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.verify_subset import Budget, Checked
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store import pack as packs
from ckptvcs.store.disk import scratch_folder
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.rows import Place
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import find_entries

_TRIES = 3

T = TypeVar("T")


@dataclass
class Damage:
    """One damaged thing.

    Attributes:
        what: Its kind, such as `pack`, `commit`, `tensor`, `ref` or `file`.
        message: What is wrong with it.
        commit: The commit that contains it, if known.
        name: The name of the file, ref, pack or tensor.
        objects: The ids of objects that cannot be read.
        commits: The commits that cannot be restored because of it.
        tensors: The tensors that cannot be restored because of it.
    """

    what: str
    message: str
    commit: ObjectId | None = None
    name: str | None = None
    objects: tuple[ObjectId, ...] = ()
    commits: tuple[ObjectId, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass
class VerifyReport:
    """The result of `Repo.verify`.

    Attributes:
        packs: The number of checked packs.
        commits: The number of checked commits.
        tensors: The number of decoded tensors.
        files: The number of checked files.
        bytes: The size of the checked packs, in bytes.
        unchecked: The number of packs and commits that `subset` left out.
        unreachable: Unreachable commits; they are not damage.
        discarded: Wrong cache files that were deleted; they are not damage.
        damage: Everything that is damaged.
    """

    packs: int = 0
    commits: int = 0
    tensors: int = 0
    files: int = 0
    bytes: int = 0
    unchecked: int = 0
    unreachable: list[ObjectId] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)


@contextlib.contextmanager
def packs_alone(catalog: Catalog) -> Iterator[Catalog]:
    """Yield a catalog of the same objects, with an index that is built from the packs."""
    with scratch_folder("ckpt-verify-") as folder:
        store = ObjectStore(catalog.store.backend, folder / "index", keys_of)
        try:
            store.refresh()
            yield Catalog(store)
        finally:
            store.index.close()


class CommitVerifier:
    """Verifies commits, and collects the damage."""

    def __init__(self, catalog: Catalog, progress: Progress) -> None:
        """`catalog` has packs that nobody changes meanwhile, or is that of `packs_alone`."""
        self._catalog, self._progress = catalog, progress
        self._proven: set[tuple[ObjectId, tuple[str, ...]]] = set()  # hash table, element types
        self._harmed: dict[
            tuple[ObjectId, str | None], set[str]
        ] = {}  # by commit and part: damaged tensors
        self.report = VerifyReport()

    def _wrong(
        self, what: str, error: CkptError, commit: ObjectId | None = None, name: str | None = None
    ) -> Damage:
        damage = Damage(what, error.message, commit, name)
        if damage not in self.report.damage:
            self.report.damage.append(damage)
        if commit is not None and what != "tensor":
            self._harmed.setdefault((commit, None), set())
        return damage

    def check(self, commits: Mapping[ObjectId, Commit]) -> VerifyReport:
        """Check these commits, ancestors first."""
        with scratch_folder("ckpt-verify-") as folder:
            self._recent = RecentTables(folder)
            self._chain = ChainReader(self._catalog, self._recent.get)
            for name, commit in commits.items():
                self._commit(name, commit)
        return self.report

    def _commit(self, name: ObjectId, commit: Commit) -> None:
        if name in self._catalog.dropped().commits:
            return  # dropped meanwhile
        self.report.commits += 1
        try:
            restorer = Restorer(self._catalog, name, decoded=self._recent.get)
            self._catalog.errors(name)
            self._catalog.provenance(name)
        except CkptError as error:
            self._wrong("commit", error, commit=name)
            return
        damaged = len(self.report.damage)
        dropped = self._catalog.dropped().parts.get(name, frozenset())
        for part, state in commit.parts.items():
            if part in dropped:
                continue
            infos = [restorer.schema.tensors[n] for n in restorer.schema.stored(part)]
            self._table(name, state.values, infos, self._room(state.values, infos))
            if state.exact is not None and self._catalog.has_recipe(state.exact):
                self._table(name, state.exact, infos, contextlib.nullcontext())
        self._patches(name, commit)
        if dropped.intersection(commit.parts) or len(self.report.damage) > damaged:
            return  # its files contain these tensors
        for file in commit.files:
            try:
                safe_path(file.path)
                if file.skeleton is not None:
                    restorer.digest(file)
                self.report.files += 1
            except CkptError as error:
                self._wrong("file", error, commit=name, name=file.path)

    def _patches(self, name: ObjectId, commit: Commit) -> None:
        """Report exact patches that are missing without a retention record."""
        for part, _ in self._catalog.lost_patches(name, commit):
            error = MissingObjectError(f"the exact patch of the {part} part is missing")
            self._wrong("patch", error, commit=name)

    def _table(self, name: ObjectId, table: ObjectId, infos: list[TensorInfo], room: Room) -> None:
        # The same bytes in tensors of other types are not verified by this.
        key = table, tuple(info.dtype for info in infos)
        if key in self._proven:
            return
        damaged = len(self.report.damage)
        with room as put:
            for position, info in enumerate(infos):
                try:
                    for number, words in self._chain.slices(table, position, info):
                        self._progress(words.nbytes)
                        if put is not None:
                            put(position, number, words)
                    self.report.tensors += 1
                except CkptError as error:
                    self._wrong("tensor", error, commit=name, name=info.name)
                    self._harmed.setdefault((name, info.part), set()).add(info.name)
        if len(self.report.damage) == damaged:
            self._proven.add(key)

    def _room(self, table: ObjectId, infos: list[TensorInfo]) -> Room:
        """Return room for tensors that deltas of later commits may be based on."""
        with contextlib.suppress(CkptError):  # `_table` reports each tensor
            hashes = self._catalog.all_values(table, len(infos))
            depths = (self._chain.depth(table, position) for position in range(len(infos)))
            if infos and (infos[0].part == "model" or any(depths)):
                return self._recent.room(table, infos, hashes)
        return contextlib.nullcontext()


class Verifier(CommitVerifier):
    """Verifies one repository, or as much as a budget allows; the longest unchecked first."""

    def __init__(
        self, repository: Repository, catalog: Catalog, progress: Progress, budget: Budget | None
    ) -> None:
        """`catalog` is the catalog of `packs_alone`."""
        super().__init__(catalog, progress)
        self._refs, self._cache = repository.refs, repository.cache
        self._store, self._budget = repository.catalog.store, budget

    def run(self) -> VerifyReport:
        """Check everything; damage is collected, not raised."""
        with scratch_folder("ckpt-verify-") as folder:
            self._recent = RecentTables(folder)
            self._chain = ChainReader(self._catalog, self._recent.get)
            sizes = dict(self._files())
            self._single_files()
            commits = self._twice(self._reachable)
            oldest_first = reversed(commits.items())
            sizes |= {name: commit.raw_bytes for name, commit in oldest_first}
            checked = Checked(self._cache / "verified.json")
            names = iter(sizes) if self._budget is None else self._budget.choose(checked, sizes)
            done = []
            for name in names:
                if name in commits:
                    self._twice(partial(self._commit, ObjectId(name), commits[ObjectId(name)]))
                else:
                    self._pack(name)
                done.append(name)
            self._twice(self._notes)
            self._attribute()
            self._bases()
            if not self.report.damage:
                self._index(self._store)
            self.report.unchecked = len(sizes) - len(done)
            checked.note(done)
        return self.report

    def _twice(self, look: Callable[[], T]) -> T:
        """Check again after damage: gc or a rule may have deleted objects meanwhile."""
        before = replace(self.report, damage=self.report.damage.copy()), self._harmed.copy()
        result = look()
        if len(self.report.damage) > len(before[0].damage):
            self.report, self._harmed = before
            self._catalog.reload()
            self._recent.clear()
            result = look()
        return result

    def _single_files(self) -> None:
        folder = self._cache.parent
        for name in FOLDERS:
            if os.path.lexists(folder / name) and not (folder / name).is_dir():
                self._wrong("folder", CorruptionError(f"{name} is not a folder"), name=name)
        for what, name, check in (
            ("format", "format", lambda: check_seal(self._catalog.store.backend)),
            ("settings", "config.toml", lambda: load_config(folder / "config.toml")),
        ):
            try:
                check()
            except CkptError as error:
                self._wrong(what, error, name=name)

    # -- packs ---------------------------------------------------------------------------------

    def _files(self) -> Iterator[tuple[str, int]]:
        """Yield the packs and their sizes in bytes."""
        backend = self._catalog.store.backend
        for folder in packs.FOLDERS:
            for name in backend.names(folder):
                try:
                    yield name, backend.size(name)
                except FileNotFoundError:
                    continue  # gc deleted it meanwhile
                except CkptError:
                    yield name, 0  # `_pack` reports it

    def _pack(self, name: str) -> None:
        folder, stem = name.partition("/")[0], name.rpartition("/")[2].removesuffix(".pack")
        try:
            info = self._catalog.store.verify_pack(PackId(stem), folder)
            self.report.packs += 1
            self.report.bytes += info.size_bytes
            self._progress(info.size_bytes)
        except FileNotFoundError:
            return  # gc deleted it meanwhile
        except CkptError as error:
            damage = self._wrong("pack", error, name=name)
            damage.objects = tuple(self._unsound(name, PackId(stem), folder))

    def _unsound(self, name: str, pack: PackId, folder: str) -> Iterator[ObjectId]:
        store = self._catalog.store
        with contextlib.suppress(CkptError, FileNotFoundError):
            for entry in find_entries(store.backend, name):
                try:
                    read_sound(store, Place(pack, folder, entry))
                except CkptError:
                    yield entry.id

    # -- commits -------------------------------------------------------------------------------

    def _roots(self) -> dict[str, ObjectId]:
        """Return the commits of all refs, including refs whose older versions are damaged."""
        roots: dict[str, ObjectId] = {}
        for name in self._refs.every():
            try:
                commit = self._refs.target(name)
                if commit is not None:
                    roots[name] = commit
                self._refs.check(name)
                self._refs.keep_backup(name)
            except CkptError as error:
                damage, backup = self._wrong("ref", error, name=name), self._refs.backup(name)
                if name not in roots and backup is not None and backup.commit is not None:
                    damage.commits = (backup.commit,)  # the ref no longer reaches it
        return roots

    def _reachable(self) -> dict[ObjectId, Commit]:
        """Return the reachable commits that can be read."""
        revisions = Revisions(self._catalog, self._refs)
        hidden = self._catalog.dropped().commits
        commits: dict[ObjectId, Commit] = {}
        for origin, root in self._roots().items():
            above, lost, error = self._catalog.above_lost(root, commits, CkptError)
            commits |= above
            if lost and error:
                damage = self._wrong("commit", error, commit=lost, name=origin)
                older = {move.commit for move in self._refs.readable(origin) if move.commit}
                missing = sorted(n for n in older if not self._catalog.store.contains(n))
                damage.objects = damage.commits = tuple(dict.fromkeys([lost, *missing]))
        stored = set(self._catalog.store.ids(Kind.COMMIT))
        self.report.unreachable = revisions.unreachable(stored - commits.keys())
        with contextlib.suppress(CkptError):  # reported above
            for name in revisions.lost_lines():
                error = CorruptionError(
                    "a ref is lost: this commit and its ancestors are on no branch"
                )
                self._wrong("ref", error, commit=name)
        return {name: commit for name, commit in commits.items() if name not in hidden}

    def _notes(self) -> None:
        """Report notes that cannot be read, which readers ignore, outside of damaged packs."""
        known = {name for damage in self.report.damage for name in damage.objects}
        for name in self._catalog.store.ids(Kind.NOTE):
            try:
                if name not in known:
                    load_note(self._catalog.store.get(name, Kind.NOTE))
            except CkptError as error:
                self._wrong("note", error, name=name)

    # -- consequences --------------------------------------------------------------------------

    def _attribute(self) -> None:
        """Name the commits and tensors that each damaged pack and missing object affects."""
        packs = [damage for damage in self.report.damage if damage.what == "pack"]
        damaged = {name for damage in packs for name in damage.objects}
        missing: dict[ObjectId, Damage] = {}
        for (name, part), tensors in self._harmed.items():
            needed, lost = self._needs(name, part)
            causes = [damage for damage in packs if needed.intersection(damage.objects)]
            unexplained = lost - damaged
            absent = {o for o in unexplained if not self._catalog.store.contains(o)}
            for lost_id in sorted(absent or unexplained):
                text = f"object {lost_id} is missing"
                damage = Damage("object", text, name=lost_id, objects=(lost_id,))
                causes.append(missing.setdefault(lost_id, damage))
            for damage in causes:
                damage.commits = tuple(dict.fromkeys((*damage.commits, name)))
                damage.tensors = tuple(sorted({*damage.tensors, *tensors}))
        self.report.damage += missing.values()

    def _needs(self, name: ObjectId, part: str | None) -> tuple[set[ObjectId], set[ObjectId]]:
        """Return the objects that a commit, or one part of it, needs, and the missing ones."""
        lost: set[ObjectId] = set()
        try:
            commit = self._catalog.commit(name)
        except CkptError:
            return {name}, {name} - set(self._catalog.store.ids(Kind.COMMIT))
        dropped = self._catalog.dropped()
        if part is not None:
            dropped = Dropped(frozenset(), {name: frozenset(commit.parts) - {part}})
        marked = mark(self._catalog, {name: commit}, dropped, lost=lost)
        return marked.objects | lost, lost

    # -- cache ---------------------------------------------------------------------------------

    def _bases(self) -> None:
        """Delete wrong cached bases.

        They only cost time: a reader verifies a base before it uses it.
        """
        for path in sorted(self._cache.glob("bases/*")):
            try:
                table = self._catalog.values(ObjectId(path.name))
                infos = self._infos(ObjectId(path.name))
            except CkptError:
                continue  # its commit was deleted
            base = None if infos is None else CachedTable(path, infos, table)
            if base is not None and not base.is_sound() and os.path.lexists(path):
                base.discard()
                self.report.discarded.append(f"cache/bases/{path.name}")

    def _infos(self, table: ObjectId) -> list[TensorInfo] | None:
        """Return the tensors of a hash table of weights."""
        for name in self._catalog.store.ids(Kind.COMMIT):
            with contextlib.suppress(CkptError):
                commit = self._catalog.commit(name)
                state = commit.parts.get("model")
                if state is not None and state.values == table:
                    schema = self._catalog.schema(commit.schema)
                    return [schema.tensors[number] for number in schema.stored("model")]
        return None

    def _index(self, store: ObjectStore) -> None:
        """Compare the index of the repository with one that is built from the packs."""
        alone = self._catalog.store
        for _ in range(_TRIES):  # other processes may write between the two refreshes
            store.refresh()
            alone.refresh()
            if store.index.agrees(alone.index):
                return
        if store.pack_sizes() == alone.pack_sizes():
            error = CorruptionError(
                "the index does not match the packs: run 'ckpt index --rebuild'"
            )
            self._wrong("cache", error, name="index")


def verify(
    repository: Repository, progress: Progress = quiet, *, subset: str | None = None
) -> VerifyReport:
    """Verify that every commit can be restored; see `Repo.verify`."""
    budget = None if subset is None else Budget.parse(subset)
    with packs_alone(repository.catalog) as catalog:
        return Verifier(repository, catalog, progress, budget).run()


def why_unopened(folder: Path, error: CkptError) -> CorruptionError | None:
    """Return the damage that prevents opening a repository; `error` was raised by opening it.

    None means that the repository belongs to a newer version.
    """
    if isinstance(error, CorruptionError):
        return error
    try:
        check_seal(Repository.backend_at(folder))
    except CorruptionError as damage:
        return damage
    return None
