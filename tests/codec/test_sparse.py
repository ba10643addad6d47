"""Masks at every density, gaps of every length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.codec.masks import get_mask, get_positions, put_mask
from ckptvcs.errors import CorruptionError


@given(
    st.integers(0, 5000),
    st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.19, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_round_trip(count: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random(count) < density
    data = put_mask(mask)
    back, end = get_mask(memoryview(data), 0, count)
    assert end == len(data)
    assert np.array_equal(back, mask)
    data = put_mask(mask, short=True)
    positions, end = get_positions(memoryview(data), 0, count, short=True)
    assert end == len(data)
    assert np.array_equal(positions, np.flatnonzero(mask))


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 70_000])
def test_long_gaps(gap: int) -> None:
    mask = np.zeros(gap + 300, np.bool_)
    mask[gap] = True
    mask[-1] = True
    back, _ = get_mask(memoryview(put_mask(mask)), 0, mask.size)
    assert np.array_equal(back, mask)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.19, 0.3])
def test_size_is_near_the_entropy(density: float) -> None:
    mask = np.random.default_rng(0).random(1 << 20) < density
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    assert len(put_mask(mask)) * 8 <= 1.04 * entropy * mask.size


@given(st.binary(max_size=200), st.integers(0, 3000))
def test_any_bytes_are_decoded_or_refused(data: bytes, count: int) -> None:
    try:
        mask, _ = get_mask(memoryview(data), 0, count)
    except CorruptionError:
        return
    assert mask.size == count


@pytest.mark.parametrize("density", [0.001, 0.003, 0.006, 0.012, 0.02, 0.05, 0.1, 0.19, 0.3, 0.5])
def test_short_masks_of_few_entries_are_near_the_entropy(density: float) -> None:
    mask = np.random.default_rng(0).random(1 << 16) < density
    share = mask.mean()
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert len(put_mask(mask, short=True)) * 8 <= 1.03 * entropy * mask.size + 8 * 12
