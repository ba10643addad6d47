"""Exact coding gives back every word, NaN payloads and negative zeros included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptvcs.codec import lossless
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.words import Words, word_type
from ckptvcs.errors import CorruptionError

DTYPE_NAMES = sorted(DTYPES)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, Words, Words | None]:
    name = draw(st.sampled_from(DTYPE_NAMES))
    word = DTYPES[name].word
    count = draw(st.sampled_from([0, 1, 2, 127, 1000, 70_000]))
    kind = draw(st.sampled_from(["random", "constant", "near", "sparse"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    high = 1 << (8 * word)
    words = rng.integers(0, high, count, dtype=np.uint64).astype(word_type(word))
    base = None
    if kind == "constant":
        words[:] = words[:1]
    elif kind == "near":
        base = words + rng.integers(0, 3, count).astype(words.dtype)
    elif kind == "sparse":
        base = words.copy()
        base[rng.random(count) < 0.01] += words.dtype.type(1)
    return name, words, base


@given(tensors())
def test_round_trip(case: tuple[str, Words, Words | None]) -> None:
    name, words, base = case
    data = lossless.encode(words, base, DTYPES[name])
    back = lossless.decode(memoryview(data), words.size, base, DTYPES[name])
    assert back.dtype == words.dtype
    assert back.tobytes() == words.tobytes()


@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32)))
def test_float_bits_survive(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    words = values.view(np.uint32)
    base = np.roll(words, 1)
    data = lossless.encode(words, base, DTYPES["F32"])
    back = lossless.decode(memoryview(data), words.size, base, DTYPES["F32"])
    assert back.tobytes() == words.tobytes()


def test_neighbouring_floats_get_small_numbers() -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(size=100_000).astype(np.float32)
    new = old * np.float32(1 + 1e-6)
    alone = lossless.encode(new.view(np.uint32), None, DTYPES["F32"])
    against = lossless.encode(new.view(np.uint32), old.view(np.uint32), DTYPES["F32"])
    assert len(against) < 0.4 * len(alone)


def test_unchanged_costs_nothing() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    assert len(lossless.encode(words, words.copy(), DTYPES["F32"])) < 64


@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.05])
@pytest.mark.parametrize("name", ["BF16", "F32", "U8"])
def test_few_changed_words_cost_little_more_than_their_entropy(name: str, density: float) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, 1 << 20).astype(word_type(DTYPES[name].word))
    words = base.copy()
    changed = rng.random(words.size) < density
    words[changed] += words.dtype.type(1)  # the same change everywhere: its entropy is 0
    data = lossless.encode(words, base, DTYPES[name])
    assert np.array_equal(lossless.decode(memoryview(data), words.size, base, DTYPES[name]), words)
    share = max(density, 1e-9)
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert 8 * len(data) < 1.06 * entropy * words.size + 1000


@pytest.mark.parametrize("far", [None, 300, 3])
def test_every_truncation_is_noticed(far: int | None) -> None:
    rng = np.random.default_rng(1)
    words = rng.normal(size=300).astype(np.float32).view(np.uint32)
    base = None
    if far is not None:
        base = words.copy()
        base[:far] += np.uint32(3)
    data = lossless.encode(words, base, DTYPES["F32"])
    for length in range(len(data)):
        with pytest.raises(CorruptionError):
            lossless.decode(memoryview(data)[:length], words.size, base, DTYPES["F32"])
