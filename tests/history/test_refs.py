"""Refs are numbered and write-once; the newest counts, or is damage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.errors import ConflictError, CorruptionError, InvalidInputError
from ckptvcs.history.refs import HEAD, Refs, check_name
from ckptvcs.store.ids import ObjectId
from tests.helpers.memory_backend import MemoryBackend

A, B = ObjectId("a" * 64), ObjectId("b" * 64)


def test_a_ref_is_replaced_only_by_its_next_version() -> None:
    refs = Refs(MemoryBackend())
    assert refs.read("heads/main") is None
    first = refs.publish("heads/main", None, commit=A, time="t1", action="commit")
    second = refs.publish("heads/main", first, commit=B, time="t2", action="commit")
    assert refs.read("heads/main") == second
    assert [g.commit for g in refs.reflog("heads/main")] == [B, A]
    with pytest.raises(ConflictError):
        refs.publish("heads/main", first, commit=A, time="t3", action="commit")
    with pytest.raises(ConflictError):
        refs.publish("heads/main", None, commit=A, time="t3", action="commit")
    assert refs.read("heads/main") == second


def test_a_writer_that_slept_finds_out() -> None:
    backend = MemoryBackend()
    refs = Refs(backend)
    state = refs.publish("heads/main", None, commit=A, time="t", action="x")
    for _ in range(3):
        state = refs.publish("heads/main", state, commit=A, time="t", action="x")
    del backend.files["refs/heads/main/0000000000000002"]
    old = refs.reflog("heads/main")[-1]
    with pytest.raises(ConflictError):
        refs.publish("heads/main", old, commit=B, time="t", action="x")


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", b'{"generation":1}', b"[" * 9000])
def test_an_unreadable_newest_generation_is_damage(damage: bytes) -> None:
    backend = MemoryBackend()
    refs = Refs(backend)
    first = refs.publish("heads/main", None, commit=A, time="t", action="x")
    refs.publish("heads/main", first, commit=B, time="t", action="x")
    backend.files["refs/heads/main/0000000000000002"] = damage
    with pytest.raises(CorruptionError):
        refs.read("heads/main")


def test_a_generation_in_the_wrong_place_is_damage() -> None:
    backend = MemoryBackend()
    refs = Refs(backend)
    refs.publish("heads/main", None, commit=A, time="t", action="x")
    backend.files["refs/heads/other/0000000000000001"] = backend.files[
        "refs/heads/main/0000000000000001"
    ]
    with pytest.raises(CorruptionError):
        refs.read("heads/other")


def test_names_do_not_fold_or_nest() -> None:
    backend = MemoryBackend()
    refs = Refs(backend)
    names = ["a", "a/b", "A", "a.b", "0000000000000001x", "x%2Fy".replace("%", "+")]
    for name in names:
        refs.publish(f"heads/{name}", None, commit=A, time="t", action="x")
    assert sorted(refs.names("heads")) == sorted(names)
    assert len({name.lower() for name in backend.files if name.startswith("refs/")}) == len(names)
    with pytest.raises(CorruptionError):  # which every repository has
        refs.read(HEAD)


@pytest.mark.parametrize(
    "name",
    ["", "2000", "HEAD", "latest", "id:ab", "-x", "a..b", "a b", "a~1", "a@2", "a/", "é", ".a"],
)
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError):
        check_name(name, "branch")


@given(st.text(max_size=20))
def test_every_allowed_name_comes_back(name: str) -> None:
    try:
        check_name(name, "branch")
    except InvalidInputError:
        return
    refs = Refs(MemoryBackend())
    refs.publish(f"heads/{name}", None, commit=A, time="t", action="x")
    assert refs.names("heads") == [name]
