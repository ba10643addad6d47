"""torch.save zip files -> layout.

The zip directory lists the storages; the pickle only names them.  Uncompressed records under
`data/` are payloads.  All other bytes, with padding and directory, are literal.  A zip file has the
checksum of a payload in several places (data descriptor, central directory, local header).  These
become checksum segments, so that a file restored with near values has valid checksums.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ckptvcs.checkpoint.layout import BLOCK_BYTES, Checksum, Layout, Source, overlap
from ckptvcs.checkpoint.pickle_reader import MAX_PICKLE_BYTES, read_pickle
from ckptvcs.checkpoint.torch_storages import Storage, set_order, stored_tensors
from ckptvcs.history.schema import BIG, LITTLE, UNKNOWN

END = struct.Struct("<4sHHHHIIH")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR64 = struct.Struct("<4sIQI")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MAX_DIRECTORY = 1 << 28
_MAX_COMMENT = 1 << 16
UNFIT = 0xFFFFFFFF  # in place of a size or an offset that needs zip64

ARRAYS_RECORD = "ckptvcs.arrays"
"""A record in the files of Python states: the paths of the numpy arrays."""


@dataclass(frozen=True)
class _Entry:
    name: str
    method: int
    crc: int
    crc_offset: int
    size: int
    local: int

    @property
    def inner(self) -> str:
        """Return the name without the folder of all records."""
        return self.name.partition("/")[2]


def starts_like_zip(file: Source) -> bool:
    """Return whether the file starts like a zip file (torch makes the same check)."""
    return file.size > 0 and file.read(0, min(4, file.size)) == b"PK\x03\x04"[: file.size]


def has_end(file: Source) -> bool:
    """Return whether the file has an end record; a file that is being written has none."""
    start = max(0, file.size - END.size - _MAX_COMMENT)
    return b"PK\x05\x06" in file.read(start, file.size - start)


def _find_end(file: Source) -> tuple[int, int, int] | None:
    """Return the number of entries in the directory, its size and its offset, or None."""
    start = max(0, file.size - END.size - _MAX_COMMENT)
    tail = file.read(start, file.size - start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        return None
    _, _, _, _, count, size, offset, _ = END.unpack_from(tail, at)
    position = start + at
    if position >= LOCATOR64.size:
        magic, *_ = LOCATOR64.unpack(file.read(position - LOCATOR64.size, LOCATOR64.size))
        position64 = position - LOCATOR64.size - END64.size
        if magic == b"PK\x06\x07" and position64 >= 0:
            fields = END64.unpack(file.read(position64, END64.size))
            if fields[0] == b"PK\x06\x06":
                count, size, offset = fields[7], fields[8], fields[9]
                position = position64
    # The directory ends at its end record.  Offsets count from the start of the save.
    directory = position - size
    return (count, size, directory) if directory >= offset >= 0 else None


def _directory(file: Source) -> list[_Entry] | None:
    """Return the entries of the central directory, or None if it is missing or damaged."""
    end = _find_end(file)
    if end is None or end[1] > _MAX_DIRECTORY:
        return None
    count, size, start = end
    data = file.read(start, size)
    entries: list[_Entry] = []
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > size:
            return None
        fields = CENTRAL.unpack_from(data, at)
        method, crc, stored, length = fields[4], fields[7], fields[8], fields[9]
        name_size, extra_size, comment_size, local = fields[10], fields[11], fields[12], fields[16]
        name_at = at + CENTRAL.size
        extra = data[name_at + name_size : name_at + name_size + extra_size]
        if UNFIT in (stored, length, local):
            stored, length, local = _zip64(extra, stored, length, local)
        if fields[0] != b"PK\x01\x02" or (method == 0 and stored != length):
            return None
        name = data[name_at : name_at + name_size].decode("utf-8", "surrogateescape")
        entries.append(_Entry(name, method, crc, start + at + 16, length, local))
        at = name_at + name_size + extra_size + comment_size
    return entries


def _zip64(extra: bytes, stored: int, length: int, local: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = iter(
                struct.unpack_from(f"<{size // 8}Q", extra, at + 4)
                if at + 4 + size <= len(extra)
                else ()
            )
            length = next(values, length) if length == UNFIT else length
            stored = next(values, stored) if stored == UNFIT else stored
            local = next(values, local) if local == UNFIT else local
            break
        at += 4 + size
    return stored, length, local


def _payload(file: Source, entry: _Entry) -> int | None:
    """Return the offset of a record's payload; None if it does not lie in the file."""
    if entry.local + LOCAL.size > file.size:
        return None
    fields = LOCAL.unpack(file.read(entry.local, LOCAL.size))
    start: int = entry.local + LOCAL.size + fields[9] + fields[10]
    return start if fields[0] == b"PK\x03\x04" and start + entry.size <= file.size else None


def _crc(file: Source, offset: int, size: int) -> int:
    crc = 0
    for at in range(offset, offset + size, BLOCK_BYTES):
        crc = zlib.crc32(file.read(at, min(BLOCK_BYTES, offset + size - at)), crc)
    return crc


def is_archive(file: Source) -> bool:
    """Return whether a zip file has a readable directory and contains all its records."""
    entries = _directory(file) or []
    return bool(entries) and all(
        _payload(file, entry) is not None
        if entry.method == 0
        else entry.local + LOCAL.size <= file.size
        for entry in entries
    )


