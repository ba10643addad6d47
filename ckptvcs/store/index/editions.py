"""The files of an index: editions, each an LMDB file that nobody changes once it has its name.

    <name>-<host>-<boot>-e<number>.lmdb    an edition
    <name>-<host>-<boot>-j<number>         the journal of what came after it, and after older ones
    <name>-<host>-<boot>-draft, -new       the next ones, until they have their names
    <name>-<host>-<boot>-lock              whoever makes one has it locked

LMDB's own locks are not used: who waits for them waits in C, without an end.  An edition is read
by whoever shares the lock of its file, and is deleted, or becomes the draft of a later one, once
nobody does.

Each start of a machine begins its own files: nothing is synced, so that after a power cut their
pages may be of any age, and LMDB trusts them; and two machines on one file system do not share one,
which would have to be mapped by both.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from ckptvcs.hashing import hex_hash
from ckptvcs.store.forking import in_child
from ckptvcs.store.host import boot_id, host_name
from ckptvcs.store.index.locked import LockedFile, delete_unused, let_others_write
from ckptvcs.store.index.rows import MANY, TABLES

_FIRST_MAP_BYTES = 1 << 24
_META = struct.Struct("<40xI92xQ")  # of LMDB 0.9: page size, last page used
_DIGITS = 8  # of the hashes of a host and of its start
_VERSION = b"ckptvcs index 5"

_open: dict[tuple[int, int], Edition] = {}
_drafts: weakref.WeakSet[Draft] = weakref.WeakSet()
_left: list[object] = []  # what a thread of the parent was using: never to be touched again


@dataclass(frozen=True)
class Family:
    """The files of one index."""

    folder: Path
    prefix: str
    host: str

    @classmethod
    def of(cls, name: Path) -> Family:
        """Those of an index of this name, of this start of this machine."""
        host = f"{name.name}-{_short(host_name())}-"
        return cls(name.parent, f"{host}{_short(boot_id())}-", host)

    def edition(self, number: int) -> Path:
        """The file of an edition."""
        return self.folder / f"{self.prefix}e{number}.lmdb"

    def journal(self, number: int) -> Path:
        """The journal that came with an edition."""
        return self.folder / f"{self.prefix}j{number}"

    @property
    def draft(self) -> Path:
        """The next edition."""
        return self.folder / f"{self.prefix}draft"

    @property
    def new(self) -> Path:
        """The next journal."""
        return self.folder / f"{self.prefix}new"

    @property
    def lock(self) -> Path:
        """What is locked by whoever makes them."""
        return self.folder / f"{self.prefix}lock"

    def scan(self) -> tuple[list[int], list[int]]:
        """The numbers of the editions, and of the journals, in order.

        Raises:
            OSError: the folder cannot be listed.
        """
        own = re.compile(re.escape(self.prefix) + r"(?:e([0-9]{1,15})\.lmdb|j([0-9]{1,15}))\Z")
        nothing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with nothing, os.scandir(self.folder) as entries:
            found = [match for entry in entries if (match := own.match(entry.name))]
            editions = sorted(int(match[1]) for match in found if match[1])
            return editions, sorted(int(match[2]) for match in found if match[2])
        return [], []

    def delete_older(self) -> None:
        """Delete the files of earlier starts of this machine that nobody has open."""
        with contextlib.suppress(OSError):
            for entry in [*os.scandir(self.folder)]:
                name = entry.name
                if name.startswith(self.host) and not name.startswith(self.prefix):
                    delete_unused(Path(entry.path))


def _short(text: str) -> str:
    return hex_hash(text.encode())[:_DIGITS]


def newest_file(name: Path) -> Path:
    """The newest edition of an index.  Raises OSError, ValueError: there is none."""
    family = Family.of(name)
    return family.edition(max(family.scan()[0]))


class Edition:
    """An open edition: every index of this process that reads it has the same one."""

    def __init__(self, file: LockedFile) -> None:
        """Raises lmdb.Error, OSError: it is rotten, or the file system refuses."""
        self._file, self._users = file, 0
        _check_length(file.descriptor)
        self.env: lmdb.Environment | None = _environment(file.path, readonly=True, lock=False)
        try:
            self.txn = self.env.begin()
            self.root = _root(self.txn)
            self.tables = _open_tables(self.env, self.txn, create=False)
            self.cursors = [self.txn.cursor(table) for table in self.tables]
        except BaseException:
            self.env.close()
            raise

    def get(self, table: int, key: bytes) -> bytes | None:
        """The value of a key."""
        found: bytes | None = self.txn.get(key, None, self.tables[table])
        return found

    def values(self, table: int, key: bytes) -> list[bytes]:
        """All values of a key."""
        cursor = self.cursors[table]
        return [*cursor.iternext_dup()] if cursor.set_key(key) else []

    def rows(self, table: int, start: bytes = b"") -> Iterable[tuple[bytes, bytes]]:
        """The keys from `start` on, in order, with their values."""
        with self.txn.cursor(self.tables[table]) as cursor:
            if cursor.set_range(start) if start else cursor.first():
                yield from cursor

    def use(self) -> Edition:
        """Count one more who uses it."""
        self._users += 1
        return self

    def leave(self) -> None:
        """Count one less: with the last it is closed."""
        self._users -= 1
        if self._users == 0 and self.env is not None:
            _open.pop(self._file.identity, None)
            self._close()

    def _close(self) -> None:
        env, self.env = self.env, None
        if env is not None:
            env.close()
        self._file.close()

    def drop(self, *, idle: bool) -> None:
        """In a forked child: it is the parent's.  Only an `idle` environment can be closed."""
        if idle:
            self._close()
        else:
            _left.append((self.env, self.txn, self.tables, self.cursors))
            self.env = None


