"""Rows: the content of an index, as keys and values of six tables and as records of a journal.

    packs      pack id              -> folder, size, commits
    objects    object id            -> places (several packs may hold the same object)
    contents   object id            -> content of small objects that are read often
    keys       key of the caller    -> object ids   ("recipes of these values", "commits of step 7")
    expected   pack id              -> folder, of packs that are about to be published
    members    pack id              -> ids of its objects

A row of REMOVED removes a pack, and with it the objects that have no other copy.
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
"""The tables that may have several values for a key."""
REMOVED = 255

_PLACE = struct.Struct("<32sBBQQQQ32s")  # pack, kind, encoding, offset, region, raw, stored, base
_PACK = struct.Struct("<BQI")  # folder, size, commits
_ROW = struct.Struct("<BHI")  # table, bytes of the key, of the value
_NO_BASE = bytes(32)
_MAX_KEY = 500

ROTTEN = (lmdb.Error, ValueError, IndexError, struct.error)
"""The exceptions of reading or writing an index that is damaged or missing."""

Row = tuple[int, bytes, bytes]
KeysOf = Callable[[Kind, bytes], Iterable[bytes]]
"""A function of the caller that returns the keys by which an object can be found."""


class Place(NamedTuple):
    """One copy of an object: its pack and its entry there."""

    pack: PackId
    folder: str
    entry: Entry


def cut_key(key: bytes) -> bytes:
    """Return a key as the index stores it.  Callers must tell longer keys apart themselves."""
    return key[:_MAX_KEY]


def pack_of(place: bytes) -> bytes:
    """Return the pack in a row of `objects`."""
    return place[:32]


def kind_of(place: bytes) -> int:
    """Return the kind in a row of `objects`."""
    return place[32]


def members_of(row: bytes) -> Iterator[bytes]:
    """Yield the objects in a row of `members`."""
    return (row[at : at + 32] for at in range(0, len(row), 32))


def load_pack(row: bytes) -> tuple[int, int, int]:
    """Return number of the folder, size and number of commits of a pack.  Raises struct.error."""
    return _PACK.unpack(row)


def folder_of(row: bytes) -> str:
    """Return the folder in a row of `packs`.  Raises IndexError."""
    return FOLDERS[row[0]]


def load_place(name: ObjectId, row: bytes, folder: str) -> Place:
    """Parse a row of `objects`.  Raises struct.error, ValueError."""
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
    """Yield the rows of a pack and of its objects."""
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
    """Yield the rows of the content and the keys of a small object that is read often."""
    member = bytes.fromhex(name)
    yield CONTENTS, member, content
    for key in keys_of(kind, content):
        yield KEYS, cut_key(key), member


def dump_rows(rows: Iterable[Row]) -> bytes:
    """Return rows as one record of a journal."""
    parts: list[bytes] = []
    for table, key, value in rows:
        parts += (_ROW.pack(table, len(key), len(value)), key, value)
    return b"".join(parts)


def load_rows(data: bytes) -> Iterator[Row]:
    """Yield the rows of a record.  Raises ValueError, struct.error if it is damaged."""
    at, size = 0, _ROW.size
    while at < len(data):
        table, key_bytes, value_bytes = _ROW.unpack_from(data, at)
        start = at + size
        middle = start + key_bytes
        at = middle + value_bytes
        if at > len(data) or not (table < len(TABLES) or table == REMOVED):
            raise ValueError("a record of the index is damaged")
        yield table, data[start:middle], data[middle:at]
