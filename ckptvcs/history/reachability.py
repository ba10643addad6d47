"""Mark: every object that commits need; for a tensor that is the chain down to its keyframe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from ckptvcs.errors import CorruptionError, MissingObjectError
from ckptvcs.history.catalog import Catalog, Dropped
from ckptvcs.history.commit import ERRORS, Commit
from ckptvcs.history.provenance import PROVENANCE
from ckptvcs.history.recipe import Recipe
from ckptvcs.history.records import DropRecord
from ckptvcs.store.ids import ObjectId, PackId
from ckptvcs.store.pack import pack_name


@dataclass
class Marked:
    """The needed objects, and the part of each needed bundle."""

    objects: set[ObjectId] = field(default_factory=set)
    bundles: dict[ObjectId, str] = field(default_factory=dict)


def mark(
    catalog: Catalog,
    commits: Mapping[ObjectId, Commit],
    gone: Dropped,
    faded: Set[ObjectId] = frozenset(),
    lost: set[ObjectId] | None = None,
) -> Marked:
    """Return every object that commits need, except `gone` parts and `faded` exact tables.

    Missing objects are added to `lost`.

    Raises:
        CorruptionError: `lost` is None and a needed object is missing or unreadable.
    """
    marked = Marked()
    tables: list[tuple[ObjectId, str]] = []
    for name, commit in commits.items():
        marked.objects.add(name)
        marked.objects.update(catalog.note_ids(name))
        if name in gone.commits:
            continue
        marked.objects.add(commit.schema)
        marked.objects |= {file.skeleton for file in commit.files if file.skeleton}
        gone_parts = gone.parts.get(name, frozenset())
        if commit.errors is not None and ERRORS not in gone_parts:
            marked.objects.add(commit.errors)
        if commit.provenance is not None and PROVENANCE not in gone_parts:
            marked.objects.add(commit.provenance)
        tables += _tables_of(catalog, name, commit, gone_parts, faded)
    # Only the frames of the tables that these depend on are read, not their hashes.
    marked.objects |= {table for table, _ in tables}
    _mark_tables(catalog, tables, marked, lost)
    if lost is not None:
        lost |= {name for name in marked.objects if not catalog.store.contains(name)}
    marked.objects |= bases(catalog, marked.objects - (lost or set()), lost)
    return marked


def _tables_of(
    catalog: Catalog, name: ObjectId, commit: Commit, gone: Set[str], faded: Set[ObjectId]
) -> Iterator[tuple[ObjectId, str]]:
    """Yield the tensor hash tables that a commit needs, with the part of each."""
    for part, state in commit.parts.items():
        if part in gone:
            continue
        yield state.values, part
        if state.exact and state.exact not in faded and _is_kept(catalog, name, part):
            yield state.exact, part


def _is_kept(catalog: Catalog, name: ObjectId, part: str) -> bool:
    """Return whether the exact patch of a part exists, or is missing without a record."""
    exact = catalog.commit(name).parts[part].exact
    if exact is None or catalog.has_recipe(exact):
        return exact is not None
    return bool(catalog.recipes(exact)) and part not in catalog.recorded_parts(name)


def is_whole(catalog: Catalog, commits: Mapping[ObjectId, Commit], gone: Dropped) -> bool:
    """Return whether every object that commits need is stored, except `gone` parts."""
    lost: set[ObjectId] = set()
    mark(catalog, commits, gone, lost=lost)
    return not lost


def can_unarchive(catalog: Catalog, record: DropRecord) -> bool:
    """Return whether the forms of commits from before they were archived are still complete."""
    if not all(map(catalog.store.contains, record.commits)):
        return False
    commits = {name: catalog.original(name) for name in record.commits}
    gone = catalog.dropped()
    return is_whole(catalog, {n: c for n, c in commits.items() if n not in gone.commits}, gone)


def bases(
    catalog: Catalog, names: Iterable[ObjectId], lost: set[ObjectId] | None = None
) -> set[ObjectId]:
    """Return the bases that objects are encoded against; missing objects are added to `lost`.

    Raises:
        MissingObjectError: `lost` is None and an object is missing.
    """
    base_ids: set[ObjectId] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if lost is not None and not catalog.store.contains(name):
            lost.add(name)
            continue
        for place in catalog.store.places(name):
            base = place.entry.base
            if base is not None and base not in base_ids:
                base_ids.add(base)
                stack.append(base)
    return base_ids


def _mark_tables(
    catalog: Catalog, tables: list[tuple[ObjectId, str]], marked: Marked, lost: set[ObjectId] | None
) -> None:
    """Mark the recipes and bundles of tables, and of the tables that these depend on."""
    done = set[ObjectId]()
    while tables:
        table, part = tables.pop()
        if table in done:
            continue
        done.add(table)
        recipes = _recipes_of(catalog, table)
        if not recipes:
            _lose(catalog, table, lost)
        for name, recipe in recipes:
            marked.objects.add(name)
            marked.objects.update(recipe.bundles)
            marked.bundles |= dict.fromkeys(recipe.bundles, part)
            try:
                below = _dependencies(catalog, recipe)
            except CorruptionError:
                if lost is None:
                    raise
                continue  # the bundle is damaged, but marked
            tables += [(base, part) for base in below if base not in done]


def _recipes_of(catalog: Catalog, table: ObjectId) -> list[tuple[ObjectId, Recipe]]:
    """Return the needed recipes of a table; none if no recipe has all of its bundles."""
    whole = list(catalog.complete_recipes(table))
    # Readers use the newest recipe; nothing depends on an exact patch.
    used = [pair for pair in whole if not pair[1].patch][:1]
    # The patch of an interrupted commit may depend on a table that was never written.
    return used + [
        pair for pair in whole if pair[1].patch and (not used or _can_be_read(catalog, pair[1]))
    ]


def _lose(catalog: Catalog, table: ObjectId, lost: set[ObjectId] | None) -> None:
    """Add a table without a complete recipe to `lost`.

    Raises:
        MissingObjectError: `lost` is None.
    """
    if lost is not None:
        lost |= {table, *(b for _, recipe in catalog.recipes(table) for b in recipe.bundles)}
    elif not catalog.is_fading(table):  # otherwise a writer has just deleted the patch
        raise MissingObjectError(f"no complete recipe for the tensor hash table {table[:8]}")


def _can_be_read(catalog: Catalog, patch: Recipe) -> bool:
    return all(catalog.has_recipe(table) for table in _dependencies(catalog, patch))


def _dependencies(catalog: Catalog, recipe: Recipe) -> set[ObjectId]:
    """Return the tables that a recipe is between, and that its frames depend on."""
    frames = (catalog.frame_at(*place) for place in sorted(recipe.frame_places()))
    return {frame.base[0] for frame in frames if frame.base is not None}.union(recipe.ends)


def require_packs(catalog: Catalog, marked: Marked, *, durable: bool = False) -> None:
    """Check on disk that the packs of marked objects exist; with `durable` sync them.

    Raises:
        MissingObjectError: a pack is missing or truncated.
    """
    store = catalog.store
    packs: dict[PackId, str] = {}
    for name in marked.objects:
        places = store.places(name)
        if not any(place.pack in packs for place in places):
            packs[places[0].pack] = places[0].folder
    for pack, folder in packs.items():
        file = pack_name(folder, pack)
        try:
            is_complete = store.backend.size(file) == store.pack_size(pack)
        except FileNotFoundError:
            is_complete = False
        if not is_complete:
            raise MissingObjectError(f"{file} is missing or truncated", hint="run 'ckpt verify'")
    if durable:
        store.backend.settle(pack_name(folder, pack) for pack, folder in packs.items())
