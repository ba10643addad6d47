"""ObjectStore: put and get objects over packs and their index.

Reading proves what it reads: an object against its id, region bytes by the hash their bundle
holds.  An object that the index does not know, or whose pack is gone, makes the store look at the
folders once more before it is missing: other processes write and sweep at any time.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb

from ckptvcs.errors import CkptError, CorruptionError, MissingObjectError, StorageError
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import Backend
from ckptvcs.store.index import Index, KeysOf, Place, discard
from ckptvcs.store.object import Kind, ObjectId, PackId, object_id

FOLDERS = ("packs", "meta")
_KEPT = frozenset({Kind.COMMIT, Kind.RECIPE, Kind.RECORD})  # contents the index keeps
_BATCH = 512  # objects of a line that are read at once
_MAX_BASES = 8  # an object that stands on another is one or two links deep


def _forgiving(keys_of: KeysOf) -> KeysOf:
    """An object that cannot be understood has no keys; who needs it will say so."""

    def keys(kind: Kind, content: bytes) -> list[bytes]:
        try:
            return list(keys_of(kind, content))
        except CorruptionError:
            return []

    return keys


class ObjectStore:
    """Objects of one repository.  Safe to share between threads."""

    def __init__(self, backend: Backend, index_path: Path, keys_of: KeysOf) -> None:
        self.backend = backend
        self._keys_of = _forgiving(keys_of)
        self._index_path = index_path
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._rebuilt = False
        self._index = self._open_index()

    def _open_index(self) -> Index:
        with contextlib.suppress(lmdb.Error, OSError):
            return Index(self._index_path)
        # Rotten, or of another version: start over.  The packs are the truth.
        with contextlib.suppress(lmdb.Error, OSError):
            discard(self._index_path)
            return Index(self._index_path)
        return self._scratch_index()

    def _scratch_index(self) -> Index:
        """An index for this process alone, where the repository cannot hold one: it is read-only,
        or its disk is full.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="ckpt-index-")
        return Index(Path(self._scratch.name) / self._index_path.name)

    # -- finding ---------------------------------------------------------------------------

    def entries(self, pack: PackId, folder: str) -> tuple[packs.Entry, ...]:
        """The objects of a pack, from its table of contents."""
        return packs.read_entries(self.backend, packs.pack_name(folder, pack))

    def pack_sizes(self) -> dict[PackId, tuple[str, int]]:
        """Folder and size of every pack that the index knows."""
        return self._index.packs()

    def pack_size(self, pack: PackId) -> int:
        """Bytes of a pack that the index knows."""
        return self._index.pack_size(pack)

    def home_size(self, name: ObjectId) -> int:
        """Bytes of the pack that a commit lies in; its share, where others lie there too."""
        return self._index.pack_share(self.places(name)[0].pack)

    def list_packs(self) -> dict[PackId, str]:
        """Every pack on disk, by listing: pack id -> folder."""
        return {
            PackId(Path(name).stem): folder
            for folder in FOLDERS
            for name in self.backend.names(folder)
            if name.endswith(".pack")
        }

    def refresh(self) -> None:
        """Bring the index in line with the packs on disk."""
        known, there = self._index.packs(), self.list_packs()
        gone = {name for name, (folder, _) in known.items() if there.get(name) != folder}
        if gone:
            self._index.remove(gone, self._keys_of)
        for name, folder in there.items():
            if name not in known:
                # A damaged pack hides only its own objects here; verify names it.
                with contextlib.suppress(CorruptionError, FileNotFoundError):
                    self._add(self._read_pack(name, folder))

    def _doubt_index(self) -> None:
        """Look again where an object was not found or not whole: was it the index that was wrong?

        Once in the life of this store that means to make it anew; then only to list the packs.
        """
        if self._rebuilt:
            self.refresh()
        else:
            self._rebuilt = True
            self.rebuild()

    def rebuild(self) -> int:
        """Make the index anew from the packs; how many packs it holds then."""
        path = Path(self._scratch.name) / "index" if self._scratch else self._index_path
        discard(path)
        self._index = Index(path)
        self.refresh()
        return len(self._index.packs())

    def _read_pack(self, name: PackId, folder: str) -> packs.PackInfo:
        file = packs.pack_name(folder, name)
        size = self.backend.size(file)
        try:
            entries = packs.read_entries(self.backend, file)
        except CorruptionError:
            entries = packs.scan_entries(self.backend, file)
        return packs.PackInfo(name, folder, size, entries)

    def _add(self, info: packs.PackInfo) -> None:
        contents = {}
        for entry in info.entries:
            if entry.kind in _KEPT:
                with contextlib.suppress(CorruptionError):
                    contents[entry.id] = self._decode(Place(info.id, info.folder, entry), 0)
        try:
            self._index.add(info, contents, self._keys_of)
        except lmdb.Error:
            if self._scratch is not None:
                raise
            self._index = self._scratch_index()
            self.refresh()

    def find(self, key: bytes) -> list[ObjectId]:
        """The objects found by a key of `keys_of`, among the packs known so far."""
        return self._index.find(key)

    def ids(self, kind: Kind, prefix: str = "") -> list[ObjectId]:
        """Every object of a kind whose id begins with `prefix`, among the packs known so far."""
        return self._index.ids(kind, prefix)

    def places(self, name: ObjectId) -> list[Place]:
        """Where an object lies, at least one place.  Raises MissingObjectError."""
        found = self._index.places(name)
        if not found:
            self.refresh()
            found = self._index.places(name)
        if not found:
            raise MissingObjectError(f"object {name} is not in the store")
        return found

    def lasts(self, name: ObjectId) -> bool:
        """Whether the index knows an object in a meta pack: data packs are deleted by rule."""
        return any(place.folder == "meta" for place in self._index.places(name))

    def contains(self, name: ObjectId) -> bool:
        """Whether the index knows an object."""
        return bool(self._index.places(name))

    # -- reading ---------------------------------------------------------------------------

    def get(self, name: ObjectId, kind: Kind) -> bytes:
        """The content of an object, proven by its id.

        Raises:
            MissingObjectError: no pack has it.
            CorruptionError: every copy is damaged, or it is of another kind.
        """
        kept = self._index.content(name) if kind in _KEPT else None
        if kept is not None and object_id(kind, kept) == name:
            return kept
        return self._get(name, kind, 0)

    def line(
        self, name: ObjectId | None, kind: Kind, next_of: Callable[[bytes], ObjectId | None]
    ) -> Iterator[tuple[ObjectId, bytes]]:
        """An object, the one that `next_of` finds in its content, and so on, each proven by its id.

        Raises:
            MissingObjectError, CorruptionError: as `get`.
        """
        while name is not None:
            batch: list[tuple[ObjectId, bytes]] = []
            with self._index.reading() as content:  # for a while: old pages wait for readers
                while name is not None and len(batch) < _BATCH:
                    kept = content(name)
                    if kept is None or object_id(kind, kept) != name:
                        break
                    batch.append((name, kept))
                    name = next_of(kept)
            yield from batch
            if name is not None and len(batch) < _BATCH:
                data = self._get(name, kind, 0)
                yield name, data
                name = next_of(data)

    def _get(self, name: ObjectId, kind: Kind | None, depth: int) -> bytes:
        failure: CkptError | None = None
        for attempt in range(2):
            for place in self.places(name):
                if kind is not None and place.entry.kind != kind:
                    raise CorruptionError(f"object {name} is no {kind.name.lower()}")
                try:
                    return self._decode(place, depth)
                except FileNotFoundError:
                    failure = MissingObjectError(f"the pack {place.pack} is gone")
                except CorruptionError as error:
                    failure = error
            if attempt == 0:
                self._doubt_index()
        raise failure or MissingObjectError(f"object {name} is not in the store")

    def _decode(self, place: Place, depth: int) -> bytes:
        if depth > _MAX_BASES:
            raise CorruptionError(f"object {place.entry.id} stands on too many others")
        file = packs.pack_name(place.folder, place.pack)
        packs.read_head(self.backend, file, place.entry)
        payload = packs.read_payload(self.backend, file, place.entry)
        return packs.decode_object(
            place.entry, payload, lambda base: self._get(base, place.entry.kind, depth + 1)
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

    def publish(self, writer: packs.PackWriter) -> packs.PackInfo:
        """Make a pack durable, then findable: a crash between the two costs a later listing."""
        info = writer.publish()
        self._add(info)
        return info

    def delete_packs(self, names: dict[PackId, str]) -> None:
        """Delete packs: out of the index first, so that nobody is sent to a file that is gone."""
        self._index.remove(set(names), self._keys_of)
        for name, folder in names.items():
            self.backend.delete(packs.pack_name(folder, name))

    def verify_pack(self, name: PackId, folder: str) -> packs.PackInfo:
        """Read a whole pack and prove its name.

        Raises:
            CorruptionError: the bytes are not those that were written.
            StorageError: they cannot be read.
        """
        file = packs.pack_name(folder, name)
        try:
            if packs.hash_pack(self.backend, file) != name:
                raise CorruptionError(f"{file} is damaged: its bytes have another hash")
            return packs.PackInfo(
                name, folder, self.backend.size(file), packs.read_entries(self.backend, file)
            )
        except FileNotFoundError as error:
            raise StorageError(f"{file} is gone") from error
