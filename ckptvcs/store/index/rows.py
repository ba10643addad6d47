"""Rows: what an index says of packs, as keys and values of six tables, and as records of a journal.

    packs      pack id              -> folder, size, commits
    objects    object id            -> places (several packs may hold the same object)
    contents   object id            -> content of small objects that are read often
    keys       key of the caller    -> object ids   ("recipes of these values", "commits of step 7")
    expected   pack id              -> folder, of packs that are about to be published
    members    pack id              -> ids of its objects

A row of REMOVED names a pack whose rows are to go, and with them all that lay in no other pack.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import lmdb

from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.pack import FOLDERS, Entry, PackInfo

PACKS, OBJECTS, CONTENTS, KEYS, EXPECTED, MEMBERS = range(6)
TABLES = (b"packs", b"objects", b"contents", b"keys", b"expected", b"members")
MANY = frozenset({OBJECTS, KEYS})
"""The tables with several values for a key."""
REMOVED = 255

_PLACE = struct.Struct("<32sBBQQQQ32s")  # pack, kind, encoding, offset, region, raw, stored, base
_PACK = struct.Struct("<BQI")  # folder, size, commits
_ROW = struct.Struct("<BHI")  # table, bytes of the key, of the value
_NO_BASE = bytes(32)
_MAX_KEY = 500

ROTTEN = (lmdb.Error, ValueError, IndexError, struct.error)
"""What reading or writing an index may raise: it is rotten, or there is none."""

Row = tuple[int, bytes, bytes]
KeysOf = Callable[[Kind, bytes], Iterable[bytes]]
"""What an object can be found by, besides its id; made by the caller, opaque to the index."""


class Place(NamedTuple):
    """One copy of an object: the pack it lies in and its entry there."""

    pack: PackId
    folder: str
    entry: Entry


def cut_key(key: bytes) -> bytes:
    """A key as the index has it; what is longer is told apart by whoever asks."""
    return key[:_MAX_KEY]


def pack_of(place: bytes) -> bytes:
    """The pack of a row of `objects`."""
    return place[:32]


def kind_of(place: bytes) -> int:
    """The kind of the object of a row of `objects`."""
    return place[32]


def members_of(row: bytes) -> Iterator[bytes]:
    """The objects of a row of `members`."""
    return (row[at : at + 32] for at in range(0, len(row), 32))


def load_pack(row: bytes) -> tuple[int, int, int]:
    """A row of `packs`: its folder as a number, size, number of commits.  Raises struct.error."""
    return _PACK.unpack(row)


def folder_of(row: bytes) -> str:
    """The folder of a row of `packs`.  Raises IndexError."""
    return FOLDERS[row[0]]


def load_place(name: ObjectId, row: bytes, folder: str) -> Place:
    """A row of `objects`.  Raises struct.error, ValueError."""
    pack, kind, encoding, offset, region, raw, stored, base = _PLACE.unpack(row)
    entry = Entry(
        name,
        Kind(kind),
        encoding,
        None if base == _NO_BASE else ObjectId(base.hex()),
        offset,
        region,
        raw,
        stored,
    )
    return Place(PackId(pack.hex()), folder, entry)


def rows_of_pack(info: PackInfo) -> Iterator[Row]:
    """The rows of a pack and of the places of its objects."""
    pack = bytes.fromhex(info.id)
    commits = sum(entry.kind == Kind.COMMIT for entry in info.entries)
    yield PACKS, pack, _PACK.pack(FOLDERS.index(info.folder), info.size_bytes, commits)
    for entry in info.entries:
        base = bytes.fromhex(entry.base) if entry.base else _NO_BASE
        place = _PLACE.pack(
            pack,
            entry.kind,
            entry.encoding,
            entry.offset,
            entry.region_bytes,
            entry.raw_bytes,
            entry.stored_bytes,
            base,
        )
        yield OBJECTS, bytes.fromhex(entry.id), place
    names = dict.fromkeys(entry.id for entry in info.entries)
    yield MEMBERS, pack, b"".join(bytes.fromhex(name) for name in names)


def rows_of_content(name: ObjectId, kind: Kind, content: bytes, keys_of: KeysOf) -> Iterator[Row]:
    """The rows of a small object that is read often, and of what it is found by."""
    key = bytes.fromhex(name)
    yield CONTENTS, key, content
    for found in keys_of(kind, content):
        yield KEYS, cut_key(found), key


def dump_rows(rows: Iterable[Row]) -> bytes:
    """Rows as one record of a journal."""
    parts: list[bytes] = []
    for table, key, value in rows:
        parts += (_ROW.pack(table, len(key), len(value)), key, value)
    return b"".join(parts)


def load_rows(data: bytes) -> Iterator[Row]:
    """The same back, one by one.  Raises ValueError, struct.error: it is no such record."""
    at, size = 0, _ROW.size
    while at < len(data):
        table, key_bytes, value_bytes = _ROW.unpack_from(data, at)
        start = at + size
        middle = start + key_bytes
        at = middle + value_bytes
        if at > len(data) or not (table < len(TABLES) or table == REMOVED):
            raise ValueError("a record of the index is damaged")
        yield table, data[start:middle], data[middle:at]
