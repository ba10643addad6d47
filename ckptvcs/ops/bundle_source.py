"""Open a bundle file: check everything in it before anybody uses it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.history.bundle_file import BundledCommit, BundleFile
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog, Dropped, keys_of
from ckptvcs.history.commit import ERRORS, Commit
from ckptvcs.history.note import MAX_NOTES
from ckptvcs.history.provenance import PROVENANCE
from ckptvcs.history.reachability import Marked, mark
from ckptvcs.history.recipe import load_recipe
from ckptvcs.history.records import LEFT_OUT, DropRecord
from ckptvcs.ops.verify import CommitVerifier
from ckptvcs.parallel import Progress
from ckptvcs.store import disk
from ckptvcs.store import pack as packs
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.store.layered import Layered
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import Entry

_META = frozenset(Kind) - {Kind.BUNDLE, Kind.RECORD}
_PATCH = sorted([Kind.VALUES, Kind.RECIPE, Kind.BUNDLE])


def extras(commit: Commit) -> dict[str, ObjectId]:
    """Return the objects of a commit that it can lose, by the name that a drop has for them."""
    found = {ERRORS: commit.errors, PROVENANCE: commit.provenance}
    return {name: value for name, value in found.items() if value is not None}


def absent(listed: BundledCommit, commit: Commit) -> frozenset[str]:
    """Return the parts and extras of a commit that a bundle file lacks."""
    return frozenset((*commit.parts, *extras(commit))).difference(listed.parts, listed.extras)


def near_tables(
    archived: Iterable[BundledCommit], commits: Mapping[ObjectId, Commit]
) -> set[ObjectId]:
    """Return the hash tables of exact forms that a bundle file leaves out."""
    return {
        state.exact
        for listed in archived
        for part, state in commits[listed.id].parts.items()
        if state.exact and part not in listed.patches
    }


def left_out(
    archived: Iterable[BundledCommit], commits: Mapping[ObjectId, Commit], time: str
) -> list[DropRecord]:
    """Return the records of the parts and exact patches of commits that a bundle file lacks."""
    groups: dict[tuple[str, tuple[str, ...]], list[ObjectId]] = {}
    for listed in archived:
        commit = commits[listed.id]
        gone = absent(listed, commit)
        faded = {part for part, state in commit.parts.items() if state.exact} - gone
        for what, parts in (("drop", gone), ("fade", faded.difference(listed.patches))):
            if parts:
                groups.setdefault((what, tuple(sorted(parts))), []).append(listed.id)
    return [
        DropRecord(what, tuple(names), parts, LEFT_OUT, time)
        for (what, parts), names in groups.items()
    ]


def archived(rows: Iterable[BundledCommit], time: str) -> list[DropRecord]:
    """Return the record of those commits of a bundle file that are archived, if there are any."""
    forms = tuple(row.form for row in rows if row.form is not None)
    names = tuple(form.commit for form in forms)
    return [DropRecord("archive", names, (), LEFT_OUT, time, archived=forms)] if forms else []


class Source:
    """The commits of an open bundle file.

    Attributes:
        manifest: The manifest.
        file: The packs of the bundle file.
        catalog: The objects.
        commits: The whole commits, by id, ancestors first.
        headers: Their other ancestors, of which the bundle file has only the commit objects.
    """

    def __init__(self, file: BundleFile, catalog: Catalog) -> None:
        self.file, self.catalog = file, catalog
        self.manifest = file.manifest
        self.commits = {row.id: catalog.commit(row.id) for row in self.manifest.commits}
        self.headers = frozenset(catalog.with_ancestors(self.commits) - self.commits.keys())

    @cached_property
    def listed(self) -> dict[ObjectId, BundledCommit]:
        """The rows of the manifest, by commit."""
        return {row.id: row for row in self.manifest.commits}

    @cached_property
    def gone(self) -> Dropped:
        """The commits and parts that the bundle file lacks."""
        parts = {row.id: absent(row, self.commits[row.id]) for row in self.manifest.commits}
        return Dropped(self.headers, {name: gone for name, gone in parts.items() if gone})

    def gone_of(self, name: ObjectId) -> frozenset[str]:
        """Return the parts of a commit that the bundle file lacks."""
        return self.gone.parts.get(name, frozenset())

    def needed(self, names: Iterable[ObjectId]) -> Marked:
        """Return the objects that commits need, with the commit objects of their ancestors.

        Raises:
            CorruptionError: the bundle file lacks one of them.
        """
        return self.mark(self.catalog, names)

    def mark(self, catalog: Catalog, names: Iterable[ObjectId]) -> Marked:
        """Return the same objects as another catalog has them."""
        commits = {name: self.commits[name] for name in names}
        headers = self.catalog.with_ancestors(commits) & self.headers
        commits |= {name: self.catalog.commit(name) for name in headers}
        tables = near_tables(self.manifest.commits, self.commits)
        return mark(catalog, commits, self.gone, tables)

    def check(self, progress: Progress) -> None:
        """Check the form of each pack and commit, and decode everything.

        Raises:
            CorruptionError: something is missing, damaged or not allowed.
        """
        for file in (name for folder in packs.FOLDERS for name in self.file.names(folder)):
            self._check_pack(file)
        for row in self.manifest.commits:
            self._check_patches(row)
            if row.form is not None and row.form.commit != row.id:
                raise CorruptionError(f"{self.file} says how another commit is archived")
        self.needed(self.commits)
        heads = [tip for ref, tip in self.manifest.refs.items() if ref.startswith("heads/")]
        if not self.commits.keys() <= {
            name for tip in heads for name in self.catalog.ids_below(tip)
        }:
            raise CorruptionError(f"{self.file} has commits that are on no branch")
        self._check_notes()
        for damage in CommitVerifier(self.catalog, progress).check(self.commits).damage:
            raise CorruptionError(f"{self.file} is damaged: {damage.message}")

    def _check_pack(self, file: str) -> None:
        """Refuse a pack that has another name, and objects that do not belong into it."""
        if packs.hash_pack(self.catalog.store.backend, file) != PurePosixPath(file).stem:
            raise CorruptionError(f"{self.file} is damaged: a pack has another hash")
        entries = packs.read_entries(self.catalog.store.backend, file)
        kinds = sorted(entry.kind for entry in entries)
        is_meta = file.startswith("meta/")
        allowed = _META.issuperset(kinds) if is_meta else set(kinds) == {Kind.BUNDLE}
        if not allowed and not (kinds == _PATCH and not is_meta and self._is_patch(entries)):
            raise CorruptionError(f"{self.file} contains an unexpected object")

    def _is_patch(self, entries: Iterable[Entry]) -> bool:
        """Return whether the objects of a pack are an exact patch."""
        by_kind = {entry.kind: entry.id for entry in entries}
        recipe = load_recipe(self.catalog.store.get(by_kind[Kind.RECIPE], Kind.RECIPE))
        return recipe.patch and recipe.values == by_kind[Kind.VALUES]

    def _check_notes(self) -> None:
        """Refuse notes that could not be replaced."""
        for name in (*self.commits, *self.headers):
            notes = self.catalog.notes(name)
            if len(notes) > MAX_NOTES or any(one.generation > MAX_NOTES for _, one in notes):
                raise CorruptionError(f"{self.file} has too many notes of commit {name[:8]}")

    def _check_patches(self, row: BundledCommit) -> None:
        for part in row.patches:
            exact = self.commits[row.id].parts[part].exact
            if exact is None or not self.catalog.has_recipe(exact):
                raise CorruptionError(f"{self.file} lacks an exact patch that it lists")


@contextmanager
def sourced(file: BinaryIO, name: str, progress: Progress) -> Iterator[Source]:
    """Open a bundle file and check everything in it.

    Raises:
        CorruptionError: the file is truncated, damaged or not allowed in some other way.
        UnsupportedVersionError: a newer program wrote it.
        StorageError: it cannot be read.
    """
    packed = BundleFile(file, name)
    packed.check()
    with disk.scratch_folder("ckpt-bundle-") as folder:
        store = ObjectStore(Layered(folder, packed), folder / "index", keys_of)
        try:
            store.refresh()
            catalog = Catalog(store)
            catalog.record(archived(packed.manifest.commits, now()))
            source = Source(packed, catalog)
            source.catalog.record(left_out(source.manifest.commits, source.commits, now()))
            source.check(progress)
            yield source
        finally:
            store.index.close()


@contextmanager
def opened(path: Path, progress: Progress) -> Iterator[Source]:
    """Open the bundle file at a path; raises as `sourced`, and NotFoundError."""
    try:
        file = open(path, "rb", buffering=0, opener=disk.open_nonblocking)  # noqa: SIM115
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist") from error
    except OSError as error:
        raise disk.storage_error(error, f"read {path}") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InvalidInputError(f"{path} is not a file")
        with sourced(file, str(path), progress) as source:
            yield source
