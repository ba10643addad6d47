"""Index: the content of the packs, in LMDB editions and in journals of later changes.

The index is a cache: it can be rebuilt from the tables of contents of the packs.  Wrong values are
noticed, because every object is checked against its id.

Reading combines the newest edition with the journals from its number on.  Writing appends to the
newest journal, and sometimes makes the next edition.  Only one process at a time does so, and no
other waits for it.  A process that cannot make or read an edition uses a private one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import lmdb

from ckptvcs.store import forking
from ckptvcs.store.index.drafting import (
    announce,
    apply_rows,
    begin_journal,
    clean,
    delete_all,
    draft_after,
    forget_expected,
    read_journals,
)
from ckptvcs.store.index.editions import Draft, Family, new_draft, open_edition
from ckptvcs.store.index.following import Follower
from ckptvcs.store.index.locked import alone
from ckptvcs.store.index.recent import Recent
from ckptvcs.store.index.rows import ROTTEN, KeysOf, Row, dump_rows, load_rows

T = TypeVar("T")

Records = Callable[[], Iterable[Iterable[Row]]]
"""A function that returns the rows of all packs that exist when it is called."""

JOURNAL_BYTES = 1 << 17  # bytes of records after which the next edition is made
ROWS_PER_WRITE = 1024  # rows in one transaction: their pages stay in memory until it ends
_MEMORY = [folder for folder in ("/dev/shm",) if os.access(folder, os.W_OK)]


class Index:
    """The content of the index files of one name, which other processes keep writing."""

    def __init__(self, name: Path, keys_of: KeysOf) -> None:
        """Open nothing yet; the first question does."""
        self._family, self._keys_of = Family.of(name), keys_of
        self.follower = Follower(self._family)
        self._read = self.follower.read
        self._enough = JOURNAL_BYTES
        self._room_is_wanted = False
        weakref.finalize(self, self.follower.close).atexit = False

    # -- writing ---------------------------------------------------------------------------------

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to the journal; if that fails, only this process knows them."""
        record = dump_rows(rows)
        with forking.using:
            self._read()
            is_appended = self.follower.append(record)
            recent = self._read()
            if not is_appended:
                recent.apply(load_rows(record))
            elif not self.follower.own and self.follower.unread_bytes > self._enough:
                try:
                    self.make_edition()
                    self._enough = JOURNAL_BYTES
                except (OSError, *ROTTEN):  # another process does so, or the disk is full
                    self._enough *= 2

    def make_edition(self) -> None:
        """Make the next edition from the newest one and the journals.

        Raises:
            BlockingIOError: another process does so.
            lmdb.Error, ValueError, OSError: the newest one is damaged, or the disk is full.
        """
        with forking.using, alone(self._family.lock):
            if self.follower.own:
                raise lmdb.InvalidError("the index of this process is private")
            root = self.follower.open().base.root
            draft, first = draft_after(self._family, self.follower.number, root)
            with contextlib.closing(draft):
                number = begin_journal(self._family)
                draft.write(lambda txn: forget_expected(draft, txn))
                self._add(draft, read_journals(self._family, range(first, number)))
                draft.publish(self._family.edition(number))
            announce(self._family, number)
            self.follower.open()
            clean(self._family, 2)

    def rebuild(self, records: Records, *, anew: bool) -> None:
        """Make an edition from the packs.

        Unless `anew`, a usable edition that another process has made meanwhile is enough.

        Raises:
            lmdb.Error, OSError: no disk has room for it.
        """
        if self._room_is_wanted:
            self.move_out(records, delete=True)
            return
        try:
            self._rebuild(records, anew=anew)
        except (OSError, *ROTTEN):
            self.move_out(records, awaits=not anew)

    def _rebuild(self, records: Records, *, anew: bool) -> None:
        self._family.folder.mkdir(parents=True, exist_ok=True)
        with alone(self._family.lock):
            if not anew:
                with forking.using, contextlib.suppress(OSError, *ROTTEN):
                    self.follower.open()
                    return
                clean(self._family, 0)  # the disk may not have room for two
            number = begin_journal(self._family)
            self._fill(self._family.draft, self._family.edition(number), records)
            announce(self._family, number)
            with forking.using:
                self.follower.open()
            clean(self._family, 1)
            self._family.delete_older()

    def _fill(self, path: Path, target: Path, records: Records) -> None:
        with forking.using:
            draft = new_draft(path, root=os.urandom(16))
        try:
            self._add(draft, records())
            with forking.using:
                draft.publish(target)
        finally:
            with forking.using:
                draft.close()

    def _add(self, draft: Draft, records: Iterable[Iterable[Row]]) -> None:
        rows = chain.from_iterable(records)
        while batch := [*islice(rows, ROWS_PER_WRITE)]:
            with forking.using:
                draft.write(lambda txn: apply_rows(draft, txn, batch, self._keys_of))

    def move_out(self, records: Records, *, awaits: bool = False, delete: bool = False) -> None:
        """Continue with a private edition, made from the packs, in a deleted temporary folder.

        With `awaits`, the next shared edition replaces it.  With `delete`, the shared files are
        deleted to free their room.

        Raises:
            lmdb.Error, OSError: no disk has room for it.
        """
        last, problem = 0, Exception()
        with contextlib.suppress(OSError):
            last = max(self._family.scan()[1], default=0)
        for folder in (None, *_MEMORY):
            scratch = None
            try:
                scratch = Path(tempfile.mkdtemp(prefix="ckpt-index-", dir=folder))
                self._fill(scratch / "draft", scratch / "index", records)
                with forking.using:
                    base = open_edition(scratch / "index")
                    self.follower.go_on(Recent(base), last, follow=not delete, awaits=awaits)
                break
            except (OSError, *ROTTEN) as error:
                problem = error
            finally:
                if scratch is not None:
                    shutil.rmtree(scratch, ignore_errors=True)
        else:
            raise problem
        if delete:
            self._room_is_wanted = True
            with contextlib.suppress(OSError):
                delete_all(self._family)

    def ask(self, question: Callable[[Recent], T]) -> T:
        """Return the answer of the current content.

        Raises:
            lmdb.Error, ValueError, OSError: no edition can be used.
        """
        with forking.using:
            return question(self._read())
