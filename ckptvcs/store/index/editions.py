"""The files of an index: editions, which are LMDB files that never change once they have a name.

    <name>-<host>-<boot>-e<number>.lmdb    an edition
    <name>-<host>-<boot>-j<number>         the journal of the changes after it
    <name>-<host>-<boot>-draft, -new       the next edition and journal, before they get a name
    <name>-<host>-<boot>-lock              locked by the process that makes the next ones

LMDB's own locks are not used, because waiting for them in C cannot be interrupted.  A reader of an
edition shares the lock of its file.  An edition that nobody reads may be deleted, or may become the
draft of a later one.

Each boot of a machine begins new files.  They are never synced: after a power cut, their pages may
be of any age, and LMDB would trust them.  Two machines on one file system do not share an index,
because LMDB maps its file into memory.
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
_DIGITS = 8  # hex digits of the hashes of host and boot
_VERSION = b"ckptvcs index 5"

_open: dict[tuple[int, int], Edition] = {}
_drafts: weakref.WeakSet[Draft] = weakref.WeakSet()
_abandoned: list[object] = []  # LMDB objects in use by a thread of the parent at a fork; kept alive


@dataclass(frozen=True)
class Family:
    """The files of one index."""

    folder: Path
    prefix: str
    host: str

    @classmethod
    def of(cls, name: Path) -> Family:
        """Return the files of an index of this name, for this boot of this machine."""
        host = f"{name.name}-{_short(host_name())}-"
        return cls(name.parent, f"{host}{_short(boot_id())}-", host)

    def edition(self, number: int) -> Path:
        """Return the path of an edition."""
        return self.folder / f"{self.prefix}e{number}.lmdb"

    def journal(self, number: int) -> Path:
        """Return the path of the journal that began with an edition."""
        return self.folder / f"{self.prefix}j{number}"

    @property
    def draft(self) -> Path:
        """Path of the unfinished next edition."""
        return self.folder / f"{self.prefix}draft"

    @property
    def new(self) -> Path:
        """Path of the unfinished next journal."""
        return self.folder / f"{self.prefix}new"

    @property
    def lock(self) -> Path:
        """Path of the lock for making the next edition."""
        return self.folder / f"{self.prefix}lock"

    def scan(self) -> tuple[list[int], list[int]]:
        """Return the sorted numbers of the editions, and of the journals.

        Raises:
            OSError: the folder cannot be listed.
        """
        name = re.compile(re.escape(self.prefix) + r"(?:e([0-9]{1,15})\.lmdb|j([0-9]{1,15}))\Z")
        missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with missing, os.scandir(self.folder) as entries:
            matches = [match for entry in entries if (match := name.match(entry.name))]
            editions = sorted(int(match[1]) for match in matches if match[1])
            return editions, sorted(int(match[2]) for match in matches if match[2])
        return [], []

    def delete_older(self) -> None:
        """Delete the unused files of earlier boots of this machine."""
        with contextlib.suppress(OSError):
            for entry in [*os.scandir(self.folder)]:
                name = entry.name
                if name.startswith(self.host) and not name.startswith(self.prefix):
                    delete_unused(Path(entry.path))


def _short(text: str) -> str:
    return hex_hash(text.encode())[:_DIGITS]


class Edition:
    """An open edition, shared by all indexes of this process that read it."""

    def __init__(self, file: LockedFile) -> None:
        """Open an edition.  Raises lmdb.Error, OSError if it is damaged or cannot be read."""
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
        """Return the value of a key."""
        value: bytes | None = self.txn.get(key, None, self.tables[table])
        return value

    def values(self, table: int, key: bytes) -> list[bytes]:
        """Return all values of a key."""
        cursor = self.cursors[table]
        return [*cursor.iternext_dup()] if cursor.set_key(key) else []

    def rows(self, table: int, start: bytes = b"") -> Iterable[tuple[bytes, bytes]]:
        """Yield the sorted keys from `start` on, with their values."""
        with self.txn.cursor(self.tables[table]) as cursor:
            if cursor.set_range(start) if start else cursor.first():
                yield from cursor

    def use(self) -> Edition:
        """Count one more user."""
        self._users += 1
        return self

    def leave(self) -> None:
        """Count one user less; the last one closes the edition."""
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
        """Give up the parent's edition in a forked child.  Only an `idle` one can be closed."""
        if idle:
            self._close()
        else:
            _abandoned.append((self.env, self.txn, self.tables, self.cursors))
            self.env = None


def open_edition(path: Path) -> Edition:
    """Open an edition, or count one more user; the caller holds `forking.using`.

    Raises:
        FileNotFoundError, BlockingIOError: it has become a draft or was deleted.
        lmdb.Error, OSError: it is damaged, or the file system refuses.
    """
    file = LockedFile(path)
    try:
        edition = _open.get(file.identity)
        if edition is None:
            edition = _open[file.identity] = Edition(file)
            return edition.use()
    except BaseException:
        file.close()
        raise
    file.close()
    return edition.use()


class Draft:
    """The unfinished next edition, which other processes do not see."""

    def __init__(self, file: LockedFile, *, root: bytes | None = None) -> None:
        """Open an exclusively locked file.

        An empty file gets a `root`, an id that all editions made from it share.

        Raises:
            lmdb.Error, OSError: the file is damaged, or the file system refuses.
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
        """Run `change` in one transaction; repeat it in a larger map if the map is full."""
        while True:
            assert self._env is not None
            try:
                with self._env.begin(write=True) as txn:
                    change(txn)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(self._env.info()["map_size"] * 2)

    def publish(self, path: Path) -> None:
        """Turn the draft into an edition.  Raises OSError."""
        self._close_environment()
        self._file.share()  # before others see it, so that no reader is locked out
        self._file.path.rename(path)
        self._published = True

    def _close_environment(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def close(self) -> None:
        """Close the draft, and delete it unless it was published."""
        self._close_environment()
        if not self._published:
            with contextlib.suppress(OSError):
                self._file.path.unlink(missing_ok=True)
        self._file.close()

    def drop(self, *, idle: bool) -> None:
        """Give up the parent's draft in a forked child.  Only an `idle` one can be closed."""
        if not idle:
            _abandoned.append(self._env)
            self._env = None
        self._close_environment()


def new_draft(path: Path, *, copied: Path | None = None, root: bytes | None = None) -> Draft:
    """Return an empty draft with a `root`, or a copy of an edition, replacing any older draft.

    Raises:
        lmdb.Error, OSError: the copied edition is damaged, or the file system refuses.
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
    """Turn an unused edition into a draft; return None if it is in use or has another root."""
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
    """Return the id that all editions made from one empty draft share.

    Raises:
        lmdb.InvalidError: another version of the program wrote the edition.
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
    """Check the length of a file: LMDB maps it, and dies when it reads beyond a truncated end.

    Raises:
        lmdb.CorruptedError: the file is shorter than its meta pages say.
        OSError: the file cannot be read.
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
    """Give up the parent's environments in a forked child: LMDB cannot reopen an open file."""
    for edition in [*_open.values()]:
        edition.drop(idle=idle)
    for draft in [*_drafts]:
        draft.drop(idle=idle)
    _open.clear()


in_child(_forget)
