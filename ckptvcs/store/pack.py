"""Pack files: many objects in one write-once file with a table of contents (toc).

    header | record record ... record | toc | trailer
    record = [region] head payload

Each head begins with a magic, so that a forward scan finds the records if the toc is damaged.  A
region is the raw bytes of a record (the slices of a bundle).  The nonce in the trailer makes the
name of each pack unique.  So writing the same objects again never races with the deletion of an
old pack.  Layout: docs/format.md, "Pack".
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import zstandard

from ckptvcs.errors import (
    CorruptionError,
    InvalidInputError,
    TruncatedError,
    UnsupportedVersionError,
    refuse_memory,
)
from ckptvcs.hashing import hash_of, hasher
from ckptvcs.store.backend import Backend, Writer
from ckptvcs.store.ids import MAX_OBJECT_BYTES, Kind, ObjectId, PackId, object_id

HEADER = struct.Struct("<8sHHI")  # magic, version, flags, zero
_HEAD = struct.Struct(
    "<4sBBH32s32sQQQ"
)  # magic, kind, encoding, zero, id, base, region, raw, stored
_CHECK = struct.Struct("<I")  # crc32 of the head
_ENTRY = struct.Struct("<Q")  # offset of the head, before a copy of the head
TRAILER = struct.Struct("<QQ16s32s8s")  # toc offset, toc length, nonce, toc hash, magic

_MAGIC, _RECORD_MAGIC, _END_MAGIC = b"CKPTPACK", b"CKOB", b"CKPTEND1"
VERSION = 1
_NO_BASE = bytes(32)
_KINDS = frozenset(map(int, Kind))
RAW, ZSTD, ZSTD_ON_BASE = 0, 1, 2
_LEVEL = 9  # objects are small and read often


@dataclass(frozen=True)
class Entry:
    """The position and encoding of one object in its pack."""

    id: ObjectId
    kind: Kind
    encoding: int
    base: ObjectId | None
    offset: int
    region_bytes: int
    raw_bytes: int
    stored_bytes: int

    @property
    def payload_offset(self) -> int:
        """Offset of the payload in the pack."""
        return self.offset + _HEAD.size + _CHECK.size

    @property
    def record_bytes(self) -> int:
        """Bytes of the record, including its region."""
        return self.region_bytes + _HEAD.size + _CHECK.size + self.stored_bytes

    def head(self) -> bytes:
        """Return the stored head, without its crc32."""
        return _HEAD.pack(
            _RECORD_MAGIC,
            self.kind,
            self.encoding,
            0,
            bytes.fromhex(self.id),
            bytes.fromhex(self.base) if self.base else _NO_BASE,
            self.region_bytes,
            self.raw_bytes,
            self.stored_bytes,
        )


def _parse_head(head: bytes, offset: int) -> Entry:
    magic, kind, encoding, _, name, base, region, raw, stored = _HEAD.unpack(head)
    if magic != _RECORD_MAGIC or kind not in _KINDS or encoding > ZSTD_ON_BASE or region > offset:
        raise CorruptionError("a pack contains an invalid record")
    return Entry(
        ObjectId(name.hex()),
        Kind(kind),
        encoding,
        None if base == _NO_BASE else ObjectId(base.hex()),
        offset,
        region,
        raw,
        stored,
    )


@dataclass(frozen=True)
class PackInfo:
    """A published pack."""

    id: PackId
    folder: str
    size_bytes: int
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """Name of the pack file in the backend."""
        return pack_name(self.folder, self.id)


FOLDERS = ("packs", "meta")
"""The folders of data packs and meta packs."""


def pack_name(folder: str, pack: PackId) -> str:
    """Return the name of a pack file: `packs/ab/abcd….pack`."""
    return f"{folder}/{pack[:2]}/{pack}.pack"


def packed_size(entries: Iterable[Entry]) -> int:
    """Return the size in bytes of a pack with these objects."""
    body = sum(entry.record_bytes + _ENTRY.size + _HEAD.size for entry in entries)
    return HEADER.size + body + TRAILER.size


class PackWriter:
    """Streams objects into a new pack, one at a time."""

    def __init__(self, writer: Writer, folder: str) -> None:
        self._writer = writer
        self._folder = folder
        self._hash = hasher()
        self._at = 0
        self._region = 0
        self._entries: list[Entry] = []
        try:
            self._write(HEADER.pack(_MAGIC, VERSION, 0, 0))
        except BaseException:
            self.abort()  # the caller cannot do so without this object
            raise

    def _write(self, data: bytes | memoryview) -> None:
        self._writer.write(data)
        self._hash.update(data)
        self._at += len(data)

    def append_region(self, data: bytes | memoryview) -> None:
        """Add bytes to the region of the next object."""
        self._write(data)
        self._region += len(data)

    def __contains__(self, name: ObjectId) -> bool:
        return any(entry.id == name for entry in self._entries)

    def add(
        self, kind: Kind, content: bytes, base: tuple[ObjectId, bytes] | None = None
    ) -> ObjectId:
        """Append an object, compressed with `base` (id and content of a similar object) if smaller.

        Raises:
            InvalidInputError: the object is too large.
        """
        if len(content) > MAX_OBJECT_BYTES:
            raise InvalidInputError(
                f"the structure of this checkpoint is too large: {len(content)} bytes",
                hint="commit it with --raw",
            )
        name = object_id(kind, content)
        encoding, payload = RAW, content
        try:
            for option, candidate in _encodings(content, base[1] if base else None):
                if len(candidate) < len(payload):
                    encoding, payload = option, candidate
        except zstandard.ZstdError as error:
            refuse_memory(error)
            raise
        base_id = base[0] if base and encoding == ZSTD_ON_BASE else None
        entry = Entry(
            name, kind, encoding, base_id, self._at, self._region, len(content), len(payload)
        )
        self._append(entry, payload)
        return name

    def copy(self, entry: Entry, region: bytes, payload: bytes) -> None:
        """Append an object of another pack without re-encoding; the caller has verified it."""
        self.append_region(region)
        self._append(replace(entry, offset=self._at), payload)

    def _append(self, entry: Entry, payload: bytes) -> None:
        head = entry.head()
        self._write(head + _CHECK.pack(zlib.crc32(head)) + payload)
        self._entries.append(entry)
        self._region = 0

    @property
    def size_bytes(self) -> int:
        """Bytes written so far."""
        return self._at

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Objects added so far."""
        return tuple(self._entries)

    def publish(self, announce: Callable[[PackInfo], None] = lambda _: None) -> PackInfo:
        """Finish the file, call `announce` with its description, and publish it durably.

        A crash before that leaves debris in tmp/.
        """
        toc = b"".join(_ENTRY.pack(entry.offset) + entry.head() for entry in self._entries)
        start = self._at
        self._write(toc)
        nonce = os.urandom(16)
        self._write(TRAILER.pack(start, len(toc), nonce, hash_of(toc), _END_MAGIC))
        info = PackInfo(
            PackId(self._hash.hexdigest()), self._folder, self._at, tuple(self._entries)
        )
        announce(info)
        self._writer.publish(info.name)
        return info

    @property
    def is_empty(self) -> bool:
        """Whether no object was added."""
        return not self._entries

    def abort(self) -> None:
        """Delete the unfinished pack.  Does nothing after `publish`."""
        self._writer.abort()


