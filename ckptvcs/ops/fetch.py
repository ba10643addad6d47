"""Fetch: add the commits of a bundle file to a repository.

check     everything in the file, before anything is written
copy      the data packs that the repository lacks
publish   one meta pack with all other objects, and drops that hide the new commits
patch     the exact patches, which need the recipes of that pack
name      branches, tags and pins
show      one pack with undos of these drops and of older ones

A process that is killed before the last step leaves dropped commits.  The next gc deletes their
data, and a second fetch completes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.history.bundle_file import checked_blocks
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import read_sound
from ckptvcs.history.format_file import raise_flags, require_flags
from ckptvcs.history.reachability import require_packs
from ckptvcs.history.recipe import Recipe, dump_recipe
from ckptvcs.history.records import LEFT_OUT, DropRecord, dump_drop_record
from ckptvcs.history.refs import Generation, check_name
from ckptvcs.ops.bundle_source import Source, opened
from ckptvcs.ops.fetch_plan import Planner, State
from ckptvcs.ops.placement import free_name, stem
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.leases import check_lease, lease, turn
from ckptvcs.store.pack import pack_name

_ACTION = "fetch"
_TRIES = 5  # to move refs while others commit


@dataclass(frozen=True)
class Fetched:
    """The result of a fetch.

    Attributes:
        added: The new commits, oldest first.
        restored: The commits that were dropped, or lacked parts.
        exact_again: The commits that were near and are exact now.
        known: The commits that the repository had already.
        notes: The number of new notes.
        refs: The new and moved branches (`heads/NAME`), tags (`tags/NAME`) and pins (`pins/ID`).
        kept: The tags that name other commits here; they stay.
        size_bytes: The bytes that the repository has grown by.
    """

    added: tuple[ObjectId, ...] = ()
    restored: tuple[ObjectId, ...] = ()
    exact_again: tuple[ObjectId, ...] = ()
    known: tuple[ObjectId, ...] = ()
    notes: int = 0
    refs: dict[str, ObjectId] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    size_bytes: int = 0


class Fetcher:
    """Adds the commits of a bundle file to a repository."""

    def __init__(self, repository: Repository, source: Source, progress: Progress = quiet) -> None:
        self._repository, self._source, self._progress = repository, source, progress
        self._backend, self._catalog = repository.backend, repository.catalog
        self._refs = repository.refs
        self._size_bytes = 0

    def run(self, branch: str | None = None) -> Fetched:
        """Fetch everything; `branch` replaces the branch names of the bundle file.

        Raises:
            ConflictError: `branch` has other commits, or a ref moved meanwhile.
            InvalidInputError: `branch` is not valid, or the bundle file has several branches.
            BusyError: gc is sweeping, or another process does not finish.
            CorruptionError: An object that the commits need is missing.
            StorageError: The disk is full, or fails.
        """
        wanted, strict = self._wanted_refs(branch), branch is not None
        self._moves(wanted, strict=strict)  # raises before anything is written
        self._raise_flags()
        with lease(self._backend) as lease_name:
            state, planner = self._look()
            done = replace(self._report(state), notes=len(planner.notes()))
            self._copy(planner.plan(now()).packs)
            check_lease(self._backend, lease_name)
            with turn(self._backend):  # another fetch may write records and recipes, too
                plan = self._look()[1].plan(now())
                self._copy(plan.packs)
                self._publish(plan.objects, plan.recipes, plan.drops)
            self._copy(plan.patches)
            with turn(self._backend):
                state, planner = self._look()
                self._require(state)
                refs, kept = self._set_refs(wanted, state, lease_name, strict=strict)
                check_lease(self._backend, lease_name)  # otherwise gc may have deleted data
                self._publish([], [], planner.show(now()))
        return replace(done, refs=refs, kept=kept, size_bytes=self._size_bytes)

    def _report(self, state: State) -> Fetched:
        """Return what will be done; commits that other bundles left out count as new."""
        known = tuple(name for name in self._source.commits if name not in state.wanted)
        whole = [drop for drop in self._catalog.drops().values() if not drop.parts]
        dropped = {name for drop in whole if drop.rule != LEFT_OUT for name in drop.commits}
        left_out = {name for drop in whole for name in drop.commits} - dropped
        added = tuple(n for n in state.wanted if n in state.added or n in left_out)
        restored = tuple(name for name in state.restored if name not in left_out)
        return Fetched(added, restored, state.exact_again, known)

    def _wanted_refs(self, branch: str | None) -> dict[str, ObjectId]:
        """Return the refs of the bundle file, with its only branch under the name `branch`."""
        refs = dict(self._source.manifest.refs)
        if branch is None:
            return refs
        check_name(branch, "branch")
        tips = {commit for ref, commit in refs.items() if ref.startswith("heads/")}
        if len(tips) > 1:
            raise InvalidInputError(
                f"{self._source.file} has {len(tips)} branches", hint="leave out --branch"
            )
        others = {ref: name for ref, name in refs.items() if not ref.startswith("heads/")}
        return others | {f"heads/{branch}": tips.pop()}

    def _raise_flags(self) -> None:
        require_flags(self._backend, "write")
        for operation, flags in self._source.manifest.flags.items():
            raise_flags(self._backend, operation, *flags)
        raise_flags(self._backend, "gc", "drops")
        if any(ref.startswith("pins/") for ref in self._source.manifest.refs):
            raise_flags(self._backend, "gc", "pins")

    def _look(self) -> tuple[State, Planner]:
        """Return the present state."""
        self._catalog.store.refresh()
        self._catalog.forget()
        state = State(self._repository, self._source)
        return state, Planner(self._repository, self._source, state)

    # -- objects ---------------------------------------------------------------------------------

    def _copy(self, listed: dict[PackId, str]) -> None:
        """Copy whole packs of the bundle file."""
        for pack, folder in listed.items():
            writer = self._backend.writer()
            size = 0
            try:
                for data in checked_blocks(self._source.file, pack, folder):
                    writer.write(data)
                    size += len(data)
                    self._progress(len(data))
                with contextlib.suppress(ConflictError):  # the same bytes, not indexed yet
                    writer.publish(pack_name(folder, pack))
                    self._size_bytes += size
            finally:
                writer.abort()
        if listed:
            self._catalog.store.refresh()
            self._catalog.forget()

    def _publish(
        self, objects: Iterable[ObjectId], recipes: Iterable[Recipe], records: Iterable[DropRecord]
    ) -> None:
        """Write objects, recipes and records into one pack, which makes them visible at once."""
        store, theirs = self._catalog.store, self._source.catalog.store
        with store.packing("meta") as pack:
            for name in objects:
                place = next(place for place in theirs.places(name) if place.folder == "meta")
                pack.copy(place.entry, *read_sound(theirs, place))
            for recipe in recipes:
                pack.add(Kind.RECIPE, dump_recipe(recipe))
            for record in records:
                pack.add(Kind.RECORD, dump_drop_record(record))
            self._size_bytes += 0 if pack.is_empty else pack.size_bytes
        self._catalog.forget()

    # -- refs ------------------------------------------------------------------------------------

    def _require(self, state: State) -> None:
        """Check that hidden commits are whole, and note their packs for `settle_seen`."""
        marked = self._source.mark(self._catalog, state.restored)
        require_packs(self._catalog, marked)

    def _set_refs(
        self, wanted: dict[str, ObjectId], state: State, lease_name: str, *, strict: bool
    ) -> tuple[dict[str, ObjectId], tuple[str, ...]]:
        """Move refs; return them, and the tags that name other commits here."""
        done: dict[str, ObjectId] = {}
        for attempt in range(_TRIES):
            moves, kept = self._moves(wanted, strict=strict)
            for tip in {commit for _, commit in moves.values()}.difference(state.restored):
                self._repository.revisions.require_durable(tip)
            self._backend.settle_seen()
            check_lease(self._backend, lease_name)
            try:
                for ref, (old, commit) in moves.items():
                    self._refs.publish(ref, old, commit=commit, time=now(), action=_ACTION)
                    done[ref] = commit
                break
            except ConflictError:  # a commit moved the branch
                if attempt + 1 == _TRIES:
                    raise
        return done, kept

    def _moves(
        self, wanted: dict[str, ObjectId], *, strict: bool
    ) -> tuple[dict[str, tuple[Generation | None, ObjectId]], tuple[str, ...]]:
        """Return the refs to set with their present versions, and the tags that stay."""
        moves: dict[str, tuple[Generation | None, ObjectId]] = {}
        kept = []
        for ref, commit in sorted(wanted.items(), reverse=True):
            space, _, name = ref.partition("/")
            state = self._refs.read(ref)
            at = state.commit if state is not None else None
            if space == "heads":
                taken = {ref[6:] for ref in moves}
                place = self._branch(name, commit, taken, strict=strict)
                if place is not None:
                    moves[f"heads/{place}"] = self._refs.read(f"heads/{place}"), commit
            elif at is None:
                moves[ref] = state, commit
            elif at != commit:
                kept.append(name)
        return moves, tuple(sorted(kept))

    def _branch(self, name: str, tip: ObjectId, taken: set[str], *, strict: bool) -> str | None:
        """Return the branch to put a commit on; None if one with this name has it already.

        A branch with other commits stays.  Then the commit goes to a branch with another number.
        """
        line = self._source.catalog.with_ancestors([tip])
        branches = self._refs.names("heads")
        alike = [name, *(one for one in branches if one != name and stem(one) == stem(name))]
        for one in alike[:1] if strict else alike:
            at = self._repository.revisions.branch(one)
            if at is not None and tip in self._catalog.ids_below(at):
                return None
            if one not in taken and (at in line or (at is None and one == name)):
                return one
        if strict:
            raise ConflictError(
                f"branch '{name}' has other commits", hint="choose another name with --branch"
            )
        return free_name(name, taken.union(branches))


def fetch(
    repository: Repository, path: Path, branch: str | None = None, progress: Progress = quiet
) -> Fetched:
    """Add the commits of a bundle file to a repository; see `Repo.fetch`."""
    with opened(path, progress) as source:
        return Fetcher(repository, source, progress).run(branch)
