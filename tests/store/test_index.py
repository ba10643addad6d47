"""The index is a view: lost, rotten or stale, the packs say what is there."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest

from ckptvcs.errors import CorruptionError, MissingObjectError
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.store.index.editions import Family
from ckptvcs.store.local import LocalBackend
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import pack_name


def keys_of(kind: Kind, content: bytes) -> list[bytes]:
    return [b"starts:" + content[:3]] if kind == Kind.COMMIT else []


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(LocalBackend(tmp_path), tmp_path / "cache" / "index", keys_of)


def newest_file(index: Path) -> Path:
    family = Family.of(index)
    return family.edition(max(family.scan()[0]))


def put(store: ObjectStore, *contents: bytes, kind: Kind = Kind.COMMIT) -> list[ObjectId]:
    pack = store.new_pack("meta")
    names = [pack.add(kind, content) for content in contents]
    store.publish(pack)
    return names


def test_a_repository_that_is_deleted_is_let_go(tmp_path: Path) -> None:
    def handles() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = handles()
    for number in range(10):
        folder = tmp_path / str(number)
        put(ObjectStore(LocalBackend(folder), folder / "cache" / "index", keys_of), b"abc")
        shutil.rmtree(folder)
    assert handles() <= before + 6  # those of the last two


def test_put_get_find(store: ObjectStore) -> None:
    one, two = put(store, b"abc1", b"abc2")
    assert store.get(one, Kind.COMMIT) == b"abc1"
    assert set(store.find(b"starts:abc")) == {one, two}
    assert store.find(b"starts:xyz") == []
    with pytest.raises(MissingObjectError):
        store.get(ObjectId("0" * 64), Kind.COMMIT)
    with pytest.raises(CorruptionError):
        store.get(one, Kind.SCHEMA)


def test_another_process_wrote(store: ObjectStore, tmp_path: Path) -> None:
    other = ObjectStore(LocalBackend(tmp_path), tmp_path / "elsewhere" / "index", keys_of)
    (name,) = put(other, b"abc from elsewhere")
    assert store.get(name, Kind.COMMIT) == b"abc from elsewhere"
    assert store.find(b"starts:abc") == [name]


def test_a_rebuilt_index_finds_every_object(store: ObjectStore) -> None:
    names = put(store, *(b"abc%d" % n for n in range(100)))
    assert store.rebuild() == 1
    assert sorted(store.find(b"starts:abc")) == sorted(names)


def test_the_map_grows(store: ObjectStore) -> None:
    contents = [b"%05d" % n + bytes(100_000) for n in range(300)]
    names = put(store, *contents)
    assert [store.get(name, Kind.COMMIT) for name in names] == contents


def test_deleted_packs_are_forgotten_and_copies_found(store: ObjectStore) -> None:
    (name,) = put(store, b"abc")
    (pack,) = store.list_packs()
    assert put(store, b"abc") == [name]
    store.delete_packs({pack: "meta"})
    assert store.get(name, Kind.COMMIT) == b"abc"
    store.delete_packs(store.list_packs())
    assert store.find(b"starts:abc") == []
    with pytest.raises(MissingObjectError):
        store.get(name, Kind.COMMIT)


def test_a_pack_that_vanished_is_noticed(store: ObjectStore) -> None:
    (name,) = put(store, b"values", kind=Kind.VALUES)
    for pack, folder in store.list_packs().items():
        store.backend.delete(pack_name(folder, pack))
    with pytest.raises(MissingObjectError):
        store.get(name, Kind.VALUES)


@pytest.mark.parametrize("damage", [b"", b"rubbish", b"\0" * 100_000])
def test_a_rotten_index_is_made_anew(damage: bytes, store: ObjectStore, tmp_path: Path) -> None:
    (name,) = put(store, b"abc")
    index = tmp_path / "cache" / "index"
    path = newest_file(index)
    path.unlink()
    path.write_bytes(damage)
    fresh = ObjectStore(LocalBackend(tmp_path), index, keys_of)
    assert fresh.get(name, Kind.COMMIT) == b"abc"


def test_a_place_that_lies_is_noticed(store: ObjectStore) -> None:
    (name,) = put(store, b"some values", kind=Kind.VALUES)
    ((pack, folder),) = store.list_packs().items()
    file = Path(store.backend.root) / pack_name(folder, pack)  # type: ignore[attr-defined]
    data = file.read_bytes()
    file.write_bytes(data.replace(b"some values", b"SOME VALUES"))
    with pytest.raises(CorruptionError):
        store.get(name, Kind.VALUES)


@pytest.mark.parametrize("length", [1, 100, 4096, 5000, 20_000])
def test_an_index_that_is_cut_off_does_not_kill_the_process(
    length: int, store: ObjectStore, tmp_path: Path
) -> None:
    names = put(store, *(b"abc%d" % n for n in range(500)))
    name = tmp_path / "cache" / "index"
    path = newest_file(name)
    whole = path.read_bytes()
    assert len(whole) > 30_000
    path.unlink()
    path.write_bytes(whole[:length])
    again = ObjectStore(LocalBackend(tmp_path), name, keys_of)
    assert again.get(names[-1], Kind.COMMIT) == b"abc499"