def open_edition(path: Path) -> Edition:
    """An edition, used once more; the caller holds `forking.using`.

    Raises:
        FileNotFoundError, BlockingIOError: it has become a draft meanwhile, or is deleted.
        lmdb.Error, OSError: it is rotten, or the file system refuses.
    """
    file = LockedFile(path)
    try:
        known = _open.get(file.identity)
        if known is None:
            known = Edition(file)
            _open[file.identity] = known
            return known.use()
    except BaseException:
        file.close()
        raise
    file.close()
    return known.use()


class Draft:
    """The next edition, which nobody else sees."""

    def __init__(self, file: LockedFile, *, root: bytes | None = None) -> None:
        """A file that is locked for this process alone; an empty one gets a `root`, which all that
        come from it have in common.

        Raises:
            lmdb.Error, OSError: it is rotten, or the file system refuses.
        """
        self._file, self._published = file, False
        if root is None:
            _check_length(file.descriptor)
        self._env: lmdb.Environment | None = _environment(
            file.path,
            lock=False,
            sync=False,
            metasync=False,
            map_size=max(_FIRST_MAP_BYTES, 2 * os.fstat(file.descriptor).st_size),
        )
        _drafts.add(self)
        try:
            with self._env.begin(write=True) as txn:
                self.tables = _open_tables(self._env, txn, create=True)
                if root is not None:
                    txn.put(b"version", _VERSION)
                    txn.put(b"root", root)
                self.root = _root(txn)
        except BaseException:
            self.close()
            raise

    def write(self, change: Callable[[lmdb.Transaction], object]) -> None:
        """Run `change` in one transaction, in a larger map if this one is full."""
        while True:
            assert self._env is not None
            try:
                with self._env.begin(write=True) as txn:
                    change(txn)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(self._env.info()["map_size"] * 2)

    def publish(self, path: Path) -> None:
        """Let it be an edition.  Raises OSError."""
        self._close_environment()
        self._file.share()  # before others see it: no reader waits for this process
        self._file.path.rename(path)
        self._published = True

    def _close_environment(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def close(self) -> None:
        """Let it go; nothing stays of it, unless it was published."""
        self._close_environment()
        if not self._published:
            with contextlib.suppress(OSError):
                self._file.path.unlink(missing_ok=True)
        self._file.close()

    def drop(self, *, idle: bool) -> None:
        """In a forked child: it is the parent's.  Only an `idle` environment can be closed."""
        if not idle:
            _left.append(self._env)
            self._env = None
        self._close_environment()


def new_draft(path: Path, *, copied: Path | None = None, root: bytes | None = None) -> Draft:
    """A draft that begins empty with a `root`, or as a copy of an edition; of what an earlier one
    left behind nothing stays.

    Raises:
        lmdb.Error, OSError: the copied one is rotten, or the file system refuses.
    """
    path.unlink(missing_ok=True)
    file = LockedFile(path, alone=True, create=True)
    try:
        let_others_write(file.descriptor, path.parent)
        if copied is not None:
            shutil.copyfile(copied, path)
        return Draft(file, root=root)
    except BaseException:
        file.close()
        path.unlink(missing_ok=True)
        raise


def spare_draft(path: Path, spare: Path, root: bytes) -> Draft | None:
    """An edition that nobody uses any more as a draft, if it has this `root`."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError, lmdb.Error):
        file = LockedFile(spare, alone=True)
        try:
            spare.rename(path)
            file.path = path
            draft = Draft(file)
            if draft.root == root:
                return draft
            draft.close()
        except BaseException:
            file.close()
            raise
    return None


def _environment(path: Path, **options: Any) -> lmdb.Environment:
    if int(lmdb.__version__.partition(".")[0]) >= 3:
        options["lib_version"] = 0
    options.setdefault("map_size", max(1, path.stat().st_size))
    return lmdb.open(str(path), subdir=False, max_dbs=len(TABLES), readahead=False, **options)


def _root(txn: lmdb.Transaction) -> bytes:
    """What editions that come from one another have in common.

    Raises:
        lmdb.InvalidError: another program wrote it.
    """
    if txn.get(b"version") != _VERSION:
        raise lmdb.InvalidError("the index has another version")
    return bytes(txn.get(b"root") or b"")


def _open_tables(env: lmdb.Environment, txn: lmdb.Transaction, *, create: bool) -> list[Any]:
    return [
        env.open_db(name, txn, create=create, dupsort=number in MANY)
        for number, name in enumerate(TABLES)
    ]


def _check_length(descriptor: int) -> None:
    """LMDB maps its file and trusts it: reading behind the end of a cut one kills the process.

    Raises:
        lmdb.CorruptedError: the file is shorter than its meta pages say.
        OSError: it cannot be read.
    """
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, _META.size, 0)
    if len(head) < _META.size:
        raise lmdb.CorruptedError("the index is cut off")
    page, last = _META.unpack(head)
    if not 512 <= page <= 1 << 16:
        raise lmdb.CorruptedError("the index is damaged")
    second = os.pread(descriptor, _META.size, page)
    if len(second) == _META.size:
        last = max(last, _META.unpack(second)[1])
    if (last + 1) * page > size:
        raise lmdb.CorruptedError("the index is cut off")


def _forget(idle: bool) -> None:
    """The environments are the parent's: LMDB opens no file twice in a process, of which a child
    counts as one.
    """
    for edition in [*_open.values()]:
        edition.drop(idle=idle)
    for draft in [*_drafts]:
        draft.drop(idle=idle)
    _open.clear()


in_child(_forget)
