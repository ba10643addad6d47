"""ObjectStore: put and get objects over packs and their index.

Reading proves what it reads: an object against its id, region bytes by the hash their bundle
holds.  An object that the index does not know, or whose pack is gone, makes the store look at the
folders once more before it is missing: other processes write and sweep at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptvcs.errors import CkptError, CorruptionError, MissingObjectError
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import Backend
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index.index import KeysOf, Place
from ckptvcs.store.pack_index import Places

_BATCH = 512  # objects of a line that are read at once
_MAX_BASES = 8  # an object that stands on another is one or two links deep
_MAX_TRIES = 256  # copies of an object, and of those below it, that are looked at


class ObjectStore:
    """Objects of one repository.  Safe to share between threads."""

    def __init__(self, backend: Backend, index: Path, keys_of: KeysOf) -> None:
        """`index` is the name of the index file."""
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
        """The objects of a pack, from its table of contents."""
        return packs.read_entries(self.backend, packs.pack_name(folder, pack))

    def home_size(self, name: ObjectId) -> int:
        """Bytes of the pack that a commit lies in; its share, where others lie there too."""
        return self.index.pack_share(self.places(name)[0].pack)

    def places(self, name: ObjectId) -> list[Place]:
        """Where an object lies, at least one place.  Raises MissingObjectError."""
        found = self.index.find_places(name)
        if not found:
            raise MissingObjectError(f"object {name} is not in the store")
        return found

    def lasts(self, name: ObjectId) -> bool:
        """Whether the index knows an object in a meta pack: data packs are deleted by rule."""
        return any(place.folder == "meta" for place in self.index.known(name))

    def contains(self, name: ObjectId) -> bool:
        """Whether the index knows an object."""
        return bool(self.index.known(name))

    # -- reading ---------------------------------------------------------------------------

    def get(self, name: ObjectId, kind: Kind) -> bytes:
        """The content of an object, proven by its id.

        Raises:
            MissingObjectError: no pack has it.
            CorruptionError: every copy is damaged, or it is of another kind.
        """
        kept = self.index.content(name, kind)
        return self._get(name, kind, 0) if kept is None else kept

    def line(
        self, name: ObjectId | None, kind: Kind, next_of: Callable[[bytes], ObjectId | None]
    ) -> Iterator[tuple[ObjectId, bytes]]:
        """An object, the one that `next_of` finds in its content, and so on, each proven by its id.

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
                if next(tries, None) is None:  # each of many copies may stand on many others
                    raise CorruptionError(f"object {name} has too many copies that are damaged")
                if kind is not None and place.entry.kind != kind:
                    raise CorruptionError(f"object {name} is no {kind.name.lower()}")
                try:
                    return self._decode(place, depth, tries)
                except FileNotFoundError:
                    failure = MissingObjectError(f"the pack {place.pack} is gone")
                except CorruptionError as error:
                    failure = error
            if attempt == depth == 0:
                self.index.doubt()
        raise failure or MissingObjectError(f"object {name} is not in the store")

    def _decode(self, place: Place, depth: int, tries: Iterator[int] | None = None) -> bytes:
        if depth > _MAX_BASES:
            raise CorruptionError(f"object {place.entry.id} stands on too many others")
        file = packs.pack_name(place.folder, place.pack)
        packs.read_head(self.backend, file, place.entry)
        payload = packs.read_payload(self.backend, file, place.entry)
        return packs.decode_object(
            place.entry, payload, lambda base: self._get(base, place.entry.kind, depth + 1, tries)
        )

    def read_region(self, name: ObjectId, offset: int, length: int) -> bytes:
        """Bytes of a bundle's region, unproven: the caller checks them by the bundle's hashes."""
        for attempt in range(2):
            for place in self.places(name):
                file = packs.pack_name(place.folder, place.pack)
                with contextlib.suppress(FileNotFoundError):
                    return packs.read_region(self.backend, file, place.entry, offset, length)
            if attempt == 0:
                self.refresh()
        raise MissingObjectError(f"the pack of bundle {name} is gone")

    def content_at(self, place: Place) -> bytes:
        """The content of an object as one pack has it, proven by its id, whatever else has it.

        Raises:
            CorruptionError: it is damaged there.
            FileNotFoundError: the pack is gone.
        """
        return self._decode(place, 0)

    def read_record(self, place: Place) -> tuple[bytes, bytes]:
        """The region, unproven, and the payload of an object as they lie in a pack."""
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
        """A pack that is published at the end, unless nothing came into it.

        Raises:
            StorageError: the disk is full, or fails; nothing became visible.
        """
        pack = self.new_pack(folder)
        try:
            yield pack
            if not pack.is_empty:
                self.publish(pack)
        finally:
            pack.abort()

    def publish(self, writer: packs.PackWriter) -> packs.PackInfo:
        """Make a pack durable, then findable: a crash between the two costs a later listing."""
        info = writer.publish(self.index.expect)
        self.index.add(info)
        return info

    def delete_packs(self, names: dict[PackId, str]) -> None:
        """Delete packs: out of the index first, so that nobody is sent to a file that is gone; and
        once more afterwards, as another process may have made an index of the files meanwhile.
        """
        self.index.remove(set(names))
        for name, folder in names.items():
            self.backend.delete(packs.pack_name(folder, name))
        self.index.remove(set(names))

    def verify_pack(self, name: PackId, folder: str) -> packs.PackInfo:
        """Read a whole pack and prove its name.

        Raises:
            CorruptionError: the bytes are not those that were written.
            StorageError: they cannot be read.
            FileNotFoundError: it is gone.
        """
        file = packs.pack_name(folder, name)
        if packs.hash_pack(self.backend, file) != name:
            raise CorruptionError(f"{file} is damaged: its bytes have another hash")
        return packs.PackInfo(
            name, folder, self.backend.size(file), packs.read_entries(self.backend, file)
        )
