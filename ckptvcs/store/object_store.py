"""ObjectStore: put and get objects by their id, in packs that an index lists.

The store checks each object against its id.  The caller checks region bytes against the hashes in
their bundle.  Other processes write and delete packs at any time.  So the store lists the folders
again before it reports an object as missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptvcs.errors import CkptError, CorruptionError, MissingObjectError
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.rows import KeysOf, Place
from ckptvcs.store.pack_index import Places

_BATCH = 512  # objects that `line` reads at once
_MAX_BASES = 8  # limit for chains of bases; the program writes one or two links
_MAX_TRIES = 256  # copies of an object and of its bases that are tried


class ObjectStore:
    """Objects of one repository.  Safe to share between threads."""

    def __init__(self, backend: Backend, index: Path, keys_of: KeysOf) -> None:
        """Open the store; `index` is the name of the index file."""
        self.backend = backend
        self.index = Places(backend, index, keys_of, lambda place: self._decode(place, 0))
        self.index.add_expected()
        self.find, self.ids = self.index.find, self.index.ids
        self.refresh, self.rebuild = self.index.refresh, self.index.rebuild
        self.move_index_out = self.index.move_out
        self.pack_sizes, self.pack_size = self.index.pack_sizes, self.index.pack_size
        self.list_packs = self.index.list_packs

    # -- finding ---------------------------------------------------------------------------

    def entries(self, pack: PackId, folder: str) -> tuple[packs.Entry, ...]:
        """Return the objects of a pack, from its table of contents."""
        return packs.read_entries(self.backend, packs.pack_name(folder, pack))

    def home_size(self, name: ObjectId) -> int:
        """Return the bytes of a commit's pack, divided by the number of commits in it."""
        return self.index.pack_share(self.places(name)[0].pack)

    def places(self, name: ObjectId) -> list[Place]:
        """Return all copies of an object, at least one.  Raises MissingObjectError."""
        places = self.index.find_places(name)
        if not places:
            raise MissingObjectError(f"object {name} is not in the store")
        return places

    def lasts(self, name: ObjectId) -> bool:
        """Return whether a meta pack has the object: retention may delete data packs."""
        return any(place.folder == "meta" for place in self.index.known(name))

    def contains(self, name: ObjectId) -> bool:
        """Return whether the index lists an object."""
        return bool(self.index.known(name))

    # -- reading ---------------------------------------------------------------------------

    def get(self, name: ObjectId, kind: Kind) -> bytes:
        """Return the content of an object, checked against its id.

        Raises:
            MissingObjectError: no pack has it.
            CorruptionError: all copies are damaged, or its kind is different.
        """
        kept = self.index.content(name, kind)
        return self._get(name, kind, 0) if kept is None else kept

    def line(
        self, name: ObjectId | None, kind: Kind, next_of: Callable[[bytes], ObjectId | None]
    ) -> Iterator[tuple[ObjectId, bytes]]:
        """Yield an object, then the object that `next_of` finds in its content, and so on.

        Raises:
            MissingObjectError, CorruptionError: as `get`.
        """
        while name is not None:
            batch, name = self.index.contents(name, kind, next_of, _BATCH)
            yield from batch
            if name is not None and len(batch) < _BATCH:
                data = self._get(name, kind, 0)
                yield name, data
                name = next_of(data)

    def _get(
        self, name: ObjectId, kind: Kind | None, depth: int, tries: Iterator[int] | None = None
    ) -> bytes:
        failure: CkptError | None = None
        tries = iter(range(_MAX_TRIES)) if tries is None else tries
        for attempt in range(2 if depth == 0 else 1):
            for place in self.places(name):
                if next(tries, None) is None:  # many copies with many bases take forever
                    raise CorruptionError(f"object {name} has too many damaged copies")
                if kind is not None and place.entry.kind != kind:
                    raise CorruptionError(f"object {name} is not a {kind.name.lower()} object")
                try:
                    return self._decode(place, depth, tries)
                except FileNotFoundError:
                    failure = MissingObjectError(f"pack {place.pack} is missing")
                except CorruptionError as error:
                    failure = error
            if attempt == depth == 0:
                self.index.doubt()
        raise failure or MissingObjectError(f"object {name} is not in the store")

    def _decode(self, place: Place, depth: int, tries: Iterator[int] | None = None) -> bytes:
        if depth > _MAX_BASES:
            raise CorruptionError(f"object {place.entry.id} has too many bases")
        file = packs.pack_name(place.folder, place.pack)
        packs.read_head(self.backend, file, place.entry)
        payload = packs.read_payload(self.backend, file, place.entry)
        return packs.decode_object(
            place.entry, payload, lambda base: self._get(base, place.entry.kind, depth + 1, tries)
        )

    def read_region(self, name: ObjectId, offset: int, length: int) -> bytes:
        """Return bytes of a bundle's region; the caller checks them against the bundle's hashes."""
        for attempt in range(2):
            for place in self.places(name):
                file = packs.pack_name(place.folder, place.pack)
                with contextlib.suppress(FileNotFoundError):
                    return packs.read_region(self.backend, file, place.entry, offset, length)
            if attempt == 0:
                self.refresh()
        raise MissingObjectError(f"the pack of bundle {name} is missing")

    def content_at(self, place: Place) -> bytes:
        """Return the content of one copy of an object, checked against its id.

        Raises:
            CorruptionError: this copy is damaged.
            FileNotFoundError: the pack does not exist.
        """
        return self._decode(place, 0)

    def read_record(self, place: Place) -> tuple[bytes, bytes]:
        """Return the region (unchecked) and the encoded payload of one copy of an object."""
        file = packs.pack_name(place.folder, place.pack)
        packs.read_head(self.backend, file, place.entry)
        region = packs.read_region(self.backend, file, place.entry, 0, place.entry.region_bytes)
        return region, packs.read_payload(self.backend, file, place.entry)

    # -- writing ---------------------------------------------------------------------------

    def new_pack(self, folder: str) -> packs.PackWriter:
        """Begin a pack in `packs` or `meta`."""
        return packs.PackWriter(self.backend.writer(), folder)

    @contextlib.contextmanager
    def packing(self, folder: str) -> Iterator[packs.PackWriter]:
        """Begin a pack, and publish it at the end unless it is empty.

        Raises:
            StorageError: the disk is full or failing; nothing became visible.
        """
        pack = self.new_pack(folder)
        try:
            yield pack
            if not pack.is_empty:
                self.publish(pack)
        finally:
            pack.abort()

    def publish(self, writer: packs.PackWriter) -> packs.PackInfo:
        """Publish a pack durably, then index it; a crash in between costs a later listing."""
        info = writer.publish(self.index.expect)
        self.index.add(info)
        return info

    def delete_packs(self, names: dict[PackId, str]) -> None:
        """Delete packs.

        They leave the index first, so that it never leads to a deleted file.  They leave it once
        more afterwards, because another process may have rebuilt the index meanwhile.
        """
        self.index.remove(set(names))
        for name, folder in names.items():
            self.backend.delete(packs.pack_name(folder, name))
        self.index.remove(set(names))

    def verify_pack(self, name: PackId, folder: str) -> packs.PackInfo:
        """Read a whole pack and check the hash that is its name.

        Raises:
            CorruptionError: the pack is damaged.
            StorageError: the pack cannot be read.
            FileNotFoundError: the pack does not exist.
        """
        file = packs.pack_name(folder, name)
        if packs.hash_pack(self.backend, file) != name:
            raise CorruptionError(f"{file} is damaged: its bytes have another hash")
        return packs.PackInfo(
            name, folder, self.backend.size(file), packs.read_entries(self.backend, file)
        )