def _encodings(content: bytes, base: bytes | None) -> Iterator[tuple[int, bytes]]:
    yield ZSTD, zstandard.ZstdCompressor(level=_LEVEL).compress(content)
    if base:
        dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL,
            source_size=len(content) + len(base),
            dict_size=len(base),
            window_log=min(27, max(10, (len(content) + len(base)).bit_length())),
        )
        compressor = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
        yield ZSTD_ON_BASE, compressor.compress(content)


def decode_object(entry: Entry, payload: bytes, base: Callable[[ObjectId], bytes]) -> bytes:
    """Return the content of an object from its payload, checked against its id.

    Raises:
        CorruptionError: the payload does not decode to this object.
    """
    if entry.raw_bytes > MAX_OBJECT_BYTES:
        raise CorruptionError(f"object {entry.id} claims {entry.raw_bytes} bytes")
    if entry.encoding == RAW:
        content = payload
    else:
        dictionary = None
        if entry.encoding == ZSTD_ON_BASE:
            if entry.base is None:
                raise CorruptionError(f"object {entry.id} has no base")
            dictionary = zstandard.ZstdCompressionDict(
                base(entry.base), dict_type=zstandard.DICT_TYPE_RAWCONTENT
            )
        try:
            frame = zstandard.get_frame_parameters(payload)
            if frame.content_size != entry.raw_bytes:
                raise CorruptionError(f"object {entry.id} does not have its declared size")
            content = zstandard.ZstdDecompressor(
                dict_data=dictionary, max_window_size=1 << 29
            ).decompress(payload)
        except zstandard.ZstdError as error:
            refuse_memory(error)
            raise CorruptionError(f"object {entry.id} is damaged ({error})") from error
    if object_id(entry.kind, content) != entry.id:
        raise CorruptionError(f"object {entry.id} is damaged: its content has another hash")
    return content


