"""Mark: every object that commits need; for a tensor that is the chain down to its keyframe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from ckptvcs.errors import CorruptionError, MissingObjectError
from ckptvcs.history.catalog import Catalog, Dropped
from ckptvcs.history.commit import ERRORS, Commit
from ckptvcs.history.recipe import Recipe
from ckptvcs.store.ids import ObjectId, PackId
from ckptvcs.store.pack import pack_name


@dataclass
class Marked:
    """Objects that must stay; of bundles, also the part they belong to."""

    objects: set[ObjectId] = field(default_factory=set)
    bundles: dict[ObjectId, str] = field(default_factory=dict)


def mark(
    catalog: Catalog,
    commits: Mapping[ObjectId, Commit],
    gone: Dropped,
    faded: Set[ObjectId] = frozenset(),
    lost: set[ObjectId] | None = None,
) -> Marked:
    """Every object that commits need but for what is `gone` of them; of exact values that have
    `faded` nothing.  What is not there comes into `lost`, if that is given.

    Raises:
        CorruptionError: something that is needed is missing or unreadable, and `lost` is not given.
    """
    marked = Marked()
    tables: list[tuple[ObjectId, str]] = []
    for name, commit in commits.items():
        marked.objects.add(name)
        if name in gone.commits:
            continue
        marked.objects.add(commit.schema)
        marked.objects |= {file.skeleton for file in commit.files if file.skeleton}
        gone_parts = gone.parts.get(name, frozenset())
        if commit.errors is not None and ERRORS not in gone_parts:
            marked.objects.add(commit.errors)
        tables += _tables_of(catalog, name, commit, gone_parts, faded)
    # Of tables that these stand on, only frames are read: their hashes prove nothing here.
    marked.objects |= {table for table, _ in tables}
    _mark_tables(catalog, tables, marked, lost)
    if lost is not None:
        lost |= {name for name in marked.objects if not catalog.store.contains(name)}
    marked.objects |= bases(catalog, marked.objects - (lost or set()), lost)
    return marked


def _tables_of(
    catalog: Catalog, name: ObjectId, commit: Commit, gone: Set[str], faded: Set[ObjectId]
) -> Iterator[tuple[ObjectId, str]]:
    """Yield the tables of values that a commit needs, with the part of each."""
    for part, state in commit.parts.items():
        if part in gone:
            continue
        yield state.values, part
        if state.exact and state.exact not in faded and _is_kept(catalog, name, part):
            yield state.exact, part


def _is_kept(catalog: Catalog, name: ObjectId, part: str) -> bool:
    """Whether the exact patch of a part is there, or should be."""
    exact = catalog.commit(name).parts[part].exact
    if exact is None or catalog.has_recipe(exact):
        return exact is not None
    return bool(catalog.recipes(exact)) and part not in catalog.recorded_parts(name)


def is_whole(catalog: Catalog, commits: Mapping[ObjectId, Commit], gone: Dropped) -> bool:
    """Whether everything is there that commits need but for what is `gone` of them."""
    lost: set[ObjectId] = set()
    mark(catalog, commits, gone, lost=lost)
    return not lost


def bases(
    catalog: Catalog, names: Iterable[ObjectId], lost: set[ObjectId] | None = None
) -> set[ObjectId]:
    """The objects that others are coded on; those that are not there come into `lost`.

    Raises:
        MissingObjectError: one is not there, and `lost` is not given.
    """
    found: set[ObjectId] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if lost is not None and not catalog.store.contains(name):
            lost.add(name)
            continue
        for place in catalog.store.places(name):
            base = place.entry.base
            if base is not None and base not in found:
                found.add(base)
                stack.append(base)
    return found


def _mark_tables(
    catalog: Catalog, tables: list[tuple[ObjectId, str]], marked: Marked, lost: set[ObjectId] | None
) -> None:
    """Mark the recipes and bundles of tables of values, and of the tables that these stand on."""
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
                below = _stands_on(catalog, recipe)
            except CorruptionError:
                if lost is None:
                    raise
                continue  # the bundle is damaged, and among the objects that are marked
            tables += [(base, part) for base in below if base not in done]


def _recipes_of(catalog: Catalog, table: ObjectId) -> list[tuple[ObjectId, Recipe]]:
    """Return the recipes of a table that are needed; none where no recipe has its bundles."""
    whole = [
        (name, recipe)
        for name, recipe in catalog.recipes(table)
        if all(map(catalog.store.contains, recipe.bundles))
    ]
    # The newest one is what readers use; an exact patch is not what others stand on.
    used = [pair for pair in whole if not pair[1].patch][:1]
    # A patch of a commit that was never finished may stand on what was never written.
    return used + [
        pair for pair in whole if pair[1].patch and (not used or _can_be_read(catalog, pair[1]))
    ]


def _lose(catalog: Catalog, table: ObjectId, lost: set[ObjectId] | None) -> None:
    """Add a table that no recipe is left for to `lost`.

    Raises:
        MissingObjectError: `lost` is not given.
    """
    if lost is not None:
        lost |= {table, *(b for _, recipe in catalog.recipes(table) for b in recipe.bundles)}
    elif not catalog.is_fading(table):  # else a writer let the patch fade since the first look
        raise MissingObjectError(f"no recipe is left for the values {table[:8]}")


def _can_be_read(catalog: Catalog, patch: Recipe) -> bool:
    return all(catalog.has_recipe(table) for table in _stands_on(catalog, patch))


def _stands_on(catalog: Catalog, recipe: Recipe) -> set[ObjectId]:
    """The tables that the frames of a recipe stand on."""
    used: dict[int, set[int]] = {}
    for owner, frame in zip(recipe.owners, recipe.frames, strict=True):
        used.setdefault(owner, set()).add(frame)
    found = set()
    for owner, numbers in used.items():
        found |= {catalog.frame_at(recipe.bundles[owner], number).base for number in numbers}
    return {base[0] for base in found if base is not None}


def require_packs(catalog: Catalog, marked: Marked, *, durable: bool = False) -> None:
    """Prove that the packs of what is marked are there, whatever the index says; with `durable`
    sync them, too.

    Raises:
        MissingObjectError: one is not, or is cut off.
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
            there = store.backend.size(file) == store.pack_size(pack)
        except FileNotFoundError:
            there = False
        if not there:
            raise MissingObjectError(f"{file} is gone or cut off", hint="see 'ckpt verify'")
    if durable:
        store.backend.settle(pack_name(folder, pack) for pack, folder in packs.items())
