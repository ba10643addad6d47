"""Build the tables, recipes and exact patches of a commit from its stored frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import ErrorReport, PartState
from ckptvcs.history.recipe import Recipe, dump_values
from ckptvcs.store.ids import Kind, ObjectId, object_id

Place = tuple[ObjectId | None, int]
"""The bundle of a frame (None: the new one), and the number of the frame in it."""

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
    place: Place
    depth: int


@dataclass(frozen=True)
class Encoded:
    """A checkpoint whose tensors are stored durably, but are not visible in a commit yet.

    `shared` has the exact hash tables whose patch belongs to another commit.
    """

    parts: dict[str, PartState]
    tables: dict[str, bytes]
    recipes: list[Recipe]
    depth: int
    data_bytes: int
    patch_bytes: int
    nonfinite: int
    error: ErrorReport
    errors: dict[int, ErrorReport]
    shared: list[ObjectId]
    notes: tuple[str, ...] = ()


def in_bundle(places: Iterable[Place], bundle: ObjectId | None) -> list[StoredPlace]:
    """Return places with the id of the new bundle filled in."""
    stored = []
    for owner, frame in places:
        owner = owner or bundle
        assert owner is not None
        stored.append((owner, frame))
    return stored


def recipe_of(values: ObjectId, generation: int, places: Sequence[StoredPlace]) -> Recipe:
    """Return the recipe of a table whose tensors are at these places."""
    bundles: dict[ObjectId, int] = {}
    owners = tuple(bundles.setdefault(bundle, len(bundles)) for bundle, _ in places)
    return Recipe(values, generation, tuple(bundles), owners, tuple(n for _, n in places))


class Assembly:
    """The parts, tables, recipes and chain depths of a commit, collected part by part."""

    def __init__(
        self, catalog: Catalog, tensors: Mapping[int, EncodedTensor], *, patched: bool
    ) -> None:
        self._catalog, self._tensors, self._patched = catalog, tensors, patched
        self._rows: dict[ObjectId, list[int]] = {}
        self.depths = {number: tensor.depth for number, tensor in tensors.items()}
        self.parts: dict[str, PartState] = {}
        self.tables: dict[str, bytes] = {}
        self.recipes: list[Recipe] = []
        self.shared: list[ObjectId] = []
        self.patch_bytes = 0

    def add(
        self,
        part: str,
        row: list[int],
        publish: Callable[[], ObjectId | None],
        patch: Callable[[ObjectId, bytes], int],
    ) -> None:
        """Add a part with the tensors of `row`.

        `publish` writes the new frames and returns their bundle; `patch` writes the exact patch for
        a table of near values and returns its size in bytes. Neither is called if the repository
        has the same already.
        """
        if not row:
            return
        near = dump_values([self._tensors[number].near for number in row])
        exact = dump_values([self._tensors[number].exact for number in row])
        values = object_id(Kind.VALUES, near)
        state = PartState(values, None if near == exact else object_id(Kind.VALUES, exact))
        self.tables[part], self.parts[part] = near, state
        self._add_recipe(values, row, publish)
        if not self._patched or state.exact is None:
            return
        if has_patch(self._catalog, state):
            self.shared.append(state.exact)
        else:
            self.patch_bytes += patch(values, exact)

    def _add_recipe(
        self, values: ObjectId, row: list[int], publish: Callable[[], ObjectId | None]
    ) -> None:
        # Keep the recipe of a known table: the frames of a second recipe could depend on frames
        # that depend on the first recipe.
        if values in self._rows:  # another part has the same bytes
            twins = zip(row, self._rows[values], strict=True)
            self.depths |= {number: self.depths[twin] for number, twin in twins}
        elif self._catalog.has_recipe(values, patches=False):
            for position, number in enumerate(row):
                self.depths[number] = self._catalog.frame(values, position)[1].depth
        else:
            self._rows[values] = row
            places = in_bundle([self._tensors[number].place for number in row], publish())
            generation = self._catalog.next_generation(values)
            self.recipes.append(recipe_of(values, generation, places))


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
