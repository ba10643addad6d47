"""Journal: what came after an edition of an index, in a file that is only appended to.

    header | record record ...        record = magic, length, BLAKE3 of the payload, payload

An empty record says that there is something to look at: the next journal, or edition.
Nobody waits: each record is appended by one call of the operating system, and whoever reads takes
what is whole.  A journal that did not take a record, for want of room, is cut to nothing, which
takes no room: it is void from then on, and with it the edition that it belongs to.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from io import FileIO
from os import SEEK_END, lseek
from pathlib import Path

from ckptvcs.hashing import hash_of
from ckptvcs.store.index.locked import LockedFile, let_others_write

_HEADER = b"ckptvcs journal 1\n"
_RECORD = struct.Struct("<4sI16s")  # magic, bytes of the payload, the first of its hash
_MAGIC = b"CKJR"
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_APPEND = _FLAGS | os.O_RDWR | os.O_APPEND
MOST_BYTES = 1 << 26
"""No journal is longer, nor are those together that are read for one edition."""


class VoidError(ValueError):
    """A journal does not tell all that there was: the packs have to be looked at."""


class CutError(OSError):
    """There was no room for a record: the journal is void."""


class Journal(LockedFile):
    """A journal that is read to its end, again and again."""

    def __init__(self, path: Path) -> None:
        """Raises VoidError; OSError: it is not there."""
        super().__init__(path)
        self._at = self._seen = 0
        self.ended = False
        """Whether the last record that was read is an empty one."""
        if os.pread(self.descriptor, len(_HEADER), 0) != _HEADER:
            self.close()
            raise VoidError
        self._at = self._seen = len(_HEADER)

    @property
    def read_bytes(self) -> int:
        """Bytes of the records that were read."""
        return self._at - len(_HEADER)

    def is_there(self) -> bool:
        """Whether its name still leads to it: a folder may be deleted, and made again."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def has_changed(self) -> bool:
        """Whether there is more, or it is void: one call of the operating system, the fastest."""
        return lseek(self._descriptor, 0, SEEK_END) != self._seen

    def read(self) -> Iterator[bytes]:
        """The records that were not read yet.

        Raises:
            VoidError: it is cut off, damaged, deleted or too long.
            OSError: it cannot be read.
        """
        status = os.fstat(self.descriptor)
        if not status.st_nlink or not self._at <= status.st_size <= MOST_BYTES:
            raise VoidError
        data = os.pread(self.descriptor, status.st_size - self._at, self._at)
        for payload in _records(data):
            yield payload
            self.ended = not payload
            self._at += _RECORD.size + len(payload)  # not before it was taken
        self._seen = status.st_size


def append_record(path: Path, payload: bytes, later: Path | None = None) -> bool:
    """Add a record to a journal, whoever else adds some; whether the `later` one has begun by then,
    which needs the record, too.

    Raises:
        VoidError: it is void.
        CutError: it is void from now on.
        OSError: it cannot be written to, and is as it was; FileNotFoundError: it was deleted.
    """
    with FileIO(os.open(path, _APPEND), "r+b") as file:
        _require_sound(file)
        _append(file, payload)
        if later is not None and os.access(later, os.F_OK):
            return True
        # The later one may have begun, and be deleted: this one is void before that.
        _require_sound(file)
    return False


def _require_sound(file: FileIO) -> None:
    """Raises VoidError: a journal is void, or deleted."""
    descriptor = file.fileno()
    linked = os.fstat(descriptor).st_nlink
    if not linked or os.pread(descriptor, len(_HEADER), 0) != _HEADER:
        raise VoidError


def _append(file: FileIO, payload: bytes) -> None:
    digest = hash_of(payload, _RECORD.size - 8)
    record = _RECORD.pack(_MAGIC, len(payload), digest) + payload
    problem: OSError | None = None
    try:
        room = MOST_BYTES - os.fstat(file.fileno()).st_size
        if len(record) <= room and file.write(record) == len(record):
            return
    except OSError as error:
        problem = error
    file.truncate(0)
    raise CutError("the journal of the index has no room") from problem


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records at the beginning; what follows is still being written.

    Raises:
        VoidError: one is damaged.
    """
    at = 0
    while at + _RECORD.size <= len(data):
        magic, length, digest = _RECORD.unpack_from(data, at)
        payload = data[at + _RECORD.size : at + _RECORD.size + length]
        if magic != _MAGIC or length > MOST_BYTES:
            raise VoidError
        if len(payload) < length:
            return
        if hash_of(payload, len(digest)) != digest:
            raise VoidError
        yield payload
        at += _RECORD.size + length


def create_journal(path: Path, scratch: Path) -> None:
    """Begin a journal; nobody else makes one of that name.  Raises OSError."""
    scratch.unlink(missing_ok=True)
    try:
        with scratch.open("xb") as file:
            file.write(_HEADER)
            let_others_write(file.fileno(), path.parent)
        scratch.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def void(path: Path) -> None:
    """Have everybody look elsewhere who reads a journal.  Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, _FLAGS | os.O_WRONLY)
        try:
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)
