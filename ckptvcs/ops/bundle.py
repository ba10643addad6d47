"""Bundle: write some commits as one file that needs nothing else.

choose    the commits, their parts and exact patches, and the refs that lead to them
free      re-encode the chains that depend on other commits; this is smaller than their frames
copy      whole packs where possible, otherwise single objects
prove     read the file back and decode every commit, before the file gets its name
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ckptvcs.encode.rekey import REKEY_FLAGS, Rekeyer
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.files.targets import Target, Targets
from ckptvcs.history.bundle_file import BundledCommit, BundleWriter, Manifest
from ckptvcs.history.catalog import Catalog, Dropped, keys_of, read_sound
from ckptvcs.history.commit import PARTS, Commit
from ckptvcs.history.format_file import FLAGS, flags_of
from ckptvcs.history.log import LogEntry
from ckptvcs.history.reachability import Marked, mark
from ckptvcs.ops.bundle_source import absent, extras, near_tables, sourced
from ckptvcs.ops.placement import free_name
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store import disk
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.rows import Place
from ckptvcs.store.layered import Layered, Some
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import pack_name
from ckptvcs.text import commit_name

FORMS = ("exact", "near")
_MAX_DEPTH = 1 << 20  # of chains: none is cut


@dataclass(frozen=True)
class Bundled:
    """A written bundle file.

    Attributes:
        path: The file.
        size_bytes: Its size in bytes.
        patch_bytes: The bytes of exact patches in it.
        entries: The commits in the file, oldest first.
        exact: Those of these commits that the file holds exactly.
        refs: The branches (`heads/NAME`), tags (`tags/NAME`) and pins (`pins/ID`) in the file.
    """

    path: Path
    size_bytes: int
    patch_bytes: int
    entries: tuple[LogEntry, ...]
    exact: frozenset[ObjectId]
    refs: Mapping[str, ObjectId]


class Choice:
    """The commits of a bundle, and what it holds of each."""

    def __init__(
        self, repository: Repository, names: Sequence[ObjectId], form: str | None, only: str | None
    ) -> None:
        """Choose commits, ancestors first; `form` and `only` are those of `bundle`."""
        self._repository, self.catalog, self._form = repository, repository.catalog, form
        self._parts = PARTS if only is None else (only,)
        self.commits = {name: self.catalog.commit(name) for name in names}
        self.headers = frozenset(self.catalog.with_ancestors(names) - self.commits.keys())
        self._lost = self.catalog.dropped().parts

    @cached_property
    def listed(self) -> tuple[BundledCommit, ...]:
        """The commits as the manifest lists them."""
        return tuple(self._listed(name, commit) for name, commit in self.commits.items())

    def _listed(self, name: ObjectId, commit: Commit) -> BundledCommit:
        lost = self._lost.get(name, frozenset())
        parts = tuple(part for part in self._parts if part in commit.parts and part not in lost)
        patches = tuple(part for part in parts if self._has_patch(commit.parts[part].exact))
        others = tuple(sorted(extras(commit).keys() - lost))
        return BundledCommit(name, parts, patches, others, self.catalog.archived().get(name))

    def _has_patch(self, exact: ObjectId | None) -> bool:
        return self._form != "near" and exact is not None and self.catalog.has_recipe(exact)

    @property
    def exact(self) -> frozenset[ObjectId]:
        """The commits whose parts in the bundle are all exact."""
        return frozenset(
            row.id
            for row in self.listed
            if all(
                part in row.patches or self.commits[row.id].parts[part].exact is None
                for part in row.parts
            )
            and (self._parts != PARTS or len(row.parts) == len(self.commits[row.id].parts))
        )

    @cached_property
    def gone(self) -> dict[ObjectId, frozenset[str]]:
        """The parts of the commits that the bundle leaves out."""
        return {row.id: absent(row, self.commits[row.id]) for row in self.listed}

    def mark(self, catalog: Catalog) -> Marked:
        """Return the objects of the bundle, as a catalog has them."""
        commits = self.commits | {name: catalog.commit(name) for name in self.headers}
        tables = near_tables(self.listed, self.commits)
        return mark(catalog, commits, Dropped(self.headers, self.gone), tables)

    def manifest(self) -> Manifest:
        """Return the manifest, without the packs."""
        refs, head = self._branches()
        for tag in self._repository.refs.names("tags"):
            commit = self._repository.revisions.tag(tag)
            if commit in self.commits:
                refs[f"tags/{tag}"] = commit
        if self._form != "near":
            pinned = self._repository.refs.targets("pins")
            for row in self.listed:
                if row.id in pinned or (self._form == "exact" and row.patches):
                    refs[f"pins/{row.id}"] = row.id
        flags = {op: tuple(flags_of(self._repository.backend, op)) for op in FLAGS}
        flags["read"] = tuple(sorted({*flags["read"], *REKEY_FLAGS}))
        return Manifest(self.listed, refs, flags, head)

    def _branches(self) -> tuple[dict[str, ObjectId], str]:
        """Return a branch for each commit that no other one has as an ancestor, and HEAD's."""
        head = self._repository.head()
        following = head.branch if head is not None else None
        refs: dict[str, ObjectId] = {}
        for tip in self._tips():
            for name in self._names_of(tip, following):
                taken = {ref[6:] for ref in refs}
                refs[f"heads/{free_name(name, taken) if name in taken else name}"] = tip
        if following is None or f"heads/{following}" not in refs:
            following = next(iter(refs))[6:]
        return refs, following

    def _names_of(self, commit: ObjectId, following: str | None) -> list[str]:
        """Return the branches at a commit, otherwise the first one that contains it."""
        tips = self._repository.revisions.tips()
        tips = {ref[6:]: tip for ref, tip in tips.items() if ref.startswith("heads/")}
        order = sorted(tips, key=lambda name: (name != following, name))
        holding = (name for name in order if commit in self.catalog.ids_below(tips[name]))
        return [n for n in order if tips[n] == commit] or [next(holding, "main")]

    def _tips(self) -> list[ObjectId]:
        """Return the commits that are no ancestors of others, newest first."""
        parents = (parent for commit in self.commits.values() for parent in commit.parents)
        below = self.catalog.with_ancestors(parents)
        return [name for name in reversed(self.commits) if name not in below]


