"""Places: the packs that contain each object, according to an index that is never trusted.

Only the packs are authoritative.  If the index is damaged, stale or lost, it is updated or rebuilt
from the packs, which takes time.  If the repository has no room for it, this process uses a private
one.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, takewhile, zip_longest
from pathlib import Path
from threading import RLock
from typing import TypeVar

from ckptvcs.errors import CorruptionError, StorageError
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import Backend
from ckptvcs.store.disk import storage_error
from ckptvcs.store.forking import in_child
from ckptvcs.store.ids import Kind, ObjectId, PackId, object_id
from ckptvcs.store.index.index import Index, Records
from ckptvcs.store.index.recent import Recent
from ckptvcs.store.index.rows import (
    CONTENTS,
    EXPECTED,
    KEYS,
    OBJECTS,
    PACKS,
    REMOVED,
    ROTTEN,
    KeysOf,
    Place,
    Row,
    cut_key,
    folder_of,
    load_pack,
    load_place,
    pack_of,
    rows_of_content,
    rows_of_pack,
)

_HINT = "free some space where the repository or temporary files are"
_TRIES = 5  # other processes may rebuild a damaged index at the same time
# The index holds the contents of these.
_KEPT = frozenset({Kind.COMMIT, Kind.RECIPE, Kind.RECORD, Kind.NOTE})
_MOST_KEPT_BYTES = 1 << 23  # of one object

T = TypeVar("T")
Next = Callable[[bytes], ObjectId | None]


def _forgiving(keys_of: KeysOf) -> KeysOf:
    """Return no keys for a damaged object; its reader will report it."""

    def keys(kind: Kind, content: bytes) -> list[bytes]:
        try:
            return list(keys_of(kind, content))
        except CorruptionError:
            return []

    return keys


class Places:
    """The copies of the objects of one repository.

    Safe to share between threads, and with a forked child, which opens the files again.
    """

    def __init__(
        self, backend: Backend, index: Path, keys_of: KeysOf, decode: Callable[[Place], bytes]
    ) -> None:
        """Open an index by its file name; `decode` returns the checked content of an object."""
        self._backend = backend
        self._keys_of, self._decode = _forgiving(keys_of), decode
        self._changing = RLock()
        self._rebuilt = False
        self.editions = Index(index, self._keys_of)
        _all.add(self)
        self._ask(lambda index: index.follower.look_again())

    # -- the index -----------------------------------------------------------------------------

    def _ask(self, question: Callable[[Index], T]) -> T:
        """Return the answer of the index, and rebuild the index if it is damaged."""
        problem: Exception | None = None
        for _ in range(_TRIES):
            turn = self.editions.follower.turn
            try:
                return question(self.editions)
            except (OSError, *ROTTEN) as error:
                problem = error
            with self._changing:
                if turn == self.editions.follower.turn:  # otherwise another thread has rebuilt it
                    if not isinstance(problem, OSError):
                        self.editions.follower.distrust()
                    self._make(partial(self.editions.rebuild, anew=False))
        if isinstance(problem, OSError):
            raise storage_error(problem, "use the index") from problem
        raise StorageError(f"the index cannot be used: {problem}", hint=_HINT) from problem

    def _query(self, question: Callable[[Recent], T]) -> T:
        """Return the answer of the content of the index; parse its rows in the question."""
        return self._ask(lambda index: index.ask(question))

    def _make(self, make: Callable[[Records], None]) -> None:
        """Make an index.  Raises StorageError if no disk has room for it."""
        late: list[Place] = []
        try:
            make(partial(self._records, late))
        except OSError as error:
            raise storage_error(error, "make an index") from error
        except ROTTEN as error:
            raise StorageError(f"no room for an index: {error}", hint=_HINT) from error
        self._add_late(late)

    def move_out(self) -> None:
        """Switch to an index of this process alone, to free its room in the repository."""
        with self._changing:
            self._make(partial(self.editions.move_out, delete=True))

    def close(self) -> None:
        """Close the files."""
        self.editions.follower.close()

    def add_expected(self) -> None:
        """Add the packs of processes that ended between publishing and indexing them."""

        def expected(recent: Recent) -> list[tuple[PackId, str]]:
            return [(PackId(key.hex()), row.decode("ascii")) for key, row in recent.rows(EXPECTED)]

        for pack, folder in self._query(expected):
            if folder in packs.FOLDERS:
                late: list[Place] = []
                self._add_found(pack, folder, late)
                self._add_late(late)

    def list_packs(self) -> dict[PackId, str]:
        """List the packs on disk: pack id -> folder."""
        return {
            PackId(Path(name).stem): folder
            for folder in packs.FOLDERS
            for name in self._backend.names(folder)
            if name.endswith(".pack")
        }

    def refresh(self) -> None:
        """Update the index from the list of packs on disk."""
        with self._changing:
            self._ask(lambda index: index.follower.look_again())
            indexed, present = self.pack_sizes(), self.list_packs()
            missing = {pack for pack, (folder, _) in indexed.items() if present.get(pack) != folder}
            if missing:
                self.remove(missing)
            late: list[Place] = []
            for name, folder in present.items():
                if name not in indexed:
                    self._add_found(name, folder, late)
            self._add_late(late)

    def _add_found(self, name: PackId, folder: str, late: list[Place]) -> None:
        """Add a pack of another process, which may delete it at any moment.

        A damaged pack hides only its own objects; `ckpt verify` reports it.
        """
        with contextlib.suppress(CorruptionError, FileNotFoundError):
            self._add(self._rows(self.read_pack(name, folder), late))
            try:
                # Check again: a deletion removes it from the index again only after the file.
                self._backend.size(packs.pack_name(folder, name))
            except FileNotFoundError:
                self.remove({name})

    def rebuild(self) -> int:
        """Rebuild the index from the packs; return the number of packs."""
        self._rebuilt = True
        with self._changing:
            self._make(partial(self.editions.rebuild, anew=True))
        return len(self.pack_sizes())

    def doubt(self) -> None:
        """Check the index after a failed read: rebuild it once, later only list the packs."""
        if self._rebuilt:
            self.refresh()
        else:
            self.rebuild()

    def read_pack(self, name: PackId, folder: str) -> packs.PackInfo:
        file = packs.pack_name(folder, name)
        size = self._backend.size(file)
        return packs.PackInfo(name, folder, size, packs.find_entries(self._backend, file))

    def _records(self, late: list[Place]) -> Iterator[list[Row]]:
        """Yield the rows of every pack on disk."""
        for name, folder in self.list_packs().items():
            with contextlib.suppress(CorruptionError, FileNotFoundError):
                yield self._rows(self.read_pack(name, folder), late)

    def _rows(self, info: packs.PackInfo, late: list[Place]) -> list[Row]:
        """Return the rows of a pack; contents with a base go to `late`: index the base first."""
        rows = [*rows_of_pack(info)]
        for entry in info.entries:
            place = Place(info.id, info.folder, entry)
            if entry.kind in _KEPT and entry.base is None:
                rows += self._rows_of_content(place)
            elif entry.kind in _KEPT:
                late.append(place)
        return rows

    def _rows_of_content(self, place: Place) -> list[Row]:
        entry = place.entry
        if entry.raw_bytes <= _MOST_KEPT_BYTES:
            with contextlib.suppress(CorruptionError, FileNotFoundError):
                content = self._decode(place)
                return [*rows_of_content(entry.id, entry.kind, content, self._keys_of)]
        return []

    def _add_late(self, late: list[Place]) -> None:
        for place in late:
            rows = self._rows_of_content(place)
            if rows:
                self._add(rows)

    def agrees(self, other: Places) -> bool:
        """Return whether both indexes have the same content."""

        def same(mine: Recent, theirs: Recent) -> bool:
            tables = (PACKS, OBJECTS, CONTENTS, KEYS)
            pairs = (zip_longest(mine.rows(table), theirs.rows(table)) for table in tables)
            return all(one == two for one, two in chain.from_iterable(pairs))

        return self._query(lambda mine: other._query(partial(same, mine)))

    # -- writing -------------------------------------------------------------------------------

    def expect(self, info: packs.PackInfo) -> None:
        """Note a pack before it is published."""
        self._add([(EXPECTED, bytes.fromhex(info.id), info.folder.encode())])

    def add(self, info: packs.PackInfo) -> None:
        """Index a published pack."""
        late: list[Place] = []
        self._add(self._rows(info, late))
        self._add_late(late)

    def remove(self, names: set[PackId]) -> None:
        """Remove packs from the index."""
        self._add([(REMOVED, bytes.fromhex(pack), b"") for pack in names])

    def _add(self, rows: list[Row]) -> None:
        self._ask(lambda index: index.add(rows))

    # -- reading -------------------------------------------------------------------------------

    def pack_sizes(self) -> dict[PackId, tuple[str, int]]:
        """Return folder and size of each indexed pack."""

        def sizes(recent: Recent) -> dict[PackId, tuple[str, int]]:
            rows = recent.rows(PACKS)
            return {PackId(key.hex()): (folder_of(row), load_pack(row)[1]) for key, row in rows}

        return self._query(sizes)

    def pack_size(self, pack: PackId) -> int:
        """Return the bytes of a pack, or 0 if it is not indexed."""
        return self._pack(pack)[1]

    def pack_share(self, pack: PackId) -> int:
        """Return the bytes of a pack, divided by the number of commits in it."""
        _, size, commits = self._pack(pack)
        return size // (commits or 1)

    def _pack(self, pack: PackId) -> tuple[int, int, int]:
        def row_of(recent: Recent) -> tuple[int, int, int]:
            row = recent.get(PACKS, bytes.fromhex(pack))
            return (0, 0, 0) if row is None else load_pack(row)

        return self._query(row_of)

    def find(self, key: bytes) -> list[ObjectId]:
        """Return the indexed objects that have a key of `keys_of`."""
        names = self._query(lambda recent: recent.find(cut_key(key)))
        return [ObjectId(name.hex()) for name in names]

    def ids(self, kind: Kind, prefix: str = "") -> list[ObjectId]:
        """Return the indexed objects of a kind whose id begins with `prefix` (hex digits)."""
        start = bytes.fromhex(prefix[: len(prefix) // 2 * 2])

        def ids(recent: Recent) -> list[ObjectId]:
            names = (ObjectId(key.hex()) for key in recent.objects(kind, start))
            near = takewhile(lambda name: name[: len(prefix)] <= prefix, names)
            return list(dict.fromkeys(name for name in near if name.startswith(prefix)))

        return self._query(ids)

    def known(self, name: ObjectId) -> list[Place]:
        """Return the indexed copies of an object."""

        def places(recent: Recent) -> list[Place]:
            return [
                load_place(name, row, folder_of(recent.get(PACKS, pack_of(row)) or b""))
                for row in recent.places(bytes.fromhex(name))
            ]

        return self._query(places)

    def find_places(self, name: ObjectId) -> list[Place]:
        """Return the copies of an object; look at all packs before the answer is none."""
        places = self.known(name)
        if not places:
            self.refresh()
            places = self.known(name)
        if not places and not self._rebuilt:
            self.rebuild()
            places = self.known(name)
        return places

    def content(self, name: ObjectId, kind: Kind) -> bytes | None:
        """Return an object's content, checked against its id, or None if the index lacks it."""
        if kind not in _KEPT:
            return None
        kept = self._query(lambda recent: recent.get(CONTENTS, bytes.fromhex(name)))
        return kept if kept is not None and object_id(kind, kept) == name else None

    def contents(
        self, name: ObjectId | None, kind: Kind, next_of: Next, most: int
    ) -> tuple[list[tuple[ObjectId, bytes]], ObjectId | None]:
        """Return the contents of an object, then of the one that `next_of` finds in it, and so on.

        There are at most `most`; the second result is the next object after them.
        """

        def contents(recent: Recent) -> tuple[list[tuple[ObjectId, bytes]], ObjectId | None]:
            at, objects = name, list[tuple[ObjectId, bytes]]()
            while at is not None and len(objects) < most:
                kept = recent.get(CONTENTS, bytes.fromhex(at))
                if kept is None or object_id(kind, kept) != at:
                    break
                objects.append((at, kept))
                at = next_of(kept)
            return objects, at

        return self._query(contents)


_all: weakref.WeakSet[Places] = weakref.WeakSet()


def _renew_locks(_: bool) -> None:
    for places in [*_all]:
        places._changing = RLock()


in_child(_renew_locks)
