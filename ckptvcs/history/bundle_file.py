"""Bundle file: one file with commits of a repository, as whole packs and a manifest of them.

    header | pack pack ... | manifest | trailer

A reader checks the hash of the whole file before it uses anything.  Nothing in the file says where
to write: packs are named by their hash, and objects by their id.
Layout: docs/format.md, "Bundle file".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from ckptvcs.errors import (
    CorruptionError,
    InvalidInputError,
    StorageError,
    TruncatedError,
    UnsupportedVersionError,
)
from ckptvcs.hashing import hasher
from ckptvcs.history.commit import PARTS
from ckptvcs.history.fields import ID, TEXT, Fields, many, mapping, optional
from ckptvcs.history.format_file import FLAGS
from ckptvcs.history.records import ARCHIVED, Archived
from ckptvcs.history.refs import check_name
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import Files
from ckptvcs.store.ids import ObjectId, PackId

VERSION = 1
_HEADER = struct.Struct("<8sHHI")  # magic, version, zero, zero
_TRAILER = struct.Struct("<QQ32s8s")  # manifest offset, manifest length, hash, magic
_MAGIC, _END_MAGIC = b"CKPTARCH", b"CKPTAEND"
_MAX_MANIFEST = 1 << 26  # bytes
_LEAST_PACK = packs.HEADER.size + packs.TRAILER.size
_BLOCK = 1 << 22  # bytes

Write = Callable[[bytes | memoryview], object]


@dataclass(frozen=True)
class BundledPack:
    """A pack of a bundle file."""

    folder: str
    id: ObjectId
    bytes: int


@dataclass(frozen=True)
class BundledCommit:
    """A commit of a bundle file.

    It has the parts that are in the file, those of them with an exact patch, and the names of other
    objects that it could lose, such as the errors of its tensors. `form` says how the commit is
    archived, if it is.
    """

    id: ObjectId
    parts: tuple[str, ...]
    patches: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    form: Archived | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of a bundle file.

    Attributes:
        commits: The whole commits, ancestors first.
        refs: Branches (`heads/NAME`), tags (`tags/NAME`) and pins (`pins/ID`) of these commits.
        flags: The format flags of the repository, by operation.
        head: The branch that HEAD of a clone follows.
        packs: The packs, in the order of their bytes.
    """

    commits: tuple[BundledCommit, ...]
    refs: Mapping[str, ObjectId]
    flags: Mapping[str, tuple[str, ...]]
    head: str | None = None
    packs: tuple[BundledPack, ...] = ()


_MANIFEST = Fields(
    Manifest,
    commits=many(Fields(BundledCommit, form=optional(ARCHIVED)).type),
    refs=mapping(ID),
    flags=mapping(many(TEXT)),
    packs=many(Fields(BundledPack).type),
)

Listed = dict[str, tuple[int, int]]
"""The name of each pack file, with its offset in the bundle file and its length."""


# -- writing -----------------------------------------------------------------------------------


class BundleWriter:
    """Writes a bundle file in one pass."""

    def __init__(self, write: Write) -> None:
        self._out, self._hash, self._at = write, hasher(threads=True), 0
        self._packs: list[BundledPack] = []
        self.write(_HEADER.pack(_MAGIC, VERSION, 0, 0))

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._out(data)
        self._hash.update(data)
        self._at += len(data)

    def publish(self, name: str) -> None:
        """End a pack that was written with `write`: the name of its file says which."""

    def abort(self) -> None:
        """Do nothing: whoever writes the file deletes it."""

    def new_pack(self, folder: str) -> packs.PackWriter:
        """Begin a pack, which `add` ends."""
        return packs.PackWriter(self, folder)

    def add(self, pack: packs.PackWriter) -> None:
        """End a pack."""
        info = pack.publish()
        self._packs.append(BundledPack(info.folder, ObjectId(info.id), info.size_bytes))

    def copy_pack(self, backend: Files, pack: PackId, folder: str) -> None:
        """Copy a whole pack of a repository.

        Raises:
            CorruptionError: the pack is damaged.
            FileNotFoundError: the pack does not exist.
        """
        start = self._at
        for data in checked_blocks(backend, pack, folder):
            self.write(data)
        self._packs.append(BundledPack(folder, ObjectId(pack), self._at - start))

    def finish(self, manifest: Manifest) -> int:
        """Write the manifest and the trailer; return the bytes of the bundle file."""
        content = _MANIFEST.dump(replace(manifest, packs=tuple(self._packs)))
        start = self._at
        self.write(content)
        self._out(_TRAILER.pack(start, len(content), self._hash.digest(), _END_MAGIC))
        return self._at + _TRAILER.size


def checked_blocks(backend: Files, pack: PackId, folder: str) -> Iterator[bytes]:
    """Yield the bytes of a pack; the last block comes after the check of its name.

    Raises:
        CorruptionError: the pack does not have the hash that is its name.
        FileNotFoundError: the pack does not exist.
    """
    file, digest, at = packs.pack_name(folder, pack), hasher(), 0
    pending = b""
    while data := backend.read(file, at, _BLOCK):
        if pending:
            yield pending
        digest.update(data)
        at, pending = at + len(data), data
    if digest.hexdigest() != pack:
        raise CorruptionError(
            f"{file} is damaged: its bytes have another hash", hint="run 'ckpt verify'"
        )
    yield pending


