"""Objects of a git repository: loose ones, and packs with deltas.

Everything here may be hostile.  Sizes are checked before memory is allocated, and files are read,
never mapped: another process may truncate them.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MAX_BYTES = 1 << 24  # the largest object that is read
MAX_PATH = 1 << 12  # bytes of the longest path that is read
_MAX_PACKS = 512
_MAX_DELTAS = 300  # deltas between an object and its base; git makes at most 50, or 250 if asked
_MAX_STORES = 8  # alternates
_BLOCK = 1 << 14
_INDEX_MAGIC = b"\xfftOc\0\0\0\x02"
_FANOUT = struct.Struct(">256I")
_HEADER = 8 + _FANOUT.size  # bytes of a pack index before its ids
_TYPES = {1: "commit", 2: "tree", 3: "blob", 4: "tag"}
_OFFSET_DELTA, _ID_DELTA = 6, 7
_HEAD_BYTES = 64  # the type, the size and the base of an object in a pack need fewer bytes


class UnreadableError(Exception):
    """A file is missing, too large, or not what git writes."""


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        UnreadableError: It is not such a file, or cannot be read.
    """
    with _File(path) as file:
        data = file.read(0, most + 1)
    if len(data) > most:
        raise UnreadableError(f"{path} is too large")
    return data


class _File:
    """A regular file that is read at given offsets."""

    def __init__(self, path: Path) -> None:
        try:
            # O_NONBLOCK: opening a pipe would wait for a writer.
            self._number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise UnreadableError(str(error)) from error
        if not stat.S_ISREG(os.fstat(self._number).st_mode):
            os.close(self._number)
            raise UnreadableError(f"{path} is not a regular file")

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._number)

    def read(self, at: int, length: int) -> bytes:
        """Return at most `length` bytes from an offset on."""
        blocks = []
        try:
            while length > 0 and (block := os.pread(self._number, length, at)):
                blocks.append(block)
                at, length = at + len(block), length - len(block)
        except (OSError, OverflowError) as error:
            raise UnreadableError(str(error)) from error
        return b"".join(blocks)


@dataclass(frozen=True)
class _Pack:
    """A pack and the fanout of its index."""

    path: Path
    fanout: tuple[int, ...]


