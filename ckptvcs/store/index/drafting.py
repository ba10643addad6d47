"""Make the next edition of an index; the caller has locked its family.

The edition before the newest becomes the next one: it is updated in place from the journals since
its number, so that the cost does not grow with the index.  If a process still reads it, a copy of
the newest edition is updated instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import lmdb

from ckptvcs.store.ids import Kind
from ckptvcs.store.index.editions import Draft, Family, new_draft, spare_draft
from ckptvcs.store.index.journal import Journal, VoidError, append_record, create_journal, void
from ckptvcs.store.index.locked import delete_unused
from ckptvcs.store.index.rows import (
    CONTENTS,
    EXPECTED,
    KEYS,
    MANY,
    MEMBERS,
    OBJECTS,
    PACKS,
    REMOVED,
    KeysOf,
    Row,
    cut_key,
    kind_of,
    load_rows,
    members_of,
    pack_of,
)


def begin_journal(family: Family) -> int:
    """Begin the next journal; return its number.

    From now on, writers append each record of an older journal to this one too.

    Raises:
        OSError: the disk is full.
    """
    editions, journals = family.scan()
    number = max(*editions, *journals, 0, 0) + 1
    create_journal(family.journal(number), family.new)
    if journals:
        announce(family, journals[-1])
    return number


def announce(family: Family, journal: int) -> None:
    """Append an empty record, which makes the readers of a journal look for new files."""
    with contextlib.suppress(OSError, VoidError):
        append_record(family.journal(journal), b"")


def read_journals(family: Family, numbers: Iterable[int]) -> Iterator[Iterator[Row]]:
    """Yield the rows of each journal.  Raises VoidError, OSError."""
    for number in numbers:
        with contextlib.closing(Journal(family.journal(number))) as journal:
            yield from map(load_rows, journal.read())


def draft_after(family: Family, newest: int, root: bytes) -> tuple[Draft, int]:
    """Return a draft, and the number of the first journal that it lacks.

    `newest` and `root` are those of the newest edition.

    Raises:
        lmdb.Error, OSError: the disk is full.
    """
    editions, journals = family.scan()
    for number in reversed([number for number in editions if number < newest]):
        if set(range(number, newest)) <= set(journals):
            draft = spare_draft(family.draft, family.edition(number), root)
            if draft is not None:
                return draft, number
    return new_draft(family.draft, copied=family.edition(newest)), newest


def clean(family: Family, kept: int) -> None:
    """Delete all unused editions except the newest `kept`, and the journals before those.

    The journals become void, so that their readers switch to the newest edition.
    """
    editions, journals = family.scan()
    old = max(0, len(editions) - kept)
    for number in editions[:old]:
        delete_unused(family.edition(number))
    first = min(editions[old:], default=max(journals, default=0))
    for number in journals:
        if number < first:
            void(family.journal(number))
            delete_unused(family.journal(number))


def delete_all(family: Family) -> None:
    """Make all files of an index void, and delete those that no process has open.

    Raises:
        OSError: the file system refuses.
    """
    for number in family.scan()[1]:
        void(family.journal(number))
    clean(family, 0)


def apply_rows(draft: Draft, txn: lmdb.Transaction, rows: Iterable[Row], keys_of: KeysOf) -> None:
    """Write rows into a draft.  Doing so twice has the same effect."""
    tables = draft.tables
    for table, key, value in rows:
        if table == REMOVED:
            _remove(tables, txn, key, keys_of)
            continue
        txn.put(key, value, db=tables[table], dupdata=table in MANY)
        if table == PACKS:
            txn.delete(key, db=tables[EXPECTED])


def _remove(tables: list[Any], txn: lmdb.Transaction, pack: bytes, keys_of: KeysOf) -> None:
    members = txn.get(pack, db=tables[MEMBERS])
    with txn.cursor(tables[OBJECTS]) as cursor:
        for name in members_of(bytes(members or b"")):
            kind = 0
            while cursor.set_range_dup(name, pack):
                place = bytes(cursor.value())
                if pack_of(place) != pack:
                    break
                kind = kind_of(place)
                cursor.delete()
            if not cursor.set_key(name):
                _forget(tables, txn, name, kind, keys_of)
    txn.delete(pack, db=tables[MEMBERS])
    txn.delete(pack, db=tables[PACKS])


def _forget(
    tables: list[Any], txn: lmdb.Transaction, name: bytes, kind: int, keys_of: KeysOf
) -> None:
    """Delete the content and keys of an object that has no copy left."""
    content = txn.get(name, db=tables[CONTENTS])
    if content is not None:
        for key in keys_of(Kind(kind), bytes(content)):
            txn.delete(cut_key(key), name, db=tables[KEYS])
        txn.delete(name, db=tables[CONTENTS])


def forget_expected(draft: Draft, txn: lmdb.Transaction) -> None:
    """Forget packs that were expected when the draft was an edition, and never published."""
    with txn.cursor(draft.tables[EXPECTED]) as cursor:
        while cursor.first():
            cursor.delete()
