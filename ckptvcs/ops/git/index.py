"""The index of a git repository: the tracked files, as git saw them last."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ckptvcs.ops.git.objects import MAX_PATH, UnreadableError, read_file

MAX_BYTES = 1 << 27
MAX_FILES = 400_000
_HEAD = struct.Struct(">4sII")
_FIXED = {  # by the bytes of an id
    # ctime, mtime (s, ns each), device, inode, mode, uid, gid, size, id, flags
    size: struct.Struct(f">10I{size}sH")
    for size in (20, 32)
}
_FLAGS = struct.Struct(">H")
_ASSUME_VALID, _EXTENDED, _STAGE = 0x8000, 0x4000, 0x3000
_SKIP_WORKTREE = 0x4000
_VERSIONS = (2, 3, 4)
_UNKNOWN = (b"link", b"sdir")  # parts of the index are elsewhere, or stand for whole folders


class Entry(NamedTuple):
    """A tracked file.

    Attributes:
        path: The path below the worktree.
        mode: The mode, which says whether it is a file, a link or a submodule.
        id: The id of its blob.
        mtime: Its modification time when git read it: seconds, nanoseconds.
        size: The lowest 32 bits of its size when git read it.
        settled: Whether git takes it as it is: it is not looked at in the worktree.
        conflict: Whether a merge has left it open.
    """

    path: bytes
    mode: int
    id: bytes
    mtime: tuple[int, int]
    size: int
    settled: bool
    conflict: bool


@dataclass(frozen=True)
class Index:
    """The tracked files, and the ids of the folders that are as in the commit of the last read.

    `trees` has the id of the tree of each unchanged folder; the path of the root is b"".
    """

    entries: list[Entry]
    trees: dict[bytes, bytes]


def read_index(path: Path, id_bytes: int) -> Index:
    """Read the index.  Raises UnreadableError."""
    data = read_file(path, MAX_BYTES)
    try:
        return _parsed(data, id_bytes)
    except (struct.error, IndexError, ValueError) as error:
        raise UnreadableError(f"the index is damaged: {error}") from error


def _parsed(data: bytes, id_bytes: int) -> Index:
    magic, version, count = _HEAD.unpack_from(data)
    if magic != b"DIRC" or version not in _VERSIONS or count > MAX_FILES:
        raise UnreadableError("the index has an unknown form")
    entries: list[Entry] = []
    at, path = _HEAD.size, b""
    for _ in range(count):
        entry, at = _entry(data, at, path, version, id_bytes)
        path = entry.path
        entries.append(entry)
    trees: dict[bytes, bytes] = {}
    for name, content in _extensions(data[at : len(data) - id_bytes]):
        if name in _UNKNOWN:
            raise UnreadableError(f"the index has the extension {name!r}")
        if name == b"TREE":
            _read_trees(content, id_bytes, trees)
    return Index(entries, trees)


def _entry(
    data: bytes, start: int, before: bytes, version: int, id_bytes: int
) -> tuple[Entry, int]:
    """Return the entry at an offset, and the offset after it."""
    _, _, seconds, nanoseconds, _, _, mode, _, _, size, name, flags = _FIXED[id_bytes].unpack_from(
        data, start
    )
    at = start + _FIXED[id_bytes].size
    settled = bool(flags & _ASSUME_VALID)
    if flags & _EXTENDED:
        (more,) = _FLAGS.unpack_from(data, at)
        at += _FLAGS.size
        settled |= bool(more & _SKIP_WORKTREE)
    kept = b""
    if version == 4:
        cut, at = _offset(data, at)
        kept = before[: max(0, len(before) - cut)]
    end = data.index(b"\0", at)
    path = _checked(kept + data[at:end])
    # Up to version 3, zeros pad an entry to a multiple of 8 bytes.
    after = end + 1 if version == 4 else start + (end - start + 8) // 8 * 8
    mtime, conflict = (seconds, nanoseconds), flags & _STAGE != 0
    return Entry(path, mode, name, mtime, size, settled, conflict), after


def _checked(path: bytes) -> bytes:
    if len(path) > MAX_PATH:  # a hostile index repeats a long path at no cost
        raise UnreadableError("a path of the index is too long")
    return path


def _offset(data: bytes, at: int) -> tuple[int, int]:
    """Return the number of bytes that a path does not share with the one before."""
    value, byte = -1, 0x80
    while byte & 0x80:
        byte, at = data[at], at + 1
        value = (value + 1) << 7 | byte & 0x7F
        if value > MAX_BYTES:
            raise UnreadableError("a path of the index is too long")
    return value, at


def _extensions(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "big")
        yield data[at : at + 4], data[at + 8 : at + 8 + length]
        at += 8 + length


def _read_trees(data: bytes, id_bytes: int, trees: dict[bytes, bytes]) -> None:
    """Read the folders: path, files (-1: changed), folders in it, id; the parent comes first."""
    at = 0
    open_folders: list[tuple[bytes, int]] = []  # the path, and its folders that are to come
    while at < len(data):
        end = data.index(b"\0", at)
        line = data.index(b"\n", end)
        files, _, folders = data[end + 1 : line].partition(b" ")
        name = data[at:end]
        while open_folders and open_folders[-1][1] == 0:
            open_folders.pop()
        if open_folders:
            above, left = open_folders.pop()
            open_folders.append((above, left - 1))
            name = _checked(above + b"/" + name if above else name)
        at = line + 1
        if int(files) >= 0:
            trees[name] = data[at : at + id_bytes]
            at += id_bytes
        open_folders.append((name, int(folders)))
