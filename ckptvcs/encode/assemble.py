"""Build the tables, recipes and exact patches of a commit from its stored frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import ErrorReport, PartState
from ckptvcs.history.recipe import Between, Recipe, dump_values
from ckptvcs.store.ids import Kind, ObjectId, object_id

NewPlace = tuple[ObjectId | None, int]
"""The bundle of a frame (None: the new one), and the number of the frame in it."""

Place = NewPlace | Between
"""Where a tensor is: in a frame, or between two other tensors."""

StoredPlace = tuple[ObjectId, int]
"""The bundle of a frame, and the number of the frame in it."""


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor whose frame is stored, or belongs to the new bundle.

    near, exact   hashes of the decoded and of the original tensor
    place         the place of the frame, which has `depth` frames below it
    """

    near: bytes
    exact: bytes
    place: NewPlace
    depth: int


@dataclass
class Encoded:
    """A checkpoint whose tensors are stored durably, but are not visible in a commit yet.

    `shared` has the exact hash tables whose patch belongs to another commit.
    """

    parts: dict[str, PartState] = field(default_factory=dict)
    tables: dict[str, bytes] = field(default_factory=dict)
    recipes: list[Recipe] = field(default_factory=list)
    depth: int = 0
    data_bytes: int = 0
    patch_bytes: int = 0
    nonfinite: int = 0
    error: ErrorReport = field(default_factory=ErrorReport)
    errors: dict[int, ErrorReport] = field(default_factory=dict)
    shared: list[ObjectId] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def in_bundle(places: Iterable[NewPlace], bundle: ObjectId | None) -> list[StoredPlace]:
    """Return places with the id of the new bundle filled in."""
    stored = []
    for owner, frame in places:
        owner = owner or bundle
        assert owner is not None
        stored.append((owner, frame))
    return stored


def recipe_of(
    catalog: Catalog, values: ObjectId, places: Iterable[Place], bundle: ObjectId | None
) -> Recipe:
    """Return a new recipe of a table whose tensors are at these places.

    All that are between two tables are between the same ones, at the same share of the way.
    """
    rows = list(places)
    between = {_way(place) for place in rows if isinstance(place, Between)}
    (ends, share) = between.pop() if between else ((), ())
    assert not between
    stored = in_bundle((place for place in rows if not isinstance(place, Between)), bundle)
    bundles = tuple(dict.fromkeys(owner for owner, _ in stored))
    framed = iter(stored)
    owners, frames = list[int](), list[int]()
    for place in rows:
        if isinstance(place, Between):
            owners.append(len(bundles))
            frames.append(place.first[1])
        else:
            owner, number = next(framed)
            owners.append(bundles.index(owner))
            frames.append(number)
    generation = catalog.next_generation(values)
    return Recipe(values, generation, bundles, tuple(owners), tuple(frames), ends=ends, share=share)


def _way(place: Between) -> tuple[tuple[ObjectId, ...], tuple[int, ...]]:
    """Return the two tables that a tensor is between, and its share of the way."""
    return (place.first[0], place.last[0]), (place.part, place.whole)


Publish = Callable[[str], ObjectId | None]
"""Publishes the new frames of a part, and returns their bundle."""

Patch = Callable[[str, ObjectId, bytes, Mapping[int, int]], int]
"""Publishes the exact patch of a part, and returns its size in bytes.

The arguments are the part, the id of its near table, its exact table, and the depths of frames.
"""


def assemble(
    catalog: Catalog,
    tensors: Mapping[int, EncodedTensor],
    rows: Mapping[str, list[int]],
    publish: Publish,
    patch: Patch | None,
) -> Encoded:
    """Build the parts, tables and recipes of a commit from the tensors in the rows of its parts.

    Neither `publish` nor `patch` is called if the repository has the same already.
    """
    encoded = Encoded()
    new: dict[ObjectId, list[int]] = {}
    depths = {number: tensor.depth for number, tensor in tensors.items()}
    for part, row in rows.items():
        if not row:
            continue
        near = dump_values([tensors[number].near for number in row])
        exact = dump_values([tensors[number].exact for number in row])
        values = object_id(Kind.VALUES, near)
        state = PartState(values, None if near == exact else object_id(Kind.VALUES, exact))
        encoded.tables[part], encoded.parts[part] = near, state
        # Keep the recipe of a known table: the frames of a second recipe could depend on frames
        # that depend on the first recipe.
        if values in new:  # another part has the same bytes
            depths |= zip(row, [depths[number] for number in new[values]], strict=True)
        elif catalog.has_recipe(values, patches=False):
            known = [catalog.depth(values, position) for position in range(len(row))]
            depths |= zip(row, known, strict=True)
        else:
            new[values] = row
            places = [tensors[number].place for number in row]
            encoded.recipes.append(recipe_of(catalog, values, places, publish(part)))
        if patch is not None and state.exact is not None:
            if has_patch(catalog, state):
                encoded.shared.append(state.exact)
            else:
                encoded.patch_bytes += patch(part, values, exact, depths)
    encoded.depth = max(depths.values(), default=0)
    return encoded


def has_patch(catalog: Catalog, state: PartState) -> bool:
    """Return whether another commit with the same near and exact values has a patch to share."""
    if state.exact is None or catalog.is_fading(state.exact):
        return False
    return any(
        recipe.patch
        and catalog.store.contains(recipe.bundles[0])
        and all(f.base and f.base[0] == state.values for f in catalog.bundle(recipe.bundles[0]))
        for _, recipe in catalog.recipes(state.exact)
    )
