"""Places: which pack holds what, by an index that is never trusted.

The packs are the truth.  An index that is rotten, stale or lost costs time: it is brought in line
with the packs, or made anew; where the repository cannot hold one, this process has one of its own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TypeVar

from ckptvcs.errors import CorruptionError, StorageError
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import Backend
from ckptvcs.store.disk import storage_error
from ckptvcs.store.forking import in_child
from ckptvcs.store.ids import Kind, ObjectId, PackId, object_id
from ckptvcs.store.index.index import ROTTEN, Index, Records
from ckptvcs.store.index.rows import KeysOf, Place, Row, rows_of_content, rows_of_pack

_HINT = "free some space where the repository or temporary files are"
_TRIES = 5  # others may find an index rotten, too, and begin another one each time
_KEPT = frozenset({Kind.COMMIT, Kind.RECIPE, Kind.RECORD})  # contents the index keeps
_MOST_KEPT_BYTES = 1 << 23  # of one of them

T = TypeVar("T")
Next = Callable[[bytes], ObjectId | None]


def _forgiving(keys_of: KeysOf) -> KeysOf:
    """An object that cannot be understood has no keys; who needs it will say so."""

    def keys(kind: Kind, content: bytes) -> list[bytes]:
        try:
            return list(keys_of(kind, content))
        except CorruptionError:
            return []

    return keys


class Places:
    """Where the objects of one repository are.  Safe to share between threads, and with a forked
    child, which reads and writes by files that it opens itself.
    """

    def __init__(
        self, backend: Backend, index: Path, keys_of: KeysOf, decode: Callable[[Place], bytes]
    ) -> None:
        """`index` is the name of the index file; `decode` gives an object's content, proven."""
        self._backend = backend
        self._keys_of, self._decode = _forgiving(keys_of), decode
        self._changing = RLock()
        self._rebuilt = False
        self.editions = Index(index, self._keys_of)
        _all.add(self)
        self._ask(Index.look_again)

    # -- the index -----------------------------------------------------------------------------

    def _ask(self, question: Callable[[Index], T]) -> T:
        """What the index says; one that is made anew, where it turns out to be rotten."""
        problem: Exception | None = None
        for _ in range(_TRIES):
            turn = self.editions.turn
            try:
                return question(self.editions)
            except (OSError, *ROTTEN) as error:
                problem = error
            with self._changing:
                if turn == self.editions.turn:  # else another thread was quicker
                    if not isinstance(problem, OSError):
                        self.editions.distrust()
                    self._make(partial(self.editions.rebuild, anew=False))
        if isinstance(problem, OSError):
            raise storage_error(problem, "use the index") from problem
        raise StorageError(f"the index cannot be used: {problem}", hint=_HINT) from problem

    def _make(self, make: Callable[[Records], None]) -> None:
        """Raises StorageError: no disk has room for an index."""
        late: list[Place] = []
        try:
            make(partial(self._records, late))
        except OSError as error:
            raise storage_error(error, "make an index") from error
        except ROTTEN as error:
            raise StorageError(f"no room for an index: {error}", hint=_HINT) from error
        self._add_late(late)

    def move_out(self) -> None:
        """Go on with an index for this process alone: room here is wanted for something else."""
        with self._changing:
            self._make(partial(self.editions.move_out, delete=True))

    def close(self) -> None:
        """Nobody will ask any more."""
        self.editions.close()

    def add_expected(self) -> None:
        """Add what a process published that ended before it could say so."""
        for pack, folder in self._ask(Index.expected).items():
            if folder in packs.FOLDERS:
                late: list[Place] = []
                self._add_found(pack, folder, late)
                self._add_late(late)

    def list_packs(self) -> dict[PackId, str]:
        """Every pack on disk, by listing: pack id -> folder."""
        return {
            PackId(Path(name).stem): folder
            for folder in packs.FOLDERS
            for name in self._backend.names(folder)
            if name.endswith(".pack")
        }

    def refresh(self) -> None:
        """Bring the index in line with the packs on disk."""
        with self._changing:
            self._ask(Index.look_again)
            known, there = self._ask(Index.packs), self.list_packs()
            gone = {name for name, (folder, _) in known.items() if there.get(name) != folder}
            if gone:
                self.remove(gone)
            late: list[Place] = []
            for name, folder in there.items():
                if name not in known:
                    self._add_found(name, folder, late)
            self._add_late(late)

    def _add_found(self, name: PackId, folder: str, late: list[Place]) -> None:
        """Add a pack that another process published, and may delete at any moment.  A damaged one
        hides only its own objects here; verify names it.
        """
        with contextlib.suppress(CorruptionError, FileNotFoundError):
            self._ask(partial(Index.add, rows=self._rows(self.read_pack(name, folder), late)))
            try:
                # Who deletes it notes that once more afterwards: before this look, or after it.
                self._backend.size(packs.pack_name(folder, name))
            except FileNotFoundError:
                self.remove({name})

    def rebuild(self) -> int:
        """Make the index anew from the packs; how many packs it holds then."""
        self._rebuilt = True
        with self._changing:
            self._make(partial(self.editions.rebuild, anew=True))
        return len(self._ask(Index.packs))

    def doubt(self) -> None:
        """Look again where an object was not found or not whole: was it the index that was wrong?

        Once in the life of this object that means to make it anew; then only to list the packs.
        """
        if self._rebuilt:
            self.refresh()
        else:
            self.rebuild()

    def read_pack(self, name: PackId, folder: str) -> packs.PackInfo:
        file = packs.pack_name(folder, name)
        size = self._backend.size(file)
        return packs.PackInfo(name, folder, size, packs.find_entries(self._backend, file))

    def _records(self, late: list[Place]) -> Iterator[list[Row]]:
        """The rows of every pack on disk."""
        for name, folder in self.list_packs().items():
            with contextlib.suppress(CorruptionError, FileNotFoundError):
                yield self._rows(self.read_pack(name, folder), late)

    def _rows(self, info: packs.PackInfo, late: list[Place]) -> list[Row]:
        """The rows of a pack, without those of contents that stand on others: for these the others
        have to be known.
        """
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
                self._ask(partial(Index.add, rows=rows))

    def agrees(self, other: Places) -> bool:
        """Whether both say the same."""
        return self._ask(lambda mine: other._ask(mine.same))

    # -- writing -------------------------------------------------------------------------------

    def expect(self, info: packs.PackInfo) -> None:
        """A pack is about to be published."""
        self._ask(lambda index: index.expect(info.id, info.folder))

    def add(self, info: packs.PackInfo) -> None:
        """A pack is there."""
        late: list[Place] = []
        self._ask(partial(Index.add, rows=self._rows(info, late)))
        self._add_late(late)

    def remove(self, names: set[PackId]) -> None:
        """Packs are to be deleted, or are gone."""
        self._ask(lambda index: index.remove(names))

    # -- reading -------------------------------------------------------------------------------

    def pack_sizes(self) -> dict[PackId, tuple[str, int]]:
        """Folder and size of every pack that is known."""
        return self._ask(Index.packs)

    def pack_size(self, pack: PackId) -> int:
        """Bytes of a pack that is known."""
        return self._ask(lambda index: index.pack_size(pack))

    def pack_share(self, pack: PackId) -> int:
        """Bytes of a pack that is known for each commit in it."""
        return self._ask(lambda index: index.pack_share(pack))

    def find(self, key: bytes) -> list[ObjectId]:
        """The objects found by a key of `keys_of`, among the packs known so far."""
        return self._ask(lambda index: index.find(key))

    def ids(self, kind: Kind, prefix: str = "") -> list[ObjectId]:
        """Every object of a kind whose id begins with `prefix`, among the packs known so far."""
        return self._ask(lambda index: index.ids(kind, prefix))

    def known(self, name: ObjectId) -> list[Place]:
        """Where an object lies, as far as the index knows."""
        return self._ask(lambda index: index.places(name))

    def find_places(self, name: ObjectId) -> list[Place]:
        """Where an object lies; nothing if it lies nowhere, which costs a look at all packs."""
        found = self.known(name)
        if not found:
            self.refresh()
            found = self.known(name)
        if not found and not self._rebuilt:
            self.rebuild()
            found = self.known(name)
        return found

    def content(self, name: ObjectId, kind: Kind) -> bytes | None:
        """The content of an object that is read often, proven by its id; None where it is not at
        hand.
        """
        if kind not in _KEPT:
            return None
        kept = self._ask(lambda index: index.content(name))
        return kept if kept is not None and object_id(kind, kept) == name else None

    def contents(
        self, name: ObjectId | None, kind: Kind, next_of: Next, most: int
    ) -> tuple[list[tuple[ObjectId, bytes]], ObjectId | None]:
        """The same of an object, the one that `next_of` finds in its content, and so on, at `most`
        so many; and the one that comes after them.
        """

        def ask(index: Index) -> tuple[list[tuple[ObjectId, bytes]], ObjectId | None]:
            at, found = name, list[tuple[ObjectId, bytes]]()
            with index.reading() as content:
                while at is not None and len(found) < most:
                    kept = content(at)
                    if kept is None or object_id(kind, kept) != at:
                        break
                    found.append((at, kept))
                    at = next_of(kept)
            return found, at

        return self._ask(ask)


_all: weakref.WeakSet[Places] = weakref.WeakSet()


def _renew_locks(_: bool) -> None:
    for places in [*_all]:
        places._changing = RLock()


in_child(_renew_locks)
