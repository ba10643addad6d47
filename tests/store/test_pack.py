"""Packs describe themselves: by their table of contents, or by a scan where it is damaged."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.errors import CkptError, CorruptionError, MissingObjectError
from ckptvcs.store.ids import Kind
from ckptvcs.store.pack import (
    PackInfo,
    PackWriter,
    decode_object,
    hash_pack,
    read_entries,
    read_payload,
    read_region,
    scan_entries,
)
from tests.helpers.memory_backend import MemoryBackend


def make_pack(backend: MemoryBackend) -> PackInfo:
    pack = PackWriter(backend.writer(), "packs")
    first = random.Random(0).randbytes(3000)
    base = pack.add(Kind.SKELETON, first)
    pack.add(Kind.SKELETON, first[:2000] + b"changed" + first[2000:], (base, first))
    pack.append_region(b"slice one")
    pack.append_region(b"slice two")
    pack.add(Kind.BUNDLE, b"{}" * 50)
    pack.add(Kind.COMMIT, b"")
    return pack.publish()


def no_base(_: object) -> bytes:
    raise MissingObjectError("no base")


def test_entries_come_back_and_the_name_is_the_hash() -> None:
    backend = MemoryBackend()
    info = make_pack(backend)
    assert read_entries(backend, info.name) == info.entries
    assert scan_entries(backend, info.name) == info.entries
    assert hash_pack(backend, info.name) == info.id
    assert backend.size(info.name) == info.size_bytes


def test_regions_belong_to_their_object() -> None:
    backend = MemoryBackend()
    info = make_pack(backend)
    bundle = info.entries[2]
    assert read_region(backend, info.name, bundle, 6, 9) == b"oneslice "
    with pytest.raises(CorruptionError):
        read_region(backend, info.name, bundle, 10, 9)


def test_an_object_on_a_base_is_small() -> None:
    backend = MemoryBackend()
    info = make_pack(backend)
    assert info.entries[1].stored_bytes < 100
    first = decode_object(
        info.entries[0], read_payload(backend, info.name, info.entries[0]), no_base
    )
    second = read_payload(backend, info.name, info.entries[1])
    assert b"changed" in decode_object(info.entries[1], second, lambda _: first)


def test_the_same_objects_make_packs_of_other_names() -> None:
    backend = MemoryBackend()
    assert make_pack(backend).id != make_pack(backend).id


@given(st.data())
def test_damage_is_noticed(data: st.DataObject) -> None:
    backend = MemoryBackend()
    info = make_pack(backend)
    whole = backend.files[info.name]
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << bit
    backend.files[info.name] = bytes(damaged)
    assert hash_pack(backend, info.name) != info.id
    for read in (read_entries, scan_entries):
        try:
            entries = read(backend, info.name)
        except CkptError:
            continue
        for entry in entries:
            try:
                content = decode_object(
                    entry, read_payload(backend, info.name, entry), lambda _: b"x" * 100
                )
            except CkptError:
                continue
            assert len(content) == entry.raw_bytes


def test_every_truncation_is_noticed() -> None:
    backend = MemoryBackend()
    info = make_pack(backend)
    whole = backend.files[info.name]
    for length in [*range(200), *range(len(whole) - 700, len(whole))]:
        backend.files[info.name] = whole[:length]
        with pytest.raises(CorruptionError):
            read_entries(backend, info.name)
