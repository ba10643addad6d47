"""Layout: a file as a row of segments, and the tensors found in it.

Every format is read into this one form: literal bytes, the payloads of stored tensors, and
checksums of payloads.  Joined again in order they are the file, byte for byte, so no format needs
a writer of its own to come back.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.errors import CkptError, InvalidInputError, NotFoundError
from ckptvcs.history.schema import LITTLE, View

INLINE_ELEMENTS = 128
"""Tensors of fewer elements are in the skeleton, always exact."""

INLINE_BYTES = 4096
_MAX_LITERAL = 1 << 18  # longer runs of unknown bytes are stored as a tensor of bytes

BLOCK_BYTES = 1 << 22


class Source(Protocol):
    """Bytes of a checkpoint file, read by position."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes.  Raises InvalidInputError where the file has become shorter."""

    def check_unchanged(self) -> None:
        """Raises InvalidInputError where it was written since it was first looked at."""
        return None  # noqa: RET501  what only stands in memory has one owner

    def view(self, offset: int, length: int) -> bytes | memoryview:
        """The same, without a copy where they are in memory."""
        return self.read(offset, length)

    def on_device(self, offset: int, length: int) -> Any:
        """The same as a flat tensor of torch, where they are on a device; else None."""
        return None


class FileSource(Source):
    """A checkpoint file on disk.

    Reads by position, never by a memory map: a trainer that truncates the file meanwhile makes a
    short read here, which is an error, where a map would kill the process.  The file is opened
    for each read, so that a directory of many files needs few descriptors; within `with`, which
    all threads that read must have left before it ends, it stays open.
    """

    def __init__(self, path: Path, *, at: Path | None = None, then: Any = None) -> None:
        """`path` is what errors call it.  With `at` it is read there, and there must be no link;
        `then` is what was found there.

        Raises:
            NotFoundError, InvalidInputError: it cannot be looked at.
        """
        self.path, self._at = path, at or path
        self._follows = at is None
        self.stat: os.stat_result = then or self._stat()
        self.size = self.stat.st_size
        self._descriptor: int | None = None

    def _stat(self) -> os.stat_result:
        try:
            return self._at.stat(follow_symlinks=self._follows)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _open(self) -> int:
        """A descriptor of the file that was looked at: another one may have taken its name, or a
        pipe.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would wait for its writer
        flags |= 0 if self._follows else os.O_NOFOLLOW
        descriptor = os.open(self._at, flags)
        now = os.fstat(descriptor)
        if (now.st_dev, now.st_ino) != (self.stat.st_dev, self.stat.st_ino):
            os.close(descriptor)
            raise changed_while_read(self.path)
        return descriptor

    def __enter__(self) -> FileSource:
        try:
            self._descriptor = self._open()
        except OSError as error:
            raise self._refused(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read(self, offset: int, length: int) -> bytes:
        if self._descriptor is not None:
            return self._read(self._descriptor, offset, length)
        # Nobody closes a source that threads read, so each read has a descriptor of its own.
        try:
            descriptor = self._open()
        except FileNotFoundError as error:
            raise changed_while_read(self.path) from error  # it was there to be looked at
        except OSError as error:
            raise self._refused(error) from error
        try:
            return self._read(descriptor, offset, length)
        finally:
            os.close(descriptor)

    def _refused(self, error: OSError) -> CkptError:
        if error.errno == errno.ELOOP and not self._follows:  # it has become a link
            return changed_while_read(self.path)
        return unreadable(self.path, error)

    def _read(self, descriptor: int, offset: int, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = os.pread(descriptor, min(length, 1 << 30), offset)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not part:
                raise changed_while_read(self.path)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_unchanged(self) -> None:
        """Raises InvalidInputError where the file was written since it was first looked at."""
        try:
            now, then = self._at.stat(follow_symlinks=self._follows), self.stat
        except OSError as error:
            raise changed_while_read(self.path) from error
        # Times may be set to what they were; that sets the time of the last change of all.
        if (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino) != (
            then.st_size,
            then.st_mtime_ns,
            then.st_ctime_ns,
            then.st_ino,
        ):
            raise changed_while_read(self.path)


def unreadable(path: Path, error: OSError) -> CkptError:
    """Return the error for a source that the operating system cannot read."""
    kind = NotFoundError if isinstance(error, FileNotFoundError) else InvalidInputError
    return kind(f"cannot read {path}: {error.strerror or error}")


def changed_while_read(path: Path) -> InvalidInputError:
    """Return the error for a file that a trainer is still writing."""
    return InvalidInputError(
        f"{path} changed while it was being read", hint="commit it again once it is complete"
    )


@dataclass
class StoredTensor:
    """A stored tensor in a file: its payload's place, and what is known of it.

    `key` is what the file calls it: a storage's key, or a tensor's name in safetensors; `part`
    which part of a tensor it is, that other files have the rest of; `order` that of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    key: str = ""
    views: list[View] = field(default_factory=list)
    part: str = ""
    order: str = LITTLE

    @property
    def inline(self) -> bool:
        """Whether it is small enough to stand in the skeleton."""
        return self.size <= INLINE_BYTES and math.prod(self.shape) < INLINE_ELEMENTS


