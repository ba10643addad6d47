"""Slices that somebody else made: decoded, or refused as damage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptvcs.codec import excp, frame, kernels, lossless, patch
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.frame import Companion, decode_slice, put_slice
from ckptvcs.codec.kernels import compiled, reference
from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_lowrank import encode_low_rank
from ckptvcs.codec.near_moments import encode_first, encode_second
from ckptvcs.codec.near_weight import encode_delta, encode_keyframe, row_factors
from ckptvcs.codec.words import NearSlice, Words, from_float32, word_type
from tests.helpers.fuzzing import mutated, read_or_refuse

COUNT, COLUMNS = 1200, 40
ROWS = Rows(COLUMNS)


@dataclass(frozen=True)
class Slice:
    """A good slice, and what it needs to be decoded."""

    data: bytes
    dtype: str
    base: Words | None = None
    companion: bytes | None = None
    companion_base: Words | None = None


def normal(seed: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(COUNT) * scale).astype(np.float32)


def good(coded: NearSlice | None) -> bytes:
    assert coded is not None
    return coded.payload


def corpus() -> dict[str, Slice]:
    """A slice of every method, the float types in turn."""
    found: dict[str, Slice] = {}
    rng = np.random.default_rng(0)
    for name in ("F32", "BF16", "I64", "U8", "C64"):
        words = rng.integers(0, 99, COUNT).astype(word_type(DTYPES[name].word))
        base = words + words.dtype.type(1)
        for at, there in (("alone", None), ("on base", base)):
            data = put_slice(frame.LOSSLESS, lossless.encode(words, there, DTYPES[name]))
            found[f"lossless {name} {at}"] = Slice(data, name, there)
    for name in ("F32", "F16", "BF16"):
        before = from_float32(normal(1), name)
        near = from_float32(normal(1) + normal(2, 1e-2), name)
        squares = from_float32(np.square(normal(3), dtype=np.float32) + np.float32(1e-6), name)
        moment = from_float32(normal(4) * 0.1, name)
        second = good(encode_second(squares, name, ROWS))
        words = from_float32(normal(1) + normal(2, 1e-4), name)
        rows = ROWS, row_factors(normal(5)[: ROWS.count(COUNT)], 0, 1)
        coded = b"".join(bytes(part) for part in patch.encode(words, before, DTYPES[name]))
        found[f"patch {name}"] = Slice(put_slice(frame.PATCH, coded), name, before)
        mask = rng.random(COUNT) < 0.1
        centres = np.linspace(-1, 1, 15).astype(np.float16)
        residual, _ = excp.encode_residual(near, before, mask, centres, name)
        own, _ = excp.encode_moment(moment, mask, centres, name, own_mask=True)
        shared, _ = excp.encode_moment(moment, mask, centres, name, own_mask=False)
        first = put_slice(frame.EXCP_MOMENT, own)
        beside = put_slice(frame.NEAR_SECOND, second)
        scaled = good(
            encode_low_rank(
                moment, from_float32(np.ones(COUNT, np.float32), name), name, ROWS, 2, 0.5
            )
        )
        plain = good(encode_low_rank(moment, None, name, ROWS, 2, 0.5))
        for label, method, payload, base, companion in (
            ("residual", frame.EXCP_RESIDUAL, residual, before, None),
            ("excp moment", frame.EXCP_MOMENT, own, None, None),
            ("shared mask", frame.EXCP_SHARED_MASK_MOMENT, shared, None, first),
            (
                "delta",
                frame.NEAR_WEIGHT,
                good(encode_delta(near, before, name, 1e-2, 0.7)),
                before,
                None,
            ),
            (
                "rows",
                frame.NEAR_WEIGHT,
                good(encode_delta(near, before, name, 3e-3, 0.7, rows)),
                before,
                None,
            ),
            ("keyframe", frame.NEAR_WEIGHT, good(encode_keyframe(near, name, 1e-4)), None, None),
            ("second", frame.NEAR_SECOND, second, None, None),
            (
                "first",
                frame.NEAR_FIRST,
                good(encode_first(moment, None, name, 0.5, 0.7)),
                None,
                None,
            ),
            (
                "scaled",
                frame.NEAR_SCALED_FIRST,
                good(encode_first(moment, squares, name, 0.5, 0.7)),
                None,
                beside,
            ),
            ("low rank", frame.NEAR_LOW_RANK, plain, None, None),
            ("scaled low rank", frame.NEAR_SCALED_LOW_RANK, scaled, None, beside),
        ):
            found[f"{label} {name}"] = Slice(put_slice(method, payload), name, base, companion)
    master = put_slice(
        frame.NEAR_WEIGHT,
        good(
            encode_delta(
                from_float32(normal(1) + normal(2, 1e-2), "F32"),
                normal(1).view(np.uint32),
                "F32",
                1e-2,
                0.7,
            )
        ),
    )
    found["rounded"] = Slice(
        bytes([frame.ROUNDED]), "BF16", None, master, normal(1).view(np.uint32)
    )
    return found


CORPUS = corpus()


@pytest.fixture(params=["plain", "compiled"], scope="module", autouse=True)
def _loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both loops: those that are compiled do not look where they write."""
    module = compiled if request.param == "compiled" else reference
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "active", lambda: module)
        yield


def decode(one: Slice, data: bytes, companion: bytes | None, count: int = COUNT) -> Words:
    beside = None
    if companion is not None:
        beside = Companion(memoryview(companion), one.companion_base)
    words = decode_slice(memoryview(data), DTYPES[one.dtype], count, one.base, beside)
    assert (words.size, words.dtype) == (count, word_type(DTYPES[one.dtype].word))
    return words


def test_every_method_is_here() -> None:
    assert {one.data[0] for one in CORPUS.values()} == set(range(frame.PATCH + 1))
    for one in CORPUS.values():
        decode(one, one.data, one.companion)


@pytest.mark.parametrize("method", sorted({one.data[0] for one in CORPUS.values()}))
@given(data=st.data())
def test_forged_slices_are_decoded_or_refused(method: int, data: st.DataObject) -> None:
    one = data.draw(st.sampled_from([one for one in CORPUS.values() if one.data[0] == method]))
    changed, companion = one.data, one.companion
    if companion is not None and data.draw(st.booleans()):
        companion = data.draw(mutated(companion))
    else:
        changed = data.draw(mutated(changed))
    count = data.draw(st.sampled_from([COUNT] * 6 + [1, COUNT - 1, COUNT + 1]))
    read_or_refuse(lambda: decode(one, changed, companion, count))


@given(
    st.binary(max_size=200),
    st.integers(0, frame.PATCH + 1),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([1, 500, frame.SLICE_WORDS]),
)
def test_any_bytes(data: bytes, method: int, dtype: str, count: int) -> None:
    one = Slice(put_slice(method, data), dtype)
    read_or_refuse(lambda: decode(one, one.data, one.data, count))
