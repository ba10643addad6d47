"""Records that are copied from pack to pack as they lie, each proven first."""

from __future__ import annotations

from ckptvcs.errors import CorruptionError
from ckptvcs.history.recipe import NO_HASH, load_bundle, slice_hash
from ckptvcs.store.ids import Kind
from ckptvcs.store.index.index import Place
from ckptvcs.store.object_store import ObjectStore


def read_sound(store: ObjectStore, place: Place) -> tuple[bytes, bytes]:
    """The region and the payload of an object in one pack: the payload by the object's id, the
    region by the hashes of its slices.

    Raises:
        CorruptionError: they are damaged, or cannot be proven, as those of an exact patch.
        FileNotFoundError: the pack is gone.
    """
    content = store.content_at(place)
    region, payload = store.read_record(place)
    if place.entry.kind == Kind.BUNDLE:
        for frame in load_bundle(content):
            for start, length, expected in frame.slices:
                found = slice_hash(memoryview(region)[start : start + length])
                if found != expected or expected == NO_HASH:
                    raise CorruptionError(f"bundle {place.entry.id[:8]} is damaged")
    return region, payload
