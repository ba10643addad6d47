"""ExCP against its definition, written out plainly, and its bytes against hostile ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.codec import excp
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.frame import (
    EXCP_MOMENT,
    EXCP_RESIDUAL,
    EXCP_SHARED_MASK_MOMENT,
    Companion,
    decode_slice,
    put_slice,
)
from ckptvcs.codec.spec import ExcpSpec
from ckptvcs.codec.words import from_float32, to_float32
from ckptvcs.errors import CorruptionError

SPEC = ExcpSpec()


def heavy_tailed(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, count) * 1e-3).astype(np.float32)


def test_threshold_follows_the_paper_and_its_released_clip() -> None:
    assert excp.residual_threshold(2.0, 1e-8, SPEC) == pytest.approx(5e-5 / 1e-4 * 2.0)
    assert excp.residual_threshold(2.0, 1e-20, SPEC) == 2.5 * 2.0
    assert excp.residual_threshold(2.0, None, SPEC) == 5.0
    assert excp.residual_threshold(2.0, 1e-8, ExcpSpec(multiplier=2.5)) == 5.0


@pytest.mark.parametrize("size", [1, 3, 15, 255])
def test_codebook_is_no_worse_than_a_uniform_one(size: int) -> None:
    values = heavy_tailed(50_000, 3)
    centres = excp.fit_codebook(values, size)
    assert centres.size <= size
    assert np.array_equal(centres, np.sort(centres))
    near = centres.astype(np.float32)[excp.quantize(values, centres)]
    grid = np.linspace(values.min(), values.max(), 2 * size + 1)[1::2].astype(np.float16)
    uniform = grid.astype(np.float32)[excp.quantize(values, grid)]
    error = float(np.square(near - values, dtype=np.float64).sum())
    assert error <= 1.01 * float(np.square(uniform - values, dtype=np.float64).sum())


@given(st.sampled_from(["F32", "F16", "BF16"]), st.integers(1, 3000), st.integers(0, 2**32))
def test_decode_gives_what_encode_promised(dtype: str, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = from_float32(rng.normal(size=count).astype(np.float32), dtype)
    target = from_float32(to_float32(base, dtype) + heavy_tailed(count, seed), dtype)
    residual = to_float32(target, dtype) - to_float32(base, dtype)
    mask = np.abs(residual) > np.median(np.abs(residual))
    centres = excp.fit_codebook(residual[mask], 15)
    mask &= bool(centres.size)
    data, promised = excp.encode_residual(target, base, mask, centres, dtype)
    back = decode_slice(memoryview(put_slice(EXCP_RESIDUAL, data)), DTYPES[dtype], count, base)
    assert back.tobytes() == promised.tobytes()
    assert back[~mask].tobytes() == base[~mask].tobytes()


def test_moments_share_one_mask() -> None:
    first, second = heavy_tailed(5000, 1), np.square(heavy_tailed(5000, 2))
    mask = np.abs(first) > 2 * np.abs(first).mean()
    one, near_first = excp.encode_moment(
        first.view(np.uint32), mask, excp.fit_codebook(first[mask], 15), "F32", own_mask=True
    )
    two, near_second = excp.encode_moment(
        second.view(np.uint32), mask, excp.fit_codebook(second[mask], 15), "F32", own_mask=False
    )
    owner = memoryview(put_slice(EXCP_MOMENT, one))
    sharer = memoryview(put_slice(EXCP_SHARED_MASK_MOMENT, two))
    assert decode_slice(owner, DTYPES["F32"], 5000).tobytes() == near_first.tobytes()
    back = decode_slice(sharer, DTYPES["F32"], 5000, companion=Companion(owner))
    assert back.tobytes() == near_second.tobytes()
    assert not back.view(np.float32)[~mask].any()
    with pytest.raises(CorruptionError):
        decode_slice(sharer, DTYPES["F32"], 5000)
