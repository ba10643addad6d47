"""Exact patches give every word back, by both kinds of loops, and survive hostile bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.codec import patch
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.kernels import compiled, reference
from ckptvcs.codec.words import Words, word_type
from ckptvcs.errors import CorruptionError, TruncatedError

FORMS = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "F64": 8}


def pair(dtype: str, count: int, seed: int, share: float) -> tuple[Words, Words]:
    """Words, and others that are near them in all places but a share."""
    random = np.random.default_rng(seed)
    kind = word_type(FORMS[dtype])
    words = random.integers(0, np.iinfo(kind).max, count, dtype=kind, endpoint=True)
    near = words + random.integers(0, 3, count).astype(kind)
    far = random.random(count) < share
    near[far] = random.integers(0, np.iinfo(kind).max, int(far.sum()), dtype=kind, endpoint=True)
    return words, near


@given(
    st.sampled_from(sorted(FORMS)),
    st.integers(0, 9000),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.001, 0.05, 0.5]),
)
def test_every_word_comes_back(dtype: str, count: int, seed: int, share: float) -> None:
    words, near = pair(dtype, count, seed, share)
    data = b"".join(patch.encode(words, near, DTYPES[dtype]))
    back = patch.decode(memoryview(data), count, near, DTYPES[dtype])
    assert np.array_equal(back, words)
    room = np.empty_like(words)
    assert np.array_equal(patch.decode(memoryview(data), count, near, DTYPES[dtype], room), words)
    assert len(data) <= words.nbytes + 64 + count // 8
    if share < 0.01 and count > 4000:
        same = b"".join(patch.encode(words, words.copy(), DTYPES[dtype]))
        assert len(same) < 64
        assert np.array_equal(patch.decode(memoryview(same), count, words, DTYPES[dtype]), words)
    if share < 0.01 and count > 4000 and FORMS[dtype] in (2, 4):
        assert len(data) < 0.6 * words.nbytes


@given(
    st.sampled_from(["F32", "BF16", "I32"]),
    st.integers(1, 9000),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.01, 0.9]),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_compiled_loops_give_the_same_bits(
    dtype: str, count: int, seed: int, share: float, raw: int, transform: int
) -> None:
    words, near = pair(dtype, count, seed, share)
    plain, floating = reference, DTYPES[dtype].floating
    both = [
        loop.split_near(words, near, floating, min(raw, words.itemsize - 1))
        for loop in (plain, compiled)
    ]
    for one, two in zip(*both, strict=True):
        assert np.array_equal(one, two)
    assert both[0][3]
    planes = [loop.split_words(words, near, transform, floating) for loop in (plain, compiled)]
    assert np.array_equal(*planes)
    for loop in (plain, compiled):
        back = np.empty_like(words)
        loop.join_words(planes[0], near, transform, floating, back)
        assert np.array_equal(back, words)


@pytest.mark.parametrize(
    "data", [b"", b"\0\0", b"\1", b"\2", b"\2\4", b"\3abc", b"\4", b"\2\3abcd"]
)
def test_what_is_no_patch(data: bytes) -> None:
    with pytest.raises((CorruptionError, TruncatedError)):
        patch.decode(memoryview(data), 4, np.zeros(4, np.uint32), DTYPES["F32"])
    with pytest.raises((CorruptionError, TruncatedError)):
        patch.decode(memoryview(b"\0"), 4, None, DTYPES["F32"])
