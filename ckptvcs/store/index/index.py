"""Index: what the packs hold, in editions of LMDB files and journals of what came after them.

Nothing here is the truth.  Everything can be rebuilt from the tables of contents of the packs; a
value that turns out wrong is noticed because every object is checked against its id.

Reading takes the newest edition there is, and what the journals from its number on say.
Writing appends to the newest journal, and now and then makes the next edition: one process at a
time, for which nobody waits.  Where none can be made, or read, a process has one of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

import lmdb

from ckptvcs.store import forking
from ckptvcs.store.ids import Kind, ObjectId, PackId
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
from ckptvcs.store.index.following import Follower, close
from ckptvcs.store.index.locked import alone
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
    dump_rows,
    folder_of,
    load_pack,
    load_place,
    load_rows,
    pack_of,
)

__all__ = ["ROTTEN", "Index", "KeysOf", "Place", "Records"]

Records = Callable[[], Iterable[Iterable[Row]]]
"""The rows of all packs that there are when it is called."""

JOURNAL_BYTES = 1 << 17  # of records, before the next edition is made
ROWS_PER_WRITE = 1024  # their pages are in memory, and then free for the next rows
_MEMORY = [folder for folder in ("/dev/shm",) if os.access(folder, os.W_OK)]


class Index:
    """What the files of one name say; it follows them as they are written."""

    def __init__(self, name: Path, keys_of: KeysOf) -> None:
        """Nothing is opened before it is asked."""
        self._family, self._keys_of = Family.of(name), keys_of
        self.follower = Follower(self._family)
        self._read = self.follower.read
        self._enough = JOURNAL_BYTES
        self._room_is_wanted = False
        weakref.finalize(self, close, self.follower).atexit = False

    @property
    def turn(self) -> int:
        """How often files were opened."""
        return self.follower.turn

    def look_again(self) -> None:
        """Open it; leave files whose names lead elsewhere by now.

        Raises:
            lmdb.Error, ValueError, OSError: no edition can be used.
        """
        with forking.using:
            self.follower.look_again()

    def distrust(self) -> None:
        """It said something that cannot be: what is not made anew is not believed again."""
        with forking.using:
            self.follower.distrust()

    def close(self) -> None:
        """Let the files go; it can be asked again."""
        close(self.follower)

    def begin(self) -> lmdb.Transaction:
        """A transaction on the edition alone."""
        with forking.using:
            env = self._read().base.env
            assert env is not None
            return env.begin()

    # -- writing ---------------------------------------------------------------------------------

    def _say(self, rows: Iterable[Row]) -> None:
        """Let everybody know rows; where there is no room for them, this process alone."""
        record = dump_rows(rows)
        with forking.using:
            self._read()
            told = self.follower.append(record)
            recent = self._read()
            if not told:
                recent.apply(load_rows(record))
            elif not self.follower.own and self.follower.unread_bytes > self._enough:
                try:
                    self.make_edition(lambda _: None)
                    self._enough = JOURNAL_BYTES
                except (OSError, *ROTTEN):  # somebody is at it, or there is no room
                    self._enough *= 2

    def make_edition(self, change: Callable[[lmdb.Transaction], object]) -> None:
        """Make the next edition: the last one, what the journals say, and `change`.

        Raises:
            BlockingIOError: another process does so.
            lmdb.Error, ValueError, OSError: the last one is rotten, or there is no room.
        """
        with forking.using, alone(self._family.lock):
            if self.follower.own:
                raise lmdb.InvalidError("there is no edition that others have")
            root = self.follower.open().base.root
            draft, first = draft_after(self._family, self.follower.number, root)
            try:
                number = begin_journal(self._family)
                draft.write(lambda txn: forget_expected(draft, txn))
                self._add(draft, read_journals(self._family, range(first, number)))
                draft.write(change)
                draft.publish(self._family.edition(number))
            finally:
                draft.close()
            announce(self._family, number)
            self.follower.open()
            clean(self._family, 2)

    def rebuild(self, records: Records, *, anew: bool) -> None:
        """Make an edition of the packs alone; unless it is to be made `anew`, another one will
        do that somebody has made meanwhile.

        Raises:
            lmdb.Error, OSError: there is no room anywhere.
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
                clean(self._family, 0)  # there may be no room for two
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
        """Go on with an edition for this process alone, which no folder has: of the packs, and of
        what the journals will say.  It `awaits` the next one of all; or else, with `delete`, makes
        room of those that there are.

        Raises:
            lmdb.Error, OSError: there is no room anywhere.
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
                    self.follower.go_on(Recent(base), last, told=not delete, awaits=awaits)
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

    # -- asking ----------------------------------------------------------------------------------

    def packs(self) -> dict[PackId, tuple[str, int]]:
        """Every indexed pack: its folder and size in bytes."""
        with forking.using:
            return {
                PackId(key.hex()): (folder_of(row), load_pack(row)[1])
                for key, row in self._read().rows(PACKS)
            }

    def pack_size(self, pack: PackId) -> int:
        """Bytes of an indexed pack; 0 where it is not known."""
        return self._pack(pack)[1]

    def pack_share(self, pack: PackId) -> int:
        """Bytes of an indexed pack for each commit in it."""
        _, size, commits = self._pack(pack)
        return size // (commits or 1)

    def _pack(self, pack: PackId) -> tuple[int, int, int]:
        with forking.using:
            row = self._read().get(PACKS, bytes.fromhex(pack))
        return (0, 0, 0) if row is None else load_pack(row)

    def places(self, name: ObjectId) -> list[Place]:
        """Where an object lies; empty where it is not known."""
        with forking.using:
            recent = self._read()
            return [
                load_place(name, row, folder_of(recent.get(PACKS, pack_of(row)) or b""))
                for row in recent.places(bytes.fromhex(name))
            ]

    def content(self, name: ObjectId) -> bytes | None:
        """The content of a small object, unproven; None where it is not kept here."""
        with forking.using:
            return self._read().get(CONTENTS, bytes.fromhex(name))

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[ObjectId], bytes | None]]:
        """`content`, for many: it takes half the time."""
        with forking.using:
            get = self._read().get
            yield lambda name: get(CONTENTS, bytes.fromhex(name))

    def find(self, key: bytes) -> list[ObjectId]:
        """The objects that have `key`."""
        with forking.using:
            return [ObjectId(name.hex()) for name in self._read().find(cut_key(key))]

    def ids(self, kind: Kind, prefix: str = "") -> list[ObjectId]:
        """Every object of a kind whose id begins with `prefix` (hex digits)."""
        names: dict[ObjectId, None] = {}
        start = bytes.fromhex(prefix[: len(prefix) // 2 * 2])
        with forking.using:
            for key in self._read().objects(kind, start):
                name = ObjectId(key.hex())
                if name[: len(prefix)] > prefix:
                    break
                if name.startswith(prefix):
                    names[name] = None
        return [*names]

    def expected(self) -> dict[PackId, str]:
        """The packs that were about to be published and have not been added: id -> folder."""
        with forking.using:
            rows = self._read().rows(EXPECTED)
            return {PackId(key.hex()): value.decode("ascii") for key, value in rows}

    def same(self, other: Index) -> bool:
        """Whether both hold the same packs, objects, contents and keys."""
        with forking.using:
            mine, theirs = self._read(), other._read()
            return all(
                one == two
                for table in (PACKS, OBJECTS, CONTENTS, KEYS)
                for one, two in zip_longest(mine.rows(table), theirs.rows(table))
            )

    # -- telling ---------------------------------------------------------------------------------

    def expect(self, pack: PackId, folder: str) -> None:
        """Note a pack that is about to be published: should the process end before it is added,
        others know where to look.
        """
        self._say([(EXPECTED, bytes.fromhex(pack), folder.encode())])

    def add(self, rows: Iterable[Row]) -> None:
        """Make a pack's objects findable."""
        self._say(rows)

    def remove(self, packs: set[PackId]) -> None:
        """Forget packs, and the objects that lay nowhere else."""
        self._say((REMOVED, bytes.fromhex(pack), b"") for pack in packs)
