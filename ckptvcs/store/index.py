"""Object id -> place, in LMDB: a fast view of the packs that can be deleted at any time.

Nothing here is the truth.  Everything can be rebuilt from the tables of contents of the packs; a
value that turns out wrong is noticed because every object is checked against its id.

    packs      pack id              -> folder, size
    objects    object id            -> places (several packs may hold the same object)
    contents   object id            -> content of small objects that are read often
    keys       key of the caller    -> object ids   ("recipes of these values", "commits of step 7")
    expected   pack id              -> folder, of packs that are about to be published
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lmdb

from ckptvcs.store.environment import (
    close,
    delete_older,
    environment,
    is_current,
    newest_file,
    next_file,
    opening,
)
from ckptvcs.store.object import Kind, ObjectId, PackId
from ckptvcs.store.pack import FOLDERS, Entry, PackInfo

_PLACE = struct.Struct("<32sBBQQQQ32s")  # pack, kind, encoding, offset, region, raw, stored, base
_PACK = struct.Struct("<BQI")  # folder, size, commits
_VERSION = b"ckptvcs index 4"
_WHOLE = b"whole"
_NO_BASE = bytes(32)
_MAX_KEY = 500


@dataclass(frozen=True)
class Place:
    """One copy of an object: the pack it lies in and its entry there."""

    pack: PackId
    folder: str
    entry: Entry


KeysOf = Callable[[Kind, bytes], Iterable[bytes]]
"""What an object can be found by, besides its id; made by the caller, opaque to the index."""

ROTTEN = (lmdb.Error, struct.error, ValueError, IndexError)
"""What reading or writing an index may raise: it is rotten, or nobody uses it any more."""


class Index:
    """The LMDB file; every method is one transaction."""

    def __init__(self, name: Path) -> None:
        """Open the index of this `name`; see `ckptvcs.store.environment` for its file.

        Raises:
            lmdb.Error, OSError: it is rotten, or the file system refuses.
        """
        self._name, self._path = name, newest_file(name)
        fresh = not self._path.exists()
        with opening:
            self._open()
        if fresh:
            delete_older(self._path)

    def _open(self) -> None:
        self._env = environment(self._path)
        # Without a transaction of its own, opening a database waits for the writer of another
        # thread with the interpreter's lock in its hands, which that one needs.
        with self._env.begin(write=True) as txn:
            if txn.get(b"version", _VERSION) != _VERSION:
                raise lmdb.InvalidError("the index has another version")
            self._packs = self._env.open_db(b"packs", txn)
            self._objects = self._env.open_db(b"objects", txn, dupsort=True)
            self._contents = self._env.open_db(b"contents", txn)
            self._keys = self._env.open_db(b"keys", txn, dupsort=True)
            self._expected = self._env.open_db(b"expected", txn)
            if txn.get(b"version") is None:
                txn.put(b"version", _VERSION)

    def follow(self) -> Index:
        """The one to use instead of this one: of a newer file, which is an empty one if nobody has
        found out before that this one is rotten.  Raises lmdb.Error, OSError.
        """
        if not self.is_superseded():
            next_file(self._path)
        return Index(self._name)

    def is_superseded(self) -> bool:
        """Whether others use a newer file by now, or this process is a child of the one that opened
        this one.
        """
        return newest_file(self._name) != self._path or not is_current(self._path, self._env)

    def close(self) -> None:
        """Let the file go, which nobody else of this process may be using."""
        close(self._path)

    @staticmethod
    def discard(name: Path) -> None:
        """Begin a new file, where one cannot be opened.  Raises OSError."""
        next_file(newest_file(name))

    def _write(self, change: Callable[[lmdb.Transaction], object]) -> None:
        """Run `change` in one transaction, in a larger map if this one is full."""
        if self.is_superseded():
            raise lmdb.InvalidError("nobody would read what is written here")
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    change(txn)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(self._env.info()["map_size"] * 2)
            except lmdb.MapResizedError:
                self._env.set_mapsize(0)

    def _begin(self) -> lmdb.Transaction:
        try:
            return self._env.begin()
        except lmdb.MapResizedError:
            self._env.set_mapsize(0)
            return self._env.begin()

    def is_whole(self) -> bool:
        """Whether it was filled to the end: one that is not lacks packs that are there."""
        with self._begin() as txn:
            return txn.get(_WHOLE) is not None

    def finish(self) -> None:
        """It holds all packs that there are."""
        self._write(lambda txn: txn.put(_WHOLE, b""))

    def packs(self) -> dict[PackId, tuple[str, int]]:
        """Every indexed pack: its folder and size in bytes."""
        with self._begin() as txn, txn.cursor(self._packs) as cursor:
            return {
                PackId(bytes(key).hex()): (FOLDERS[folder], size)
                for key, value in cursor
                for folder, size, _ in [_PACK.unpack(value)]
            }

    def pack_size(self, pack: PackId) -> int:
        """Bytes of an indexed pack; 0 where it is not known."""
        return self._pack(pack)[0]

    def pack_share(self, pack: PackId) -> int:
        """Bytes of an indexed pack for each commit in it."""
        size, commits = self._pack(pack)
        return size // max(1, commits)

    def _pack(self, pack: PackId) -> tuple[int, int]:
        with self._begin() as txn:
            row = txn.get(bytes.fromhex(pack), db=self._packs)
            _, size, commits = (0, 0, 0) if row is None else _PACK.unpack(bytes(row))
            return size, commits

    def places(self, name: ObjectId) -> list[Place]:
        """Where an object lies; empty where it is not known."""
        with self._begin() as txn, txn.cursor(self._objects) as cursor:
            if not cursor.set_key(bytes.fromhex(name)):
                return []
            return [self._place(txn, name, bytes(value)) for value in cursor.iternext_dup()]

    def _place(self, txn: lmdb.Transaction, name: ObjectId, value: bytes) -> Place:
        pack, kind, encoding, offset, region, raw, stored, base = _PLACE.unpack(value)
        folder = _PACK.unpack(bytes(txn.get(pack, db=self._packs) or b""))[0]
        entry = Entry(
            name, Kind(kind), encoding, None if base == _NO_BASE else ObjectId(base.hex()),
            offset, region, raw, stored,
        )  # fmt: skip
        return Place(PackId(pack.hex()), FOLDERS[folder], entry)

    def content(self, name: ObjectId) -> bytes | None:
        """The content of a small object, unproven; None where it is not kept here."""
        with self.reading() as content:
            return content(name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[ObjectId], bytes | None]]:
        """`content`, for many: it takes half the time."""
        with self._begin() as txn:
            get, contents = txn.get, self._contents

            def content(name: ObjectId) -> bytes | None:
                found = get(bytes.fromhex(name), db=contents)
                return None if found is None else bytes(found)

            yield content

    def find(self, key: bytes) -> list[ObjectId]:
        """The objects that have `key`."""
        with self._begin() as txn, txn.cursor(self._keys) as cursor:
            if not cursor.set_key(key[:_MAX_KEY]):
                return []
            return [ObjectId(bytes(value).hex()) for value in cursor.iternext_dup()]

    def ids(self, kind: Kind, prefix: str = "") -> list[ObjectId]:
        """Every object of a kind whose id begins with `prefix` (hex digits)."""
        names: dict[ObjectId, None] = {}
        with self._begin() as txn, txn.cursor(self._objects) as cursor:
            if cursor.set_range(bytes.fromhex(prefix[: len(prefix) // 2 * 2]) or b"\0"):
                for key, value in cursor:
                    name = ObjectId(bytes(key).hex())
                    if name[: len(prefix)] > prefix:
                        break
                    if name.startswith(prefix) and bytes(value)[32] == kind:
                        names[name] = None
        return list(names)

    def expect(self, pack: PackId, folder: str) -> None:
        """Note a pack that is about to be published: should the process end before it is added,
        others know where to look.
        """
        self._write(lambda txn: txn.put(bytes.fromhex(pack), folder.encode(), db=self._expected))

    def expected(self) -> dict[PackId, str]:
        """The packs that were about to be published and have not been added: id -> folder."""
        with self._begin() as txn, txn.cursor(self._expected) as cursor:
            return {PackId(bytes(k).hex()): bytes(v).decode("ascii") for k, v in cursor}

    def same(self, other: Index) -> bool:
        """Whether both hold the same packs, objects, contents and keys."""
        with self._begin() as mine, other._begin() as theirs:
            for one, two in zip(self._tables(), other._tables(), strict=True):
                with mine.cursor(one) as left, theirs.cursor(two) as right:
                    if any(a != b for a, b in zip_longest(left, right)):
                        return False
        return True

    def _tables(self) -> tuple[Any, ...]:
        return self._packs, self._objects, self._contents, self._keys

    def add(self, pack: PackInfo, contents: dict[ObjectId, bytes], keys_of: KeysOf) -> None:
        """Make a pack's objects findable; `contents` are the small ones to keep."""

        def change(txn: lmdb.Transaction) -> None:
            name = bytes.fromhex(pack.id)
            txn.delete(name, db=self._expected)
            commits = sum(entry.kind == Kind.COMMIT for entry in pack.entries)
            row = _PACK.pack(FOLDERS.index(pack.folder), pack.size_bytes, commits)
            txn.put(name, row, db=self._packs)
            for entry in pack.entries:
                base = bytes.fromhex(entry.base) if entry.base else _NO_BASE
                place = _PLACE.pack(
                    name, entry.kind, entry.encoding, entry.offset, entry.region_bytes,
                    entry.raw_bytes, entry.stored_bytes, base,
                )  # fmt: skip
                txn.put(bytes.fromhex(entry.id), place, db=self._objects)
                content = contents.get(entry.id)
                if content is not None:
                    txn.put(bytes.fromhex(entry.id), content, db=self._contents)
                    for key in keys_of(entry.kind, content):
                        txn.put(key[:_MAX_KEY], bytes.fromhex(entry.id), db=self._keys)

        self._write(change)

    def remove(self, packs: set[PackId], keys_of: KeysOf) -> None:
        """Forget packs, and the objects that lay nowhere else."""
        gone = {bytes.fromhex(pack) for pack in packs}

        def change(txn: lmdb.Transaction) -> None:
            with txn.cursor(self._objects) as cursor:
                rows = [(bytes(k), bytes(v)) for k, v in cursor if bytes(v)[:32] in gone]
            for key, value in rows:
                txn.delete(key, value, db=self._objects)
                if txn.get(key, db=self._objects) is None:
                    content = txn.get(key, db=self._contents)
                    for found in keys_of(Kind(value[32]), bytes(content)) if content else ():
                        txn.delete(found[:_MAX_KEY], key, db=self._keys)
                    txn.delete(key, db=self._contents)
            for name in gone:
                txn.delete(name, db=self._packs)

        self._write(change)
