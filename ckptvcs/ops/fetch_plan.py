"""Plan a fetch: what a repository needs of a bundle file, and the records that go with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from ckptvcs.encode.assemble import recipe_of
from ckptvcs.errors import CorruptionError
from ckptvcs.history.commit import PARTS
from ckptvcs.history.note import MAX_NOTES
from ckptvcs.history.reachability import is_whole
from ckptvcs.history.recipe import Recipe, load_recipe
from ckptvcs.history.records import LEFT_OUT, DropRecord
from ckptvcs.ops.bundle_source import Source, archived, extras
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import Kind, ObjectId, PackId

Versions = tuple[tuple[str, int], ...]
"""Each branch with the number of its newest version."""


class State:
    """What a repository has of the commits of a bundle file, at one moment."""

    def __init__(self, repository: Repository, source: Source) -> None:
        self._repository, self._source = repository, source
        self._catalog = repository.catalog
        self._dropped = self._catalog.dropped()

    def _has_all(self, name: ObjectId) -> bool:
        commits = {name: self._catalog.commit(name)}  # perhaps in another form than in the file
        return is_whole(self._catalog, commits, self._dropped)

    @cached_property
    def added(self) -> tuple[ObjectId, ...]:
        """The commits that the repository does not have."""
        return tuple(n for n in self._source.commits if not self._catalog.store.contains(n))

    @cached_property
    def restored(self) -> tuple[ObjectId, ...]:
        """The commits that the repository dropped, or that lack parts."""
        added = set(self.added)
        return tuple(
            name
            for name, row in self._source.listed.items()
            if name not in added
            and (
                name in self._dropped.commits
                or self._dropped.parts.get(name, frozenset()).intersection(row.parts)
                or not self._has_all(name)
            )
        )

    @cached_property
    def exact_again(self) -> tuple[ObjectId, ...]:
        """The other commits whose exact patch the repository lacks."""
        known = self._source.commits.keys() - {*self.added, *self.restored}
        return tuple(
            name for name in self._source.commits if name in known and self.patches([name])
        )

    @cached_property
    def wanted(self) -> tuple[ObjectId, ...]:
        """The commits that the bundle file has more of, ancestors first."""
        some = {*self.added, *self.restored, *self.exact_again}
        return tuple(name for name in self._source.commits if name in some)

    def patches(self, names: Iterable[ObjectId]) -> set[ObjectId]:
        """Return the exact tables of commits that the bundle file has and the repository lacks."""
        tables = {
            self._source.commits[name].parts[part].exact
            for name in names
            for part in self._source.listed[name].patches
        }
        return {table for table in tables if table and not self._catalog.has_recipe(table)}


@dataclass(frozen=True)
class Plan:
    """What to write: data packs, packs of exact patches, objects, new recipes and drops."""

    packs: dict[PackId, str]
    patches: dict[PackId, str]
    objects: list[ObjectId]
    recipes: list[Recipe]
    drops: list[DropRecord]


class Planner:
    """Plans what a repository needs of a bundle file."""

    def __init__(self, repository: Repository, source: Source, state: State) -> None:
        self._repository, self._source, self._state = repository, source, state
        self._catalog, self._store = repository.catalog, repository.catalog.store
        self._theirs = source.catalog

    def plan(self, time: str) -> Plan:
        """Return what to write; `time` is that of new records."""
        wanted, objects = self._state.wanted, self.notes()
        if not wanted:
            return Plan({}, {}, objects, [], [])
        patches = self._state.patches(wanted)
        packs: dict[PackId, str] = {}
        patch_packs: dict[PackId, str] = {}
        recipes: list[Recipe] = []
        for name in sorted(self._source.needed(wanted).objects):
            place = self._theirs.store.places(name)[0]
            if place.entry.kind == Kind.RECIPE:
                recipe = load_recipe(self._theirs.store.get(name, Kind.RECIPE))
                if recipe.patch and recipe.values in patches:
                    patch_packs[place.pack] = place.folder
                elif not recipe.patch and (new := self._recipe(recipe)) is not None:
                    recipes.append(new)
            elif place.entry.kind not in (Kind.BUNDLE, Kind.NOTE) and self._lacks(name):
                objects.append(name)
        for bundle in {name for recipe in recipes for name in recipe.bundles}:
            if not self._store.contains(bundle):
                place = self._theirs.store.places(bundle)[0]
                packs[place.pack] = place.folder
        return Plan(packs, patch_packs, objects, recipes, self._drops(time) + self._forms(time))

    def notes(self) -> list[ObjectId]:
        """Return the notes that the repository lacks, if it may have so many."""
        found = []
        for name in (*self._source.commits, *self._source.headers):
            new = [note for note, _ in self._theirs.notes(name) if self._lacks(note)]
            if len(new) + len(self._catalog.note_ids(name)) <= MAX_NOTES:
                found += new
        return sorted(found)

    def _lacks(self, name: ObjectId) -> bool:
        """Return whether an object has to be copied; the tables of patches are in their packs."""
        return self._theirs.store.lasts(name) and not self._store.lasts(name)

    def _recipe(self, recipe: Recipe) -> Recipe | None:
        """Return a new recipe for a hash table; None if the present one is as good.

        The frame of a base must be less deep than the frames that are based on it, here and in the
        bundle file.  So the new recipe has the less deep frame of each tensor.
        """
        values = recipe.values
        here = next(
            (
                one
                for _, one in self._catalog.recipes(values)
                if not one.patch and all(map(self._store.contains, one.bundles))
            ),
            None,
        )
        if here is None:
            return replace(recipe, generation=self._catalog.next_generation(values))
        if here.ends or recipe.ends:  # no frame is based on such a table
            return None
        if len(here.frames) != len(recipe.frames):
            raise CorruptionError(f"two recipes of {values[:8]} have different lengths")
        count = range(len(here.frames))
        old = [here.frame_place(position) for position in count]
        new = [recipe.frame_place(position) for position in count]
        best = [
            theirs
            if self._theirs.frame_at(*theirs).depth < self._catalog.frame_at(*ours).depth
            else ours
            for theirs, ours in zip(new, old, strict=True)
        ]
        return None if best == old else recipe_of(self._catalog, values, best, None)

    # -- records ---------------------------------------------------------------------------------

    def _drops(self, time: str) -> list[DropRecord]:
        """Return the drops that hide new commits for now, and their other ancestors for ever."""
        after = self._repository.refs.branches()
        return [
            DropRecord("drop", names, (), LEFT_OUT, time, after=after)
            for names in (self._state.added, self._headers())
            if names
        ]

    def _forms(self, time: str) -> list[DropRecord]:
        """Return the record of the new commits that are archived, and of those that come back."""
        known, new = self._catalog.archived(), {*self._state.added, *self._state.restored}
        rows = [row for name, row in self._source.listed.items() if name in new]
        return archived([row for row in rows if known.get(row.id) != row.form], time)

    def _headers(self) -> tuple[ObjectId, ...]:
        """Return the ancestors to drop: the bundle file has only their commit objects, as has this
        repository.
        """
        dropped, reached = self._catalog.dropped(), self._repository.revisions.ids()
        unknown = self._source.headers - reached - dropped.commits
        return tuple(sorted(name for name in unknown if not self._repository.revisions.whole(name)))

    def show(self, time: str) -> list[DropRecord]:
        """Return the records that make restored commits visible.

        They are undos of drops, the same drops of other commits, and what stays away of these.
        """
        after = self._repository.refs.branches()
        records, back = list[DropRecord](), set[ObjectId]()
        for name, drop in self._catalog.drops().items():
            going = {commit for commit in drop.commits if self._returns(commit, drop.parts)}
            back |= going
            if going:
                undo = DropRecord("undo", drop.commits, drop.parts, LEFT_OUT, time, (name,), after)
                others = tuple(commit for commit in drop.commits if commit not in going)
                records += [undo, *([replace(drop, commits=others)] if others else [])]
        groups: dict[tuple[str, tuple[str, ...]], list[ObjectId]] = {}
        for name in self._state.restored:
            missing = self._missing(name) if name in back else []
            for what, parts in (("drop", missing), ("fade", self._near(name))):
                if parts:
                    groups.setdefault((what, tuple(sorted(parts))), []).append(name)
        return records + [
            DropRecord(what, tuple(names), parts, LEFT_OUT, time, after=after)
            for (what, parts), names in groups.items()
        ]

    def _returns(self, name: ObjectId, parts: tuple[str, ...]) -> bool:
        """Return whether the bundle file brings back a commit that was dropped with these parts."""
        if name not in self._state.restored:
            return False
        return not parts or not set(parts).isdisjoint(self._source.listed[name].parts)

    def _missing(self, name: ObjectId) -> list[str]:
        """Return the parts and extras of a commit that are neither in the bundle file nor here."""
        commit = self._source.commits[name]
        others = extras(commit)
        return [
            part
            for part in self._source.gone_of(name)
            if not (
                self._store.contains(others[part])
                if part in others
                else self._catalog.has_recipe(commit.parts[part].values, patches=False)
            )
        ]

    def _near(self, name: ObjectId) -> list[str]:
        """Return the parts of a commit whose exact patch is missing without a record."""
        fades = [record for record in self._catalog.drop_records(name) if record.what == "fade"]
        faded = {part for record in fades for part in record.parts or PARTS}
        return [
            part
            for part, state in self._source.commits[name].parts.items()
            if state.exact and part not in faded and not self._catalog.has_recipe(state.exact)
        ]
