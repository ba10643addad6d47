"""Repack: merge tiny packs, and packs that are mostly waste, into a few full packs.

Each record is checked against its id, and each slice against its hash, and then copied unchanged.
So commits decode to the same bits.  Old packs are deleted only after the new ones are durable.
Parts are never mixed in a pack, and each exact patch has its own pack: both can be dropped by
deleting files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckptvcs.history.catalog import Catalog, read_sound
from ckptvcs.history.reachability import Marked
from ckptvcs.store.ids import PackId
from ckptvcs.store.index.rows import Place
from ckptvcs.store.pack import packed_size

_TINY = 1 << 20  # bytes; smaller packs are merged ...
_FEW = 4  # ... if there are at least this many
_FULL = 1 << 25  # bytes; larger packs are not merged
_WASTE = 0.25  # share of a pack's bytes
_LEAST_WASTE = 1 << 14  # bytes


@dataclass(frozen=True)
class Merge:
    """Packs of one folder and part, and the places in them to keep."""

    folder: str
    packs: tuple[PackId, ...]
    places: tuple[Place, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the pack that replaces them."""
        return packed_size(place.entry for place in self.places)


def plan_merges(catalog: Catalog, marked: Marked, coming: Iterable[Place] = ()) -> list[Merge]:
    """Return the merges of packs with marked objects; `coming` are objects in future packs."""
    store = catalog.store
    sizes = store.pack_sizes()
    kept = _kept(catalog, marked)
    for place in coming:
        kept.setdefault(place.pack, []).append(place)
        sizes[place.pack] = place.folder, packed_size(item.entry for item in kept[place.pack])
    groups: dict[tuple[str, str], list[tuple[PackId, bool]]] = {}
    for pack, (folder, size) in sorted(sizes.items()):
        places = kept.get(pack, [])
        parts = {marked.bundles.get(place.entry.id, "") for place in places}
        if len(parts) != 1:
            continue
        used = _used(places)
        wasted = size - used > max(_WASTE * size, _LEAST_WASTE)
        if (size <= _TINY or wasted) and used < _FULL:
            groups.setdefault((folder, parts.pop()), []).append((pack, wasted))
    return [
        merge
        for (folder, _), members in groups.items()
        if len(members) >= _FEW or any(wasted for _, wasted in members)
        for merge in _batches(folder, [pack for pack, _ in members], kept)
    ]


def _kept(catalog: Catalog, marked: Marked) -> dict[PackId, list[Place]]:
    """Return one place of each marked object, by pack, outside of the packs of exact patches."""
    index = catalog.store.index
    alone = {place.pack for name in catalog.patches() for place in index.known(name)}
    kept: dict[PackId, list[Place]] = {}
    for name in marked.objects:
        place = next((place for place in index.known(name) if place.pack not in alone), None)
        if place is not None:
            kept.setdefault(place.pack, []).append(place)
    return kept


def _batches(folder: str, packs: list[PackId], kept: dict[PackId, list[Place]]) -> Iterator[Merge]:
    batch: list[PackId] = []
    places: list[Place] = []
    used = 0
    for pack in packs:
        batch.append(pack)
        places += sorted(kept[pack], key=lambda place: place.entry.offset)
        used += _used(kept[pack])
        if used > _FULL:
            yield Merge(folder, tuple(batch), tuple(places))
            batch, places, used = [], [], 0
    if batch:
        yield Merge(folder, tuple(batch), tuple(places))


def _used(places: list[Place]) -> int:
    return sum(place.entry.record_bytes for place in places)


def copy_kept(catalog: Catalog, plan: Merge) -> None:
    """Copy the places to keep into a new pack; then the old packs can be deleted.

    Raises:
        CorruptionError: a record is damaged.
        StorageError: the disk is full.
    """
    store = catalog.store
    with store.packing(plan.folder) as pack:
        for place in plan.places:
            pack.copy(place.entry, *read_sound(store, place))
