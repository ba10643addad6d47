"""Layout: a file as a sequence of segments, with the tensors in it.

Every parser returns this form: literal bytes, the payloads of stored tensors, and checksums of
payloads.  Their concatenation is the file, byte for byte, so restoring needs no writer per format.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.errors import CkptError, InvalidInputError, NotFoundError
from ckptvcs.history.schema import LITTLE, View

INLINE_ELEMENTS = 128
"""Tensors of fewer elements are stored in the skeleton, always exactly."""

INLINE_BYTES = 4096
_MAX_LITERAL = 1 << 18  # longer runs of unknown bytes are stored as a byte tensor

BLOCK_BYTES = 1 << 22


class Source(Protocol):
    """The bytes of a checkpoint file, read by position, with its permissions and time."""

    size: int
    mode: int = 0o644
    mtime_ns: int = 0

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly these bytes.  Raises InvalidInputError if the file became shorter."""

    def check_unchanged(self) -> None:
        """Raise InvalidInputError if the bytes changed since the source was opened."""
        return None  # noqa: RET501  bytes in memory have one owner

    def view(self, offset: int, length: int) -> bytes | memoryview:
        """Return the same bytes, without a copy if they are in memory."""
        return self.read(offset, length)

    def on_device(self, offset: int, length: int) -> Any:
        """Return the bytes as a flat torch tensor if they are on a device, else None."""
        return None


class FileSource(Source):
    """A checkpoint file on disk.

    It reads by position, never through a memory map.  If a trainer truncates the file, a short read
    is an error; a map would kill the process.  Each read opens the file, so that a directory of
    many files needs few descriptors.  Within `with` the file stays open; all reading threads must
    end before the block does.
    """

    def __init__(self, path: Path, *, at: Path | None = None, then: Any = None) -> None:
        """Open nothing yet.

        Args:
            path: The path that errors show.
            at: The path to read from, which must not be a link; None reads from `path`.
            then: The status of the file, if the caller knows it.

        Raises:
            NotFoundError, InvalidInputError: The file has no readable status.
        """
        self.path, self._at = path, at or path
        self._follows = at is None
        self.stat: os.stat_result = then or self._stat()
        self.size, self.mtime_ns = self.stat.st_size, self.stat.st_mtime_ns
        self.mode = stat.S_IMODE(self.stat.st_mode)
        self._descriptor: int | None = None

    def _stat(self) -> os.stat_result:
        try:
            return self._at.stat(follow_symlinks=self._follows)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _open(self) -> int:
        """Return a descriptor of the same file; another file or a pipe may now have its name."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe would block
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
        # Nobody closes a source that threads read, so each read opens its own descriptor.
        try:
            descriptor = self._open()
        except FileNotFoundError as error:
            raise changed_while_read(self.path) from error  # it existed before
        except OSError as error:
            raise self._refused(error) from error
        try:
            return self._read(descriptor, offset, length)
        finally:
            os.close(descriptor)

    def _refused(self, error: OSError) -> CkptError:
        if error.errno == errno.ELOOP and not self._follows:  # it became a link
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
        """Raise InvalidInputError if the file changed since the source was created."""
        try:
            now, then = self._at.stat(follow_symlinks=self._follows), self.stat
        except OSError as error:
            raise changed_while_read(self.path) from error
        # A program can reset the modification time, but that changes the ctime.
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


@dataclass(eq=False)
class StoredTensor:
    """A stored tensor in a file, with the place of its payload.

    Attributes:
        key: The key of the storage, or the name of the tensor in safetensors.
        views: The tensors that the program of the file sees, if they differ from this one.
        part: The part of a larger tensor, such as `[4:8,0:16]`; "" for a whole tensor.
        order: The byte order.
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
        """Whether the tensor is small enough to be stored in the skeleton."""
        return self.size <= INLINE_BYTES and math.prod(self.shape) < INLINE_ELEMENTS


@dataclass(frozen=True)
class Checksum:
    """Four bytes of the file: the CRC-32 of a stored tensor, little-endian."""

    offset: int
    tensor: int


@dataclass
class Layout:
    """The result of a parser.

    Attributes:
        tree: The inert pickle, or the flat dict of a safetensors file; the source of tensor roles.
        arrays: The paths of tensors that were numpy arrays.
        problem: Why the objects of the file cannot be read; None if they can.
        remarks: Other problems to report.
    """

    format: str
    tensors: list[StoredTensor]
    checksums: list[Checksum] = field(default_factory=list)
    tree: object = None
    arrays: frozenset[str] = frozenset()
    problem: str | None = None
    remarks: tuple[str, ...] = ()

    @property
    def by_key(self) -> dict[str, StoredTensor]:
        """The tensors with a key."""
        return {tensor.key: tensor for tensor in self.tensors if tensor.key}


@dataclass(frozen=True)
class Piece:
    """One segment of a file: `tensor` is None for a literal."""

    offset: int
    size: int
    tensor: int | None = None
    checksum: bool = False


def pieces(layout: Layout, size: int, first: int) -> Iterator[Piece]:
    """Yield the segments of a file of `size` bytes, in order and without gaps.

    Numbers of tensors begin at `first`.  Long literal runs become byte tensors, which are appended
    to `layout.tensors`.
    """
    marks = [
        Piece(tensor.offset, tensor.size, number)
        for number, tensor in enumerate(layout.tensors, first)
        if tensor.size
    ]
    marks += [
        Piece(mark.offset, 4, first + mark.tensor, checksum=True) for mark in layout.checksums
    ]
    marks.sort(key=lambda piece: piece.offset)
    at = 0
    for mark in [*marks, Piece(size, 0)]:
        if mark.offset - at > _MAX_LITERAL:
            number, length = len(layout.tensors), mark.offset - at
            layout.tensors.append(StoredTensor(f"bytes.{number}", "U8", (length,), at, length))
            yield Piece(at, length, first + number)
        elif mark.offset > at:
            yield Piece(at, mark.offset - at)
        if mark.tensor is not None:
            yield mark
        at = mark.offset + mark.size


def overlap(spans: Iterable[tuple[int, int]]) -> bool:
    """Return whether two of these (offset, size) spans overlap."""
    at = 0
    for start, size in sorted(spans):
        if size and start < at:
            return True
        at = max(at, start + size)
    return False


def covers(layout: Layout, size: int) -> bool:
    """Return whether all tensors and checksums lie inside the file and do not overlap."""
    spans = [(tensor.offset, tensor.size) for tensor in layout.tensors]
    spans += [(mark.offset, 4) for mark in layout.checksums]
    return (
        all(offset + length <= size for offset, length in spans)
        and not overlap(spans)
        and all(
            math.prod(tensor.shape) * DTYPES[tensor.dtype].size == tensor.size
            for tensor in layout.tensors
        )
    )