def is_of_torch(file: Source) -> bool:
    """Return whether a zip file has a record that torch.save or TorchScript writes, if readable."""
    entries = _directory(file)
    return not entries or any(
        entry.name.rpartition("/")[2] in ("data.pkl", "constants.pkl", "version", "model.json")
        for entry in entries
    )


class Checksums(Enum):
    """Which checksums of tensors become segments that a restore computes; others are literal."""

    PROVEN = "valid checksums of stored tensors"
    TRUSTED = "all checksums of stored tensors, without a check"
    LITERAL = "none"
    SMALL = "valid checksums of inline tensors"


def parse(file: Source, *, checksums: Checksums = Checksums.PROVEN) -> Layout | None:
    """Return the layout of a torch.save zip file, or None for any other file."""
    entries = _directory(file) or []
    contents = _read(file, entries)
    if contents is None:
        return None
    layout, payloads = contents
    storages = [storage for storage, _ in payloads]
    if not storages and layout.problem is not None:
        return None
    if len({storage.key for storage in storages}) < len(storages):
        return None  # with duplicate keys, each tensor would belong to several storages
    compressed = sum(entry.inner.startswith("data/") and entry.method != 0 for entry in entries)
    if compressed and layout.problem is None:
        layout.problem = f"{compressed} of its records are compressed"
    layout.tensors = stored_tensors(storages, layout.tree)
    remark = set_order(layout.tensors, _order(file, entries))
    layout.remarks = () if remark is None else (remark,)
    for number, (storage, entry) in enumerate(payloads):
        if _is_computed(file, storage, entry, layout.tensors[number].inline, checksums):
            layout.checksums += _places(file, storage, entry, number)
    return layout


def _read(
    file: Source, entries: list[_Entry]
) -> tuple[Layout, list[tuple[Storage, _Entry]]] | None:
    """Read the uncompressed records; return None if they overlap.

    The layout has the tree of the pickle, or the problem with it, and the paths of numpy arrays.
    """
    places = [(_payload(file, entry), entry) for entry in entries if entry.method == 0]
    stored = [(start, entry) for start, entry in places if start is not None]
    if overlap((start, entry.size) for start, entry in stored):
        return None  # before any record is read: thousands of entries may point at one record
    layout = Layout("torch-zip", [], problem="it has no torch.save pickle")
    payloads = []
    for start, entry in stored:
        if entry.inner.startswith("data/"):
            payloads.append((Storage(entry.inner[5:], start, entry.size), entry))
        elif entry.inner == "data.pkl" and entry.size > MAX_PICKLE_BYTES:
            layout.problem = "its pickle is larger than 1 GiB"
        elif entry.inner == "data.pkl":
            try:
                data = io.BytesIO(file.read(start, entry.size))
                layout.tree, layout.problem = read_pickle(data, entry.size), None
            except pickle.UnpicklingError as error:
                # Without a tree, the tensors have no names and are exact.
                layout.tree, layout.problem = None, str(error)
        elif entry.inner == ARRAYS_RECORD and entry.size <= MAX_PICKLE_BYTES:
            layout.arrays = _arrays(file.read(start, entry.size))
    return layout, payloads


def _is_computed(
    file: Source, storage: Storage, entry: _Entry, inline: bool, checksums: Checksums
) -> bool:
    """Return whether a restore computes the checksum of a tensor."""
    if checksums is Checksums.LITERAL or inline != (checksums is Checksums.SMALL):
        return False
    # With some options, torch.save writes wrong checksums.
    proven = checksums is Checksums.PROVEN
    return not proven or _crc(file, storage.offset, storage.size) == entry.crc


def _places(file: Source, storage: Storage, entry: _Entry, number: int) -> Iterator[Checksum]:
    """Yield the checksums of payload `number`."""
    yield Checksum(entry.crc_offset, number)
    crc = struct.pack("<I", entry.crc)
    if entry.crc and file.read(entry.local + 14, 4) == crc:  # the writer knew it in advance
        yield Checksum(entry.local + 14, number)
    after = storage.offset + storage.size
    if after + 8 <= file.size and file.read(after, 8) == b"PK\x07\x08" + crc:
        yield Checksum(after + 4, number)


def _order(file: Source, entries: list[_Entry]) -> str:
    """Return the byte order of the machine that wrote the file."""
    orders = set()
    for entry in entries:
        start = _payload(file, entry)
        if entry.inner == "byteorder" and start is not None:
            plain = entry.method == 0 and entry.size in (len(BIG), len(LITTLE))
            text = file.read(start, entry.size) if plain else b""
            orders.add(text.decode("latin1") if text in (b"big", b"little") else UNKNOWN)
    return LITTLE if not orders else orders.pop() if len(orders) == 1 else UNKNOWN


def why_not(file: Source) -> str:
    """Return why `parse` does not accept a zip file."""
    entries = _directory(file)
    if entries is None:
        return "the directory of the zip file is damaged"
    pickled = {entry.inner: entry for entry in entries}.get("data.pkl")
    if pickled is None:
        return "it is a zip file without a torch.save pickle"
    if pickled.method:
        return "its records are compressed"
    return "its records overlap or are not readable"


def _arrays(data: bytes) -> frozenset[str]:
    """Return the paths of a state's numpy arrays."""
    try:
        return frozenset(str(path) for path in json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return frozenset()
