"""gc: plan what can go, show it, sweep it.

    mark    every commit of every generation of every ref, and all that it needs; for a tensor
            that is the chain down to its keyframe
    plan    packs in which nothing is marked, debris of dead writers
    sweep   under the exclusive mark: index first, files after

A missing or unreadable object stops the mark: nothing is deleted on half a picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from ckptvcs.errors import MissingObjectError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.refs import HEAD, Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.store.leases import dead_leases
from ckptvcs.store.object import Kind, ObjectId, PackId
from ckptvcs.store.pack import pack_name


@dataclass(frozen=True)
class GcPlan:
    """What a sweep would delete: packs with their folders, debris by name, bytes in all."""

    packs: dict[PackId, str]
    debris: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int


def mark(catalog: Catalog, refs: Refs) -> set[ObjectId]:
    """Every object that must stay.

    Older generations of refs count too: what they name can be brought back.

    Raises:
        CorruptionError: something that is needed is missing or unreadable.
    """
    names = [HEAD, *(f"heads/{n}" for n in refs.names("heads")),
             *(f"tags/{n}" for n in refs.names("tags"))]  # fmt: skip
    roots = {state.commit for name in names for state in refs.reflog(name) if state.commit}
    marked: set[ObjectId] = set()
    tables: list[ObjectId] = []
    for name, commit in Revisions(catalog, refs).reachable(sorted(roots)):
        marked |= {name, commit.schema}
        marked |= {file.skeleton for file in commit.files if file.skeleton}
        if commit.errors is not None:
            marked.add(commit.errors)
        for part in commit.parts.values():
            tables.append(part.values)
            if part.exact is not None and catalog.recipes(part.exact):
                tables.append(part.exact)
    marked |= _bases(catalog, marked)
    _mark_tables(catalog, tables, marked)
    return marked | set(catalog.store.ids(Kind.RECORD))


def _bases(catalog: Catalog, names: Iterable[ObjectId]) -> set[ObjectId]:
    """The objects that others are coded on."""
    found: set[ObjectId] = set()
    stack = list(names)
    while stack:
        for place in catalog.store.places(stack.pop()):
            base = place.entry.base
            if base is not None and base not in found:
                found.add(base)
                stack.append(base)
    return found


def _mark_tables(catalog: Catalog, tables: list[ObjectId], marked: set[ObjectId]) -> None:
    """Mark tables of values, their recipes and bundles, and the tables that these stand on."""
    done: set[ObjectId] = set()
    while tables:
        table = tables.pop()
        if table in done:
            continue
        done.add(table)
        recipes = catalog.recipes(table)
        if not recipes:
            raise MissingObjectError(f"no recipe is left for the values {table[:8]}")
        marked.add(table)
        for name, recipe in recipes:
            marked.add(name)
            for bundle, frame in zip(recipe.owners, recipe.frames, strict=True):
                owner = recipe.bundles[bundle]
                marked.add(owner)
                base = catalog.bundle(owner)[frame].base
                if base is not None and base[0] not in done:
                    tables.append(base[0])
        for place in catalog.store.places(table):
            if place.entry.base is not None:
                marked.add(place.entry.base)


def plan_gc(catalog: Catalog, refs: Refs) -> GcPlan:
    """Decide what can go.  Deletes nothing.  Raises CorruptionError as `mark` does."""
    store = catalog.store
    store.refresh()
    catalog.forget()
    marked = mark(catalog, refs)
    needed = {place.pack for name in marked for place in store.places(name)}
    sizes = store.pack_sizes()
    packs, freed, kept = {}, 0, 0
    for pack, folder in store.list_packs().items():
        size = store.backend.size(pack_name(folder, pack))
        if pack in needed or pack not in sizes:
            kept += size
        else:
            packs[pack] = folder
            freed += size
    debris = [*store.backend.names("tmp"), *dead_leases(store.backend)]
    # Bases that are being written begin with a dot; while gc sweeps, nobody writes.
    debris += [name for name in store.backend.names("cache/bases") if "/." in name]
    for name in debris:
        with contextlib.suppress(FileNotFoundError):  # it was being deleted
            freed += store.backend.size(name)
    return GcPlan(packs, tuple(debris), freed, kept)


def sweep(catalog: Catalog, plan: GcPlan) -> None:
    """Delete what the plan lists.  A crash in between leaves the rest for the next gc."""
    catalog.store.delete_packs(plan.packs)
    for name in plan.debris:
        catalog.store.backend.delete(name)
    catalog.forget()