class Objects:
    """The objects of a git folder and of its alternates."""

    def __init__(self, folder: Path, id_bytes: int) -> None:
        """`folder` contains `objects`; `id_bytes` is 20, or 32 for SHA-256."""
        self._size = id_bytes
        self._stores = [folder / "objects"]
        for store in self._stores:
            self._stores += _alternates(store)[: _MAX_STORES - len(self._stores)]
        self._packs = cache(lambda: [*self._all_packs()])

    def read(self, name: bytes) -> tuple[str, bytes]:
        """Return the type and the content of an object.  Raises UnreadableError."""
        text = name.hex()
        for store in self._stores:
            try:
                data = _File(store / text[:2] / text[2:])
            except UnreadableError:
                continue
            with data as file:
                return _loose(file)
        found = self._packed(name)
        if found is None:
            raise UnreadableError(f"object {text} is missing")
        return self._unpack(*found)

    def _all_packs(self) -> Iterator[_Pack]:
        for store in self._stores:
            try:
                names = sorted(entry.name for entry in os.scandir(store / "pack"))
            except OSError:
                continue
            for name in [name for name in names if name.endswith(".idx")][:_MAX_PACKS]:
                try:
                    with _File(store / "pack" / name) as file:
                        head = file.read(0, _HEADER)
                except UnreadableError:
                    continue
                if head.startswith(_INDEX_MAGIC) and len(head) == _HEADER:
                    yield _Pack(store / "pack" / name, _FANOUT.unpack_from(head, 8))

    def _packed(self, name: bytes) -> tuple[Path, int] | None:
        """Return the pack of an object and its offset there."""
        if len(name) != self._size:
            raise UnreadableError("a pack is truncated")
        for pack in self._packs():
            first = pack.fanout[name[0] - 1] if name[0] else 0
            count, total = pack.fanout[name[0]] - first, pack.fanout[255]
            if not 0 < count <= MAX_BYTES // self._size:
                continue
            with _File(pack.path) as file:
                ids = file.read(_HEADER + first * self._size, count * self._size)
                rows = range(len(ids) // self._size)
                at = bisect_left(
                    rows, name, key=lambda n: ids[n * self._size : (n + 1) * self._size]
                )
                if at < len(rows) and ids[at * self._size : (at + 1) * self._size] == name:
                    return pack.path.with_suffix(".pack"), self._offset(file, first + at, total)
        return None

    def _offset(self, file: _File, row: int, total: int) -> int:
        offsets = _HEADER + total * (self._size + 4)
        offset = int.from_bytes(file.read(offsets + row * 4, 4), "big")
        if offset < 1 << 31:
            return offset
        return int.from_bytes(file.read(offsets + total * 4 + (offset - (1 << 31)) * 8, 8), "big")

    def _unpack(self, path: Path, offset: int) -> tuple[str, bytes]:
        """Return the object at an offset of a pack."""
        deltas: list[bytes] = []
        with _File(path) as file:
            while True:
                kind, size, body = _head(file.read(offset, _HEAD_BYTES))
                if kind == _OFFSET_DELTA:
                    back, length = _distance(file.read(offset + body, _HEAD_BYTES))
                    body += length
                elif kind == _ID_DELTA:
                    base = file.read(offset + body, self._size)
                    body += self._size
                data = _inflate(file, offset + body, size)
                if kind in _TYPES:
                    name = _TYPES[kind]
                    break
                deltas.append(data)
                if len(deltas) > _MAX_DELTAS or sum(map(len, deltas)) > MAX_BYTES:
                    raise UnreadableError("a chain of deltas is too long")
                if kind == _OFFSET_DELTA and 0 < back <= offset:
                    offset -= back
                elif kind == _ID_DELTA and (found := self._packed(base)) and found[0] == path:
                    offset = found[1]
                else:
                    raise UnreadableError("a delta has no base")
        for delta in reversed(deltas):
            data = _patched(data, delta)
        return name, data


def _alternates(store: Path) -> list[Path]:
    try:
        lines = read_file(store / "info" / "alternates", _BLOCK).decode("utf-8", "replace")
    except UnreadableError:
        return []
    return [store / line for line in lines.splitlines() if line and not line.startswith("#")]


def _loose(file: _File) -> tuple[str, bytes]:
    start = _decompressed(file, 0, _HEAD_BYTES, whole=False)
    kind, _, rest = start.partition(b" ")
    text, zero, _ = rest.partition(b"\0")
    if not zero or not text.isdigit() or kind.decode("latin-1") not in _TYPES.values():
        raise UnreadableError("a loose object has no header")
    head = len(kind) + len(text) + 2
    return kind.decode(), _inflate(file, 0, head + int(text))[head:]


def _inflate(file: _File, at: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise UnreadableError("an object is too large")
    return _decompressed(file, at, size, whole=True)


def _decompressed(file: _File, at: int, size: int, *, whole: bool) -> bytes:
    """Return `size` bytes of a zlib stream; if `whole` is false, fewer are enough."""
    stream, found = zlib.decompressobj(), bytearray()
    try:
        while len(found) < size and not stream.eof:
            block = stream.unconsumed_tail
            if not block:
                block = file.read(at, _BLOCK)
                at += len(block)
            if not block:
                break
            found += stream.decompress(block, size - len(found))
    except zlib.error as error:
        raise UnreadableError(f"an object is damaged: {error}") from error
    if whole and len(found) != size:
        raise UnreadableError("an object is truncated")
    return bytes(found)


def _head(data: bytes) -> tuple[int, int, int]:
    """Return the type of a packed object, its size, and the bytes of this head."""
    if not data:
        raise UnreadableError("a pack is truncated")
    kind, size = data[0] >> 4 & 7, data[0] & 15
    if not data[0] & 0x80:
        return kind, size, 1
    rest, length = _varint(data[1:])
    return kind, size | rest << 4, 1 + length


def _varint(data: bytes) -> tuple[int, int]:
    """Return a number of 7 bits a byte, the lowest first, and its number of bytes."""
    value = 0
    for at, byte in enumerate(data[:10]):
        value |= (byte & 0x7F) << 7 * at
        if not byte & 0x80:
            return value, at + 1
    raise UnreadableError("a number is too long")


def _distance(data: bytes) -> tuple[int, int]:
    """Return the distance of an offset delta to its base, and its number of bytes."""
    value = -1
    for at, byte in enumerate(data[:10]):
        value = (value + 1) << 7 | byte & 0x7F
        if not byte & 0x80:
            return value, at + 1
    raise UnreadableError("a number is too long")


def _patched(base: bytes, delta: bytes) -> bytes:
    """Apply a delta."""
    before, at = _varint(delta)
    size, length = _varint(delta[at:])
    at += length
    if before != len(base) or size > MAX_BYTES:
        raise UnreadableError("a delta does not fit its base")
    parts: list[bytes] = []
    made = 0
    while at < len(delta) and made <= size:
        command, at = delta[at], at + 1
        if command & 0x80:
            offset, at = _sparse(delta, at, command & 15, 4)
            count, at = _sparse(delta, at, command >> 4 & 7, 3)
            part = base[offset : offset + (count or 1 << 16)]
        else:
            part, at = delta[at : at + command], at + command
        if not part:
            raise UnreadableError("a delta is damaged")
        parts.append(part)
        made += len(part)
    if made != size:
        raise UnreadableError("a delta is damaged")
    return b"".join(parts)


def _sparse(delta: bytes, at: int, mask: int, most: int) -> tuple[int, int]:
    """Return a little-endian number whose zero bytes are left out, and the offset after it."""
    value = 0
    for number in range(most):
        if mask >> number & 1:
            value |= int.from_bytes(delta[at : at + 1]) << 8 * number
            at += 1
    return value, at


def tree(content: bytes, id_bytes: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield the name, the mode and the id of each entry of a tree.  Raises UnreadableError."""
    at = 0
    while at < len(content):
        space, zero = content.find(b" ", at, at + 8), content.find(b"\0", at)
        name = content[zero + 1 : zero + 1 + id_bytes]
        if not at < space < zero or len(name) != id_bytes:
            raise UnreadableError("a tree is damaged")
        try:
            yield content[space + 1 : zero], int(content[at:space], 8), name
        except ValueError as error:
            raise UnreadableError("a tree is damaged") from error
        at = zero + 1 + id_bytes
