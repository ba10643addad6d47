"""Journal: the changes after an edition of an index, in an append-only file.

    header | record record ...        record = magic, length, BLAKE3 of the payload, payload

An empty record tells the readers to look for the next journal or edition.  No process waits: each
record is appended by one system call, and readers take complete records.  If the disk is full, the
journal is truncated to nothing, which needs no room.  It is void then, and so is its edition.
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
"""Limit for a journal, and for all journals that are read on top of one edition."""


class VoidError(ValueError):
    """A journal is incomplete: the packs must be read instead."""


class CutError(OSError):
    """The disk has no room for a record, so the journal is void now."""


class Journal(LockedFile):
    """A journal that is read to its end repeatedly, while others append to it."""

    def __init__(self, path: Path) -> None:
        """Open a journal.  Raises VoidError, OSError."""
        super().__init__(path)
        self._at = self._seen = 0
        self.ended = False
        """Whether the last record read is empty."""
        if os.pread(self.descriptor, len(_HEADER), 0) != _HEADER:
            self.close()
            raise VoidError
        self._at = self._seen = len(_HEADER)

    @property
    def read_bytes(self) -> int:
        """Bytes of the records read so far."""
        return self._at - len(_HEADER)

    def is_there(self) -> bool:
        """Return whether the path still leads to this file: a folder may have been replaced."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def has_changed(self) -> bool:
        """Return whether the journal has grown or is void, by the fastest system call."""
        return lseek(self._descriptor, 0, SEEK_END) != self._seen

    def read(self) -> Iterator[bytes]:
        """Yield the records that were not read yet.

        Raises:
            VoidError: the journal is void, damaged, deleted or too long.
            OSError: the journal cannot be read.
        """
        status = os.fstat(self.descriptor)
        if not status.st_nlink or not self._at <= status.st_size <= MOST_BYTES:
            raise VoidError
        data = os.pread(self.descriptor, status.st_size - self._at, self._at)
        for payload in _records(data):
            yield payload
            self.ended = not payload
            self._at += _RECORD.size + len(payload)  # only after the caller has used it
        self._seen = status.st_size


def append_record(path: Path, payload: bytes, later: Path | None = None) -> bool:
    """Append a record to a journal, beside other writers.

    Return whether the journal `later` exists already; then it needs the record too.

    Raises:
        VoidError: the journal is void.
        CutError: the journal is void from now on.
        FileNotFoundError: the journal was deleted.
        OSError: the journal cannot be written, and is unchanged.
    """
    with FileIO(os.open(path, _APPEND), "r+b") as file:
        _require_sound(file)
        _append(file, payload)
        if later is not None and os.access(later, os.F_OK):
            return True
        # `later` may have existed and been deleted.  Then this journal was voided before that.
        _require_sound(file)
    return False


def _require_sound(file: FileIO) -> None:
    """Raise VoidError if a journal is void or deleted."""
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
    """Yield the complete records; an incomplete last one is still being written.

    Raises:
        VoidError: a record is damaged.
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
    """Create a journal; the caller has locked its family.  Raises OSError."""
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
    """Truncate a journal, so that its readers stop using it.  Raises OSError."""
    missing = contextlib.suppress(FileNotFoundError)
    with missing, FileIO(os.open(path, _FLAGS | os.O_WRONLY), "w") as file:
        file.truncate(0)
