"""The rows of the journals after an edition, in memory, on top of that edition."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import groupby

from ckptvcs.store.ids import Kind
from ckptvcs.store.index.editions import Edition
from ckptvcs.store.index.rows import (
    CONTENTS,
    EXPECTED,
    KEYS,
    MANY,
    MEMBERS,
    OBJECTS,
    PACKS,
    REMOVED,
    TABLES,
    Row,
    kind_of,
    members_of,
    pack_of,
)


class Recent:
    """An edition and the rows after it; the caller holds `forking.using`."""

    def __init__(self, base: Edition) -> None:
        self.base = base
        self._get, self._tables, self._cursor = base.txn.get, base.tables, base.cursors[OBJECTS]
        self._one: list[dict[bytes, bytes]] = [{} for _ in TABLES]
        # A single value is stored without a dict: merging packs adds very many keys.
        self._many: list[dict[bytes, bytes | dict[bytes, None]]] = [{} for _ in TABLES]
        self._places = self._many[OBJECTS]
        self._gone: set[bytes] = set()  # packs that were removed
        self._lost: set[bytes] = set()  # objects without any other copy
        self._met: set[bytes] = set()  # expected packs that were published
        # For each table, the keys that the edition still has but that were removed.
        self._hidden = [self._gone for _ in TABLES]
        self._hidden[CONTENTS], self._hidden[EXPECTED] = self._lost, self._met

    def apply(self, rows: Iterable[Row]) -> None:
        """Apply rows.  After an interruption, the same rows can be applied again."""
        for table, key, value in rows:
            if table in MANY:
                self._put(self._many[table], key, value)
                if table == OBJECTS:
                    self._lost.discard(key)
            elif table == REMOVED:
                self._remove(key)
            else:
                self._one[table][key] = value
                if table == PACKS:
                    self._gone.discard(key)
                    self._one[EXPECTED].pop(key, None)
                    self._met.add(key)

    @staticmethod
    def _put(many: dict[bytes, bytes | dict[bytes, None]], key: bytes, value: bytes) -> None:
        present = many.setdefault(key, value)
        if isinstance(present, dict):
            present[value] = None
        elif present != value:
            many[key] = {present: None, value: None}

    def _remove(self, pack: bytes) -> None:
        members = self._one[MEMBERS].get(pack) or self.base.get(MEMBERS, pack) or b""
        self._gone.add(pack)
        for name in members_of(members):
            others = [
                place for place in _values(self._places.pop(name, None)) if pack_of(place) != pack
            ]
            for place in others:
                self._put(self._places, name, place)
            if not self.places(name):
                self._lost.add(name)
                self._one[CONTENTS].pop(name, None)
        self._one[PACKS].pop(pack, None)
        self._one[MEMBERS].pop(pack, None)

    def get(self, table: int, key: bytes) -> bytes | None:
        """Return the value of a key, in a table with one value for each key."""
        value = self._one[table].get(key)
        if value is None and key not in self._hidden[table]:
            value = self._get(key, None, self._tables[table])
        return value

    def places(self, name: bytes) -> list[bytes]:
        """Return the rows of `objects` for an object."""
        cursor = self._cursor
        places = [*cursor.iternext_dup()] if cursor.set_key(name) else []
        recent = _values(self._places.get(name))
        if self._gone:
            places = [place for place in places if pack_of(place) not in self._gone]
        return sorted({*places, *recent}) if recent else places

    def find(self, key: bytes) -> list[bytes]:
        """Return the objects of a key of `keys`."""
        names, recent = self.base.values(KEYS, key), _values(self._many[KEYS].get(key))
        if recent:
            names = sorted({*names, *recent})
        return [name for name in names if name not in self._lost] if self._lost else names

    def objects(self, kind: Kind, start: bytes) -> Iterator[bytes]:
        """Yield the sorted objects of a kind, from the id `start` on."""
        for name, place in self.rows(OBJECTS, start):
            if kind_of(place) == kind:
                yield name

    def rows(self, table: int, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield the sorted keys of a table from `start` on, with their values."""
        if table in MANY:
            items = self._many[table].items()
            more = [(key, value) for key, values in items for value in _values(values)]
        else:
            more = [*self._one[table].items()]
        added = sorted(row for row in more if row[0] >= start)
        kept = (row for row in self.base.rows(table, start) if not self._is_hidden(table, *row))
        if table == KEYS:
            added = [row for row in added if row[1] not in self._lost]
        return (row for row, _ in groupby(heapq.merge(kept, added)))

    def _is_hidden(self, table: int, key: bytes, value: bytes) -> bool:
        if table == OBJECTS:
            return pack_of(value) in self._gone
        if table == KEYS:
            return value in self._lost
        return key in self._hidden[table] or key in self._one[table]


def _values(stored: bytes | dict[bytes, None] | None) -> Iterable[bytes]:
    return (stored,) if isinstance(stored, bytes) else stored or ()
