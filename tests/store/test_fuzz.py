"""Packs that somebody else made: read, or refused as damage."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.catalog import Catalog, keys_of
from ckptvcs.store.backend import read_small
from ckptvcs.store.ids import Kind, ObjectId, PackId, object_id
from ckptvcs.store.local import LocalBackend
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import (
    HEADER,
    TRAILER,
    ZSTD,
    ZSTD_ON_BASE,
    Entry,
    PackWriter,
    decode_object,
    pack_name,
    read_entries,
    read_payload,
    read_region,
    scan_entries,
)
from tests.helpers.fuzzing import little_room, mutated, read_or_refuse
from tests.helpers.memory_backend import MemoryBackend

CONTENT = bytes(range(256)) * 12
HEAD_BYTES = 96
NAME = "packs/ab/x.pack"


def make() -> bytes:
    backend = MemoryBackend()
    pack = PackWriter(backend.writer(), "packs")
    base = pack.add(Kind.SKELETON, CONTENT)
    pack.add(Kind.SKELETON, CONTENT[:2000] + b"changed" + CONTENT[2000:], (base, CONTENT))
    pack.append_region(b"slice one")
    pack.add(Kind.BUNDLE, b"{}" * 50)
    pack.add(Kind.COMMIT, b"")
    return backend.files[pack.publish().name]


GOOD = make()
TOC_AT, TOC_BYTES = TRAILER.unpack(GOOD[-TRAILER.size :])[:2]


def sealed(body: bytes, toc: bytes) -> bytes:
    """A pack whose table of contents is whole, whatever it says."""
    trailer = TRAILER.pack(len(body), len(toc), bytes(16), blake3(toc).digest(), b"CKPTEND1")
    return body + toc + trailer


def checked(data: bytes) -> bytes:
    """The same with the right sum behind each head."""
    out = bytearray(data)
    at = out.find(b"CKOB")
    while at >= 0:
        end = at + HEAD_BYTES
        out[end : end + 4] = zlib.crc32(out[at:end]).to_bytes(4, "little")
        at = out.find(b"CKOB", at + 1)
    return bytes(out)


def read_all(backend: MemoryBackend, entries: tuple[Entry, ...]) -> None:
    for entry in entries:
        try:
            payload = read_payload(backend, NAME, entry)
            assert (
                object_id(entry.kind, decode_object(entry, payload, lambda _: CONTENT)) == entry.id
            )
            read_region(backend, NAME, entry, 0, entry.region_bytes)
        except CkptError:
            continue


@given(
    mutated(GOOD)
    | mutated(GOOD[TOC_AT : TOC_AT + TOC_BYTES]).map(lambda toc: sealed(GOOD[:TOC_AT], toc))
    | mutated(GOOD[:TOC_AT]).map(checked)
)
def test_any_pack_is_read_or_refused(data: bytes) -> None:
    backend = MemoryBackend()
    backend.files[NAME] = data
    for read in (read_entries, scan_entries):
        read_or_refuse(lambda read=read: read_all(backend, read(backend, NAME)))  # type: ignore[misc]


@pytest.mark.parametrize("claim", [(1 << 28) + 1, 1 << 40, (1 << 64) - 2])
@pytest.mark.parametrize("lies", ["head", "frame", "both"])
def test_bombs_are_refused_by_what_they_declare(claim: int, lies: str) -> None:
    """A few bytes that claim to become many."""
    compressor = zstandard.ZstdCompressor().compressobj(size=claim if lies != "head" else 10)
    payload = compressor.compress(b"x" * 10) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    raw = claim if lies != "frame" else 10
    entry = Entry(ObjectId("a" * 64), Kind.SCHEMA, ZSTD, None, 16, 0, raw, len(payload))
    with little_room(), pytest.raises(CorruptionError):
        decode_object(entry, payload, lambda _: b"")


def test_a_bomb_without_its_size() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, write_content_size=False)
    payload = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(1 << 28))
    entry = Entry(ObjectId("a" * 64), Kind.SCHEMA, ZSTD, None, 16, 0, 1 << 28, len(payload))
    with little_room(), pytest.raises(CorruptionError):
        decode_object(entry, payload, lambda _: b"")


def test_a_tensor_may_look_like_a_record() -> None:
    """What stands in a region does not hide the records behind it."""
    head = bytearray(GOOD[16 : 16 + HEAD_BYTES])
    head[4] = 99  # a kind that does not exist
    fake = bytes(head) + zlib.crc32(head).to_bytes(4, "little")
    backend = MemoryBackend()
    backend.files[NAME] = GOOD[:16] + fake + GOOD[16:]
    found = {entry.id for entry in scan_entries(backend, NAME)}
    backend.files[NAME] = GOOD
    assert found == {entry.id for entry in read_entries(backend, NAME)}


@pytest.mark.parametrize("copies", [1, 12])
def test_objects_that_stand_on_themselves(copies: int, tmp_path: Path) -> None:
    """Each of many copies on each of many others: the work is bounded."""
    backend = MemoryBackend()
    names = [object_id(Kind.SCHEMA, b"%d" % number) for number in range(9)]
    frame = zstandard.ZstdCompressor().compress(b"0")
    for copy in range(copies):
        body, toc = bytearray(HEADER.pack(b"CKPTPACK", 1, 0, 0)), b""
        for number, name in enumerate(names):
            base = names[(number + 1) % len(names)]
            entry = Entry(name, Kind.SCHEMA, ZSTD_ON_BASE, base, len(body), 0, 1, len(frame))
            toc += len(body).to_bytes(8, "little") + entry.head()
            body += entry.head() + zlib.crc32(entry.head()).to_bytes(4, "little") + frame
        pack = sealed(bytes(body), toc)
        backend.files[pack_name("meta", PackId(blake3(b"%d" % copy).hexdigest()))] = pack
    reads = 0
    calm = backend.read

    def counted(*args: object) -> bytes:
        nonlocal reads
        reads += 1
        return calm(*args)  # type: ignore[arg-type]

    backend.read = counted  # type: ignore[method-assign,assignment]
    store = ObjectStore(backend, tmp_path / "index", keys_of)
    with pytest.raises(CorruptionError):
        store.get(names[0], Kind.SCHEMA)
    assert reads < 10_000
    with pytest.raises(CorruptionError):
        Catalog(store).schema(names[1])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert LocalBackend(tmp_path).read("pipe") == b""
    (tmp_path / "large").write_bytes(bytes(5000))
    with pytest.raises(CorruptionError):
        read_small(LocalBackend(tmp_path), "large", 4096)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    backend = MemoryBackend()
    backend.files[NAME] = data
    for read in (read_entries, scan_entries):
        read_or_refuse(lambda read=read: read(backend, NAME))  # type: ignore[misc]