# -- reading -----------------------------------------------------------------------------------


class BundleFile:
    """An open bundle file: the files of its packs, and its manifest.

    `check` must come first.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Open the bundle file in a file; `name` names it in messages.

        Raises:
            CorruptionError: the file is not a bundle file, or is truncated or damaged.
            UnsupportedVersionError: a newer program wrote it.
        """
        self._file, self._name = file, name
        self._size = os.fstat(file.fileno()).st_size
        head = self._read(0, _HEADER.size)
        magic, version, _, _ = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
        if magic != _MAGIC:
            raise CorruptionError(f"{name} is not a bundle file")
        if version > VERSION:
            raise UnsupportedVersionError(f"{name} has version {version}", hint="upgrade ckptvcs")
        if self._size < _HEADER.size + _TRAILER.size:
            raise self._truncated()
        trailer = self._read(self._size - _TRAILER.size, _TRAILER.size)
        start, length, self._digest, end = _TRAILER.unpack(trailer)
        if end != _END_MAGIC or start + length + _TRAILER.size != self._size:
            raise self._truncated()
        if length > _MAX_MANIFEST:
            raise CorruptionError(f"{name} is damaged: its manifest has {length} bytes")
        self._manifest_at = start, length
        self._listed: Listed = {}
        self.manifest = Manifest((), {}, {})

    def __str__(self) -> str:
        return self._name

    def _truncated(self) -> TruncatedError:
        return TruncatedError(f"{self._name} is truncated", hint="copy the file again")

    def _read(self, offset: int, length: int) -> bytes:
        parts = []
        try:
            while length and (part := os.pread(self._file.fileno(), min(length, 1 << 30), offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        except OSError as error:
            raise StorageError(f"cannot read {self._name}: {error.strerror}") from error
        return b"".join(parts)

    def check(self) -> None:
        """Check the hash of the whole file, and read the manifest.

        Raises:
            CorruptionError: the file is damaged, or its manifest is invalid.
            UnsupportedVersionError: it needs features that this program lacks.
        """
        digest, at = hasher(threads=True), 0
        end = self._size - _TRAILER.size
        while at < end:
            data = self._read(at, min(_BLOCK, end - at))
            if not data:
                raise self._truncated()
            digest.update(data)
            at += len(data)
        if digest.digest() != self._digest:
            raise CorruptionError(
                f"{self._name} is damaged: its hash does not match", hint="copy the file again"
            )
        start, length = self._manifest_at
        self.manifest = _MANIFEST.load(self._read(start, length), self._name)
        _check_manifest(self.manifest, self._name)
        self._listed = _placed(self.manifest.packs, start)

    def names(self, folder: str) -> Iterator[str]:
        return (name for name in self._listed if name.startswith(f"{folder}/"))

    def size(self, name: str) -> int:
        if name not in self._listed:
            raise FileNotFoundError(name)
        return self._listed[name][1]

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        size = self.size(name)
        left = max(0, size - offset)
        return self._read(
            self._listed[name][0] + offset, left if length is None else min(left, length)
        )


def _placed(listed: Sequence[BundledPack], end: int) -> Listed:
    """Return the places of packs, which fill the file up to `end`."""
    found: Listed = {}
    at = _HEADER.size
    for pack in listed:
        if pack.folder not in packs.FOLDERS or pack.bytes < _LEAST_PACK:
            raise CorruptionError("a bundle file lists an invalid pack")
        name = packs.pack_name(pack.folder, PackId(pack.id))
        if name in found:
            raise CorruptionError("a bundle file lists a pack twice")
        found[name] = at, pack.bytes
        at += pack.bytes
    if at != end:
        raise CorruptionError("a bundle file does not consist of the packs that it lists")
    return found


def _check_manifest(manifest: Manifest, name: str) -> None:
    known = {commit.id for commit in manifest.commits}
    if len(known) != len(manifest.commits) or not known:
        raise CorruptionError(f"{name} lists no commits, or a commit twice")
    for commit in manifest.commits:
        if not set(commit.patches) <= set(commit.parts) <= set(PARTS):
            raise CorruptionError(f"{name} lists invalid parts of a commit")
    for ref, target in manifest.refs.items():
        if target not in known or not _is_ref(ref, target):
            raise CorruptionError(f"{name} has an invalid ref")
    if manifest.head is not None and f"heads/{manifest.head}" not in manifest.refs:
        raise CorruptionError(f"{name} has an invalid HEAD")
    _check_flags(manifest.flags, name)


def _is_ref(ref: str, target: ObjectId) -> bool:
    space, _, name = ref.partition("/")
    if space == "pins":
        return name == target
    try:
        check_name(name, "ref")
    except InvalidInputError:
        return False
    return space in ("heads", "tags")


def _check_flags(flags: Mapping[str, Sequence[str]], name: str) -> None:
    unknown = {
        flag for op, names in flags.items() for flag in names if flag not in FLAGS.get(op, ())
    }
    if unknown:
        raise UnsupportedVersionError(
            f"{name} needs features that this program lacks: {', '.join(sorted(unknown))}",
            hint="upgrade ckptvcs",
        )