@dataclass(frozen=True)
class Checksum:
    """Four bytes of the file that hold the crc32 of a stored tensor, little-endian."""

    offset: int
    tensor: int


@dataclass
class Layout:
    """What a parser found in a file; `tree` is the inert pickle, or the flat dict of a
    safetensors file, that the roles of tensors are read from; `arrays` are the paths of tensors
    that were numpy arrays.  `problem` says why its objects cannot be made; `remarks` what else is
    not as it should be.
    """

    format: str
    tensors: list[StoredTensor]
    checksums: list[Checksum] = field(default_factory=list)
    tree: object = None
    arrays: frozenset[str] = frozenset()
    problem: str | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One segment of a file: `tensor` is None for a literal."""

    offset: int
    size: int
    tensor: int | None = None
    checksum: bool = False


def pieces(layout: Layout, size: int) -> Iterator[Piece]:
    """The segments of a file of `size` bytes, in order and without gaps.

    Long literal runs become tensors of bytes, appended to `layout.tensors`.
    """
    marks = [
        Piece(found.offset, found.size, number)
        for number, found in enumerate(layout.tensors)
        if found.size
    ]
    marks += [Piece(mark.offset, 4, mark.tensor, checksum=True) for mark in layout.checksums]
    marks.sort(key=lambda piece: piece.offset)
    at = 0
    for mark in [*marks, Piece(size, 0)]:
        if mark.offset - at > _MAX_LITERAL:
            number = len(layout.tensors)
            found = StoredTensor(f"bytes.{number}", "U8", (mark.offset - at,), at, mark.offset - at)
            layout.tensors.append(found)
            yield Piece(at, found.size, number)
        elif mark.offset > at:
            yield Piece(at, mark.offset - at)
        if mark.tensor is not None:
            yield mark
        at = mark.offset + mark.size


def overlap(spans: Iterable[tuple[int, int]]) -> bool:
    """Whether any two of these (offset, size) have a byte in common."""
    at = 0
    for start, size in sorted(spans):
        if size and start < at:
            return True
        at = max(at, start + size)
    return False


def covers(layout: Layout, size: int) -> bool:
    """Whether tensors and checksums lie inside the file and do not overlap."""
    spans = [(found.offset, found.size) for found in layout.tensors]
    spans += [(mark.offset, 4) for mark in layout.checksums]
    inside = all(offset + length <= size for offset, length in spans)
    return (
        inside
        and not overlap(spans)
        and all(
            math.prod(found.shape) * DTYPES[found.dtype].size == found.size
            for found in layout.tensors
        )
    )
