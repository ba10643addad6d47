"""Tensors of the same bytes and other types, shapes or parts: each comes back as what it was."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptvcs.decode.chain import ChainReader
from ckptvcs.errors import CorruptionError
from ckptvcs.history.recipe import Frame, dump_bundle, load_bundle
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo

TYPES = (
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.int16,
    torch.uint16,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
)
PLACES = (("model",), ("rest", "inner"), ("optimizer",), ("ema",), ("scheduler",))


def octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def same(one: Any, two: Any) -> bool:
    """Whether two states are the same, by types, shapes and bits."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    kinds = (one.dtype, one.shape) == (two.dtype, two.shape)
    return kinds and octets(one) == octets(two)


def retyped(data: NDArray[np.uint8], dtype: torch.dtype, rows: int) -> torch.Tensor:
    """A tensor of some bytes, which bools cannot hold as they are."""
    data = np.bitwise_and(data, np.uint8(1)) if dtype is torch.bool else data.copy()
    return torch.from_numpy(data).view(dtype).reshape(rows, -1)


def drop_cache(repo: Repo) -> Repo:
    repo.close()
    shutil.rmtree(repo.folder / "cache")
    return Repo.open(repo.root)


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """States whose tensors are cut from a few runs of bytes, which change now and then."""
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    size = draw(st.sampled_from([1024, 4096, 16384]))
    smooth = numbers.standard_normal(size // 4).astype(np.float32)
    pool = [smooth.view(np.uint8), np.zeros(size, np.uint8)]
    states = []
    for _ in range(draw(st.integers(2, 4))):
        if draw(st.booleans()):
            smooth = (smooth + 1e-3 * numbers.standard_normal(size // 4)).astype(np.float32)
            pool[0] = smooth.view(np.uint8)
        state: dict[str, Any] = {}
        for number, place in enumerate(draw(st.lists(st.sampled_from(PLACES), max_size=4))):
            data = draw(st.sampled_from(pool))
            tensor = retyped(data, draw(st.sampled_from(TYPES)), draw(st.sampled_from([1, 2, 8])))
            inner = state
            for step in place:
                inner = inner.setdefault(step, {})
            inner["w" if draw(st.booleans()) else f"w{number}"] = tensor
        states.append(state)
    return states


@given(histories(), st.sampled_from(["lossless", "near", "excp"]))
def test_states_of_equal_bytes_come_back(states: list[dict[str, Any]], codec: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        repo = Repo.init(folder, codec=codec)
        repo.configure("keep-exact", "100")
        made = [repo.commit(state, step=step) for step, state in enumerate(states, 1)]
        repo = drop_cache(repo)
        assert not repo.verify().damage
        for entry, state in zip(made, states, strict=True):
            assert same(repo.checkout(entry.id), state)
        repo.close()


def test_a_tensor_of_an_earlier_ones_bytes_has_its_own_slices(tmp_path: Path) -> None:
    """Slices have 2^20 words, so that other words are cut elsewhere."""
    numbers = torch.zeros(3 << 20, dtype=torch.uint8)
    numbers[:: 1 << 12] = torch.arange(3 << 8).to(torch.uint8)
    repo = Repo.init(tmp_path, codec="lossless")
    types = (torch.uint8, torch.int64, torch.int16, torch.float32, torch.uint8)
    for step, dtype in enumerate(types, 1):
        repo.commit({"model": {"w": numbers.view(dtype)}}, step=step)
    stored = [entry.commit.data_bytes for entry in repo.log()]
    assert stored[:4] == [0, 0, 0, 0]  # all share the frames of the first
    repo = drop_cache(repo)
    assert not repo.verify().damage
    for step, dtype in enumerate(types, 1):
        assert same(repo.checkout(step), {"model": {"w": numbers.view(dtype)}})


def test_deltas_stand_on_what_has_words_of_their_size(tmp_path: Path) -> None:
    w = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    states = []
    for _ in range(4):
        w = w + 1e-3 * w.roll(1)
        states.append({"model": {"w": w}, "rest": {"w": w.view(torch.uint8)}})
    repo = Repo.init(tmp_path, codec="lossless")
    for step, state in enumerate(states, 1):
        repo.commit(state, step=step)
    repo = drop_cache(repo)
    for entry in repo.log():
        schema = handle(repo).catalog.schema(entry.commit.schema)
        for part, stored in entry.commit.parts.items():
            for position, number in enumerate(schema.stored(part)):
                info = schema.tensors[number]
                chain = ChainReader(handle(repo).catalog).links(stored.values, position, info)
                assert len({link.type.word for link in chain}) == 1
    for step, state in enumerate(states, 1):
        assert same(repo.checkout(step), state)


def test_a_part_that_is_dropped_takes_nothing_from_another_of_its_bytes(tmp_path: Path) -> None:
    w = torch.randn(40, 40)
    state = {"model": {"w": w.bfloat16()}, "rest": {"w": w.bfloat16().view(torch.int16)}}
    repo = Repo.init(tmp_path, codec="lossless")
    repo.commit(state, step=1)
    repo.commit({"model": {"w": w.bfloat16() * 2}}, step=2)
    (entry,) = [entry for entry in repo.log() if entry.step == 1]
    assert len({state.values for state in entry.commit.parts.values()}) == 1
    repo = drop_cache(repo)
    assert same(repo.checkout(1), state)


def test_a_bundle_says_of_which_type_its_frames_are() -> None:
    frames = [
        Frame(None, 0, None, ((0, 4, b"a" * 16),), dtype) for dtype in ("F32", "F32", "U8", "I64")
    ]
    data = dump_bundle(frames)
    assert load_bundle(data) == tuple(frames)
    assert data.count(b"dtype") == 3  # once for all, and for each that differs
    untyped = [*frames, Frame(None, 0, None, ((4, 4, b"b" * 16),))]
    assert load_bundle(dump_bundle(untyped)) == tuple(untyped)
    with pytest.raises(CorruptionError, match="unknown element type"):
        load_bundle(data.replace(b"I64", b"I65"))