def read_entries(backend: Backend, name: str) -> tuple[Entry, ...]:
    """Return the objects of a pack, from its table of contents.

    Raises:
        UnsupportedVersionError: a newer program wrote the pack.
        CorruptionError: the table is damaged; `scan_entries` may still find the records.
    """
    size = backend.size(name)
    if size < HEADER.size + TRAILER.size:
        raise TruncatedError(f"{name} is too short for a pack")
    magic, version, _, _ = HEADER.unpack(_exactly(backend, name, 0, HEADER.size))
    if magic != _MAGIC:
        raise CorruptionError(f"{name} is not a pack")
    if version > VERSION:
        if hash_pack(backend, name) != PurePosixPath(name).stem:
            raise CorruptionError(f"{name} is damaged: its bytes have another hash")
        raise UnsupportedVersionError(
            f"{name} has pack version {version}", hint="upgrade ckptvcs to read this repository"
        )
    trailer = _exactly(backend, name, size - TRAILER.size, TRAILER.size)
    start, length, _, digest, end = TRAILER.unpack(trailer)
    step = _ENTRY.size + _HEAD.size
    if end != _END_MAGIC or start + length + TRAILER.size != size or length % step:
        raise TruncatedError(f"{name} has no table of contents at its end")
    toc = _exactly(backend, name, start, length)
    if hash_of(toc) != digest:
        raise CorruptionError(f"{name} has a damaged table of contents")
    return tuple(
        _parse_head(toc[at + _ENTRY.size : at + step], _ENTRY.unpack_from(toc, at)[0])
        for at in range(0, length, step)
    )


def scan_entries(backend: Backend, name: str) -> tuple[Entry, ...]:
    """Find the objects of a pack by their magic, without its table of contents."""
    entries: list[Entry] = []
    block, at, tail = 1 << 24, 0, b""
    size = _HEAD.size + _CHECK.size
    while data := backend.read(name, at, block):
        window = tail + data
        start = at - len(tail)
        hit = window.find(_RECORD_MAGIC)
        while hit >= 0 and hit + size <= len(window):
            head = window[hit : hit + _HEAD.size]
            if _CHECK.pack(zlib.crc32(head)) == window[hit + _HEAD.size : hit + size]:
                with contextlib.suppress(CorruptionError):  # region bytes may look like a head
                    entries.append(_parse_head(head, start + hit))
            hit = window.find(_RECORD_MAGIC, hit + 1)
        at += len(data)
        tail = window[-(size - 1) :]
    return tuple(dict.fromkeys(entries))


def find_entries(backend: Backend, name: str) -> tuple[Entry, ...]:
    """Return the objects of a pack from its table of contents, or by a scan if that is damaged.

    Raises:
        FileNotFoundError: the pack does not exist.
        UnsupportedVersionError: a newer program wrote the pack.
    """
    try:
        return read_entries(backend, name)
    except CorruptionError:
        return scan_entries(backend, name)


def hash_pack(backend: Backend, name: str) -> PackId:
    """Return the BLAKE3 hash of a pack file, which must be its name."""
    digest = hasher(threads=True)
    at = 0
    while data := backend.read(name, at, 1 << 24):
        digest.update(data)
        at += len(data)
    return PackId(digest.hexdigest())


def read_head(backend: Backend, name: str, entry: Entry) -> None:
    """Check that the record is at the indexed offset.  Raises CorruptionError."""
    head = _exactly(backend, name, entry.offset, _HEAD.size)
    if head != entry.head():
        raise CorruptionError(f"{name} does not contain object {entry.id} at {entry.offset}")


def _exactly(backend: Backend, name: str, offset: int, length: int) -> bytes:
    data = backend.read(name, offset, length)
    if len(data) != length:
        raise TruncatedError(f"{name} ends at {offset + len(data)}, needed {offset + length}")
    return data


def read_payload(backend: Backend, name: str, entry: Entry) -> bytes:
    """Return the encoded payload of an object.  Raises TruncatedError, CorruptionError."""
    if entry.stored_bytes > MAX_OBJECT_BYTES:
        raise CorruptionError(f"object {entry.id} claims {entry.stored_bytes} stored bytes")
    return _exactly(backend, name, entry.payload_offset, entry.stored_bytes)


def read_region(backend: Backend, name: str, entry: Entry, offset: int, length: int) -> bytes:
    """Return `length` bytes of an object's region.  Raises TruncatedError, CorruptionError."""
    if offset < 0 or length < 0 or offset + length > entry.region_bytes:
        raise CorruptionError(f"object {entry.id} refers to bytes outside its region")
    return _exactly(backend, name, entry.offset - entry.region_bytes + offset, length)