def bundle(
    repository: Repository,
    revisions: Sequence[str | int],
    path: Path,
    *,
    form: str | None = None,
    only: str | None = None,
    force: bool = False,
    progress: Progress = quiet,
) -> Bundled:
    """Write commits as one file; see `Repo.bundle`."""
    if form not in (None, *FORMS):
        raise InvalidInputError(f"unknown form '{form}'", hint=f"use {' or '.join(FORMS)}")
    if only is not None and only not in PARTS:
        raise InvalidInputError(f"unknown part '{only}'", hint=f"use {' or '.join(PARTS)}")
    names = _select(repository, revisions)
    with Targets() as looks:
        target = looks.free(path, force=force)

        def write() -> Bundled:
            choice = Choice(repository, names, form, only)
            if only is not None:
                _require_part(repository, choice, only)
            if form == "exact":
                _require_exact(repository, choice)
            return _write(repository, choice, target, progress)

        return repository.read_again(write)


def _select(repository: Repository, revisions: Iterable[str | int]) -> list[ObjectId]:
    """Return the commits of revisions, ancestors first."""
    found = repository.history.select(revisions)
    if not found:
        raise InvalidInputError("no commits to bundle", hint="run 'ckpt log' to list them")
    reached = repository.revisions.ids()
    for name in found:
        repository.revisions.require(name, reached)
    chosen = set(found)
    newest_first = [name for name in repository.history.newest_first() if name in chosen]
    chosen -= set(newest_first)
    return [*(name for name in found if name in chosen), *reversed(newest_first)]


def _require_part(repository: Repository, choice: Choice, part: str) -> None:
    lacking = [row.id for row in choice.listed if not row.parts]
    if lacking:
        raise NotFoundError(
            f"no part '{part}' in {_counted(repository, lacking)}",
            hint="run 'ckpt show' to see the parts of a commit",
        )


def _require_exact(repository: Repository, choice: Choice) -> None:
    near = [name for name in choice.commits if name not in choice.exact]
    if near:
        verb = "are" if len(near) > 1 else "is"
        raise InvalidInputError(
            f"{_counted(repository, near)} {verb} not exact any more",
            hint="leave out --exact to bundle near forms",
        )


def _counted(repository: Repository, names: Sequence[ObjectId]) -> str:
    """Return `step 700 (7b0c4f3e) and 2 more`."""
    first = commit_name(repository.entry(names[0]).step, names[0])
    return f"{first} and {len(names) - 1} more" if len(names) > 1 else first


def _write(repository: Repository, choice: Choice, target: Target, progress: Progress) -> Bundled:
    manifest = choice.manifest()
    with target.file() as out, _freed(choice, progress) as catalog:
        writer = BundleWriter(lambda data: disk.write(out, data))
        patch_bytes = _copy(catalog, choice.mark(catalog), writer)
        size = writer.finish(manifest)
        disk.sync(out)
        with sourced(out, str(target.path), progress):
            pass  # everything in it was checked
    return Bundled(
        target.path,
        size,
        patch_bytes,
        tuple(repository.entry(name) for name in choice.commits),
        choice.exact,
        manifest.refs,
    )


@contextmanager
def _freed(choice: Choice, progress: Progress) -> Iterator[Catalog]:
    """Yield a catalog in which the commits depend on no other commits."""
    store = choice.catalog.store
    packs = {
        pack_name(place.folder, place.pack)
        for name in choice.mark(choice.catalog).objects
        for place in store.places(name)
    }
    with disk.scratch_folder("ckpt-bundle-") as folder:
        layered = ObjectStore(
            Layered(folder, Some(store.backend, packs)), folder / "index", keys_of
        )
        try:
            layered.refresh()
            catalog = Catalog(layered)
            Rekeyer(catalog, folder / "bases", _MAX_DEPTH, progress).run(
                choice.commits, choice.gone
            )
            catalog.forget()
            yield catalog
        finally:
            layered.index.close()


def _copy(catalog: Catalog, marked: Marked, writer: BundleWriter) -> int:
    """Copy the marked objects, in whole packs where possible; return the bytes of exact patches."""
    store, patches = catalog.store, catalog.patches().keys() & marked.objects
    alone = {place.pack: place.folder for place in (store.places(name)[0] for name in patches)}
    done: set[ObjectId] = set()
    for pack, folder in sorted(alone.items()):
        writer.copy_pack(store.backend, pack, folder)
        names = {entry.id for entry in store.entries(pack, folder)}
        done |= {name for name in names if not store.lasts(name)}
    meta: list[Place] = []
    bundles: dict[tuple[PackId, str], list[Place]] = {}
    for name in sorted(marked.objects - done):
        places = store.places(name)
        place = next((place for place in places if place.pack not in alone), places[0])
        if place.entry.kind == Kind.BUNDLE:
            bundles.setdefault((place.pack, place.folder), []).append(place)
        else:
            meta.append(place)
    others: dict[str, list[Place]] = {}
    for (pack, folder), places in sorted(bundles.items()):
        if len(store.entries(pack, folder)) == len(places):
            writer.copy_pack(store.backend, pack, folder)
            continue
        for place in places:
            others.setdefault(marked.bundles[place.entry.id], []).append(place)
    for places in others.values():  # parts are never mixed in a pack
        _copy_objects(catalog, writer, "packs", places)
    _copy_objects(catalog, writer, "meta", meta)
    return sum(map(store.pack_size, alone))


def _copy_objects(
    catalog: Catalog, writer: BundleWriter, folder: str, places: Sequence[Place]
) -> None:
    """Copy objects into a new pack."""
    pack = writer.new_pack(folder)
    for place in places:
        pack.copy(place.entry, *read_sound(catalog.store, place))
    writer.add(pack)
