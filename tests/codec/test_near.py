"""Near slices: what is promised comes back, on any machine, and no value comes back worse."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.codec import kernels
from ckptvcs.codec.codes import Codes, get_codes, put_codes
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.frame import (
    NEAR_FIRST,
    NEAR_LOW_RANK,
    NEAR_SCALED_FIRST,
    NEAR_SCALED_LOW_RANK,
    NEAR_SECOND,
    NEAR_WEIGHT,
    Companion,
    decode_slice,
    put_slice,
)
from ckptvcs.codec.kernels import reference
from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_lowrank import encode_low_rank
from ckptvcs.codec.near_moments import Factors, encode_first, encode_second
from ckptvcs.codec.near_weight import encode_delta, encode_keyframe, row_factors
from ckptvcs.codec.words import Bytes, from_float32, to_float32
from ckptvcs.errors import CorruptionError

DTYPE_NAMES = st.sampled_from(["F32", "F16", "BF16"])


def normal(count: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * scale).astype(np.float32)


def decode(
    method: int,
    data: bytes,
    dtype: str,
    count: int,
    base: np.ndarray | None = None,
    companion: bytes | None = None,
) -> np.ndarray:
    beside = None if companion is None else Companion(memoryview(companion))
    return decode_slice(memoryview(put_slice(method, data)), DTYPES[dtype], count, base, beside)


# -- codes -------------------------------------------------------------------------------------


@given(
    st.integers(0, 3000),
    st.sampled_from([0.0, 0.01, 0.2, 1.0, 30.0, 1e5]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_codes_come_back(count: int, spread: float, seed: int, outlier: bool) -> None:
    codes = np.rint(normal(count, seed, spread)).astype(np.int32)
    if outlier and count:
        codes[seed % count] = (1 << 24) - 1
    sparse = Codes(*Codes(None, codes).sparse())
    for form in (Codes(None, codes), sparse):
        data = put_codes(form, count)
        back, end = get_codes(memoryview(data), 0, count)
        assert end == len(data)
        assert np.array_equal(back.dense(count), codes)


@pytest.mark.parametrize("step", [0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.6, 1.9, 2.3, 2.75, 3.2])
def test_codes_are_near_their_entropy(step: float) -> None:
    values = normal(1 << 18, 0) / np.float32(step)
    codes = (values + np.copysign(np.float32(0.5), values)).astype(np.int32)
    _, counts = np.unique(codes, return_counts=True)
    share = counts / codes.size
    entropy = -(share * np.log2(share)).sum() * codes.size
    assert 8 * len(put_codes(Codes(None, codes), codes.size)) <= 1.03 * entropy


# -- weights -----------------------------------------------------------------------------------


@given(
    st.integers(1, 3000),
    DTYPE_NAMES,
    st.integers(0, 2**32),
    st.floats(-5, 0.5),
    st.sampled_from([0.5, 0.66, 1.0]),
    st.integers(0, 60),
)
def test_weights_come_back(
    count: int, dtype: str, seed: int, exponent: float, zone: float, columns: int
) -> None:
    base = from_float32(normal(count, seed, 0.1), dtype)
    move = 10**exponent * 0.1
    words = from_float32(to_float32(base, dtype) + normal(count, seed + 1, move), dtype)
    factors: tuple[Rows, Bytes] | None = None
    if columns:
        rows = Rows(columns, seed % columns)
        stored = np.random.default_rng(seed).integers(114, 143, rows.count(count))
        factors = rows, stored.astype(np.uint8)
    found = encode_delta(words, base, dtype, 1.5 * move, zone, factors)
    if found is None:
        assert move < 1e-5  # too fine for any grid
        return
    data, promised, sums = found
    assert (sums is None) == (dtype != "F32")
    back = decode(NEAR_WEIGHT, data, dtype, count, base)
    assert back.tobytes() == promised.tobytes()
    true, near, old = (to_float32(w, dtype).astype(np.float64) for w in (words, back, base))
    unit = 2.0 ** -int(np.frombuffer(data[:2], "<i2")[0])
    slack = unit + np.abs(true) * {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}[dtype]
    assert (np.abs(near - true) <= np.abs(old - true) + slack).all()
    if dtype == "F32":  # what has changed is on the grid
        changed = back != base
        assert np.array_equal(near[changed] / unit, np.rint(near[changed] / unit))


@given(st.integers(1, 3000), st.integers(0, 2**32), st.floats(1e-6, 1e3))
def test_keyframes_come_back(count: int, seed: int, step: float) -> None:
    words = normal(count, seed, 100 * step).view(np.uint32)
    found = encode_keyframe(words, "F32", step)
    assert found is not None
    assert decode(NEAR_WEIGHT, found[0], "F32", count).tobytes() == found[1].tobytes()
    error = np.abs(found[1].view(np.float32).astype(np.float64) - words.view(np.float32))
    assert error.max() <= step / 2


def test_values_near_the_end_of_the_grid() -> None:
    step = 2.0**-20
    for largest, fits in ((7.9, True), (8.1, False), (2.0**7, False)):
        base = np.full(200, largest, np.float32)
        words = (base + normal(200, 0, step)).astype(np.float32)
        found = encode_delta(words.view(np.uint32), base.view(np.uint32), "F32", step, 0.5)
        assert (found is not None) == fits
        if found is not None:
            grid = int(np.frombuffer(found[0][:2], "<i2")[0])
            assert (np.abs(found[1].view(np.float32)) * 2.0**grid < 1 << 24).all()
            back = decode(NEAR_WEIGHT, found[0], "F32", 200, base.view(np.uint32))
            assert back.tobytes() == found[1].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    base, words = normal(300, 0), normal(300, 1)
    for spoilt in (0, 1):
        pair = [base.copy(), words.copy()]
        pair[spoilt][7] = value
        bits = [array.view(np.uint32) for array in pair]
        assert encode_delta(bits[1], bits[0], "F32", 0.1, 0.5) is None
    words[7] = value
    assert encode_keyframe(words.view(np.uint32), "F32", 0.1) is None
    assert encode_second(np.abs(words).view(np.uint32), "F32", Rows(30)) is None
    assert encode_first(words.view(np.uint32), None, "F32", 1.5, 0.66) is None


# -- moments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [64.0, 2.0**16, 2.0**20, np.inf, np.nan])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("in_base", [False, True])
def test_a_value_far_above_the_others(
    largest: float, compiled: bool, in_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "active", lambda: both()[compiled])
    base = np.rint(normal(9000, 3, 100)) / np.float32(4096)
    values = base + normal(9000, 4, 0.01)
    (base if in_base else values)[77] = largest
    found = encode_delta(values.view(np.uint32), base.view(np.uint32), "F32", 0.02, 0.5)
    assert (found is None) == (not largest < 2**17)
    if found is not None:
        back = decode(NEAR_WEIGHT, found[0], "F32", 9000, base.view(np.uint32))
        assert back.tobytes() == found[1].tobytes()
        assert abs(back.view(np.float32)[77] - values[77]) < 0.02


@given(
    st.integers(1, 3000),
    DTYPE_NAMES,
    st.integers(0, 2**32),
    st.integers(1, 80),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_moments_come_back(count: int, dtype: str, seed: int, columns: int, zeros: float) -> None:
    random = np.random.default_rng(seed)
    rows = Rows(min(columns, count), seed % min(columns, count))
    squares = np.exp(2 * random.standard_normal(count)).astype(np.float32)
    squares[random.random(count) < zeros] = 0
    words = from_float32(squares, dtype)
    found = encode_second(words, dtype, rows)
    assert found is not None
    data, second, _ = found
    assert decode(NEAR_SECOND, data, dtype, count).tobytes() == second.tobytes()
    assert (to_float32(second, dtype)[squares > 0] > 0).all()
    first = from_float32(normal(count, seed) * np.sqrt(squares), dtype)
    coded = encode_first(first, second, dtype, 0.5, 0.66)
    assert coded is not None
    owner = put_slice(NEAR_SECOND, data)
    back = decode(NEAR_SCALED_FIRST, coded[0], dtype, count, companion=owner)
    assert back.tobytes() == coded[1].tobytes()
    alone = encode_first(first, None, dtype, 0.5, 0.66)
    assert alone is not None
    assert decode(NEAR_FIRST, alone[0], dtype, count).tobytes() == alone[1].tobytes()
    error = np.abs(to_float32(alone[1], dtype) - to_float32(first, dtype))
    assert (error <= np.abs(to_float32(first, dtype)) * 1.01).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22])
def test_weights_whose_squares_vanish(
    size: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "active", lambda: both()[compiled])
    base = normal(500, 1, size)
    values = base + normal(500, 2, size * 1e-3)
    for step in (size * 1e-3, size * 1e-9):  # the second is too fine for any grid
        found = encode_delta(values.view(np.uint32), base.view(np.uint32), "F32", step, 0.5)
        assert (found is None) == (step < size * 1e-6)
        if found is not None:
            back = decode(NEAR_WEIGHT, found[0], "F32", 500, base.view(np.uint32))
            assert (np.abs(back.view(np.float32) - values) <= step).all()


@given(
    st.integers(1, 30), st.integers(1, 60), DTYPE_NAMES, st.integers(1, 9), st.integers(0, 2**32)
)
def test_directions_come_back(height: int, columns: int, dtype: str, rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    start = int(random.integers(0, columns))
    count = max(columns, height * columns - start)
    rows = Rows(columns, start)
    squares = from_float32(np.exp(normal(count, seed)), dtype)
    strong = np.multiply.outer(normal(rows.count(count), seed), normal(columns, seed + 1))
    units = strong.reshape(-1)[start : start + count] + normal(count, seed + 2, 0.1)
    words = from_float32((units * np.sqrt(to_float32(squares, dtype))).astype(np.float32), dtype)
    second = encode_second(squares, dtype, rows)
    assert second is not None
    found = encode_low_rank(words, second[1], dtype, rows, rank, 0.1)
    assert found is not None
    owner = put_slice(NEAR_SECOND, second[0])
    back = decode(NEAR_SCALED_LOW_RANK, found[0], dtype, count, companion=owner)
    assert back.tobytes() == found[1].tobytes()
    plain = encode_low_rank(words, None, dtype, rows, rank, 0.1)
    assert plain is not None
    assert decode(NEAR_LOW_RANK, plain[0], dtype, count).tobytes() == plain[1].tobytes()
    if min(rows.count(count), columns) > 4:
        root = np.sqrt(to_float32(second[1], dtype))
        error = (to_float32(back, dtype) - to_float32(words, dtype)) / root
        assert np.square(error).sum() < np.square(to_float32(words, dtype) / root).sum()


def test_second_moments_of_every_size() -> None:
    """Rows that never moved, squares that all but vanish, and steep rows."""
    matrix = np.exp(normal(40 * 50, 0)).reshape(40, 50).astype(np.float32)
    matrix[3] = 0
    matrix[7] = 1e-30
    matrix[8] *= 1e-8
    matrix[9] *= 1e4
    matrix[:, 4] = 0
    found = encode_second(matrix.reshape(-1).view(np.uint32), "F32", Rows(50))
    assert found is not None
    near = found[1].view(np.float32).reshape(40, 50)
    assert np.array_equal(near == 0, matrix == 0)
    ratio = near[matrix > 0] / matrix[matrix > 0]
    assert ratio.min() > 1 / 64
    assert ratio.max() < 64
    logs = Factors.of(found[0], matrix.size).logs()
    assert np.array_equal(np.isnan(logs), ~(matrix > 0).any(1))
    factors = row_factors(logs, 0.0, 0.5)
    assert factors[3] == 128
    assert factors[9] < factors[0] < factors[8]


def test_a_moment_without_a_second_is_refused() -> None:
    first = np.ones(100, np.uint32)
    second = np.zeros(100, np.uint32)
    assert encode_first(first, second, "F32", 1.0, 0.66) is None


def test_a_row_times_a_column_is_what_comes_back() -> None:
    row = 2.0 ** np.arange(-20, 20, 0.5)
    column = 2.0 ** np.arange(0, 10.5, 0.5)
    matrix = np.multiply.outer(row, column).astype(np.float32)
    found = encode_second(matrix.reshape(-1).view(np.uint32), "F32", Rows(column.size))
    assert found is not None
    assert np.allclose(found[1].view(np.float32), matrix.reshape(-1), rtol=1e-5)


# -- all machines ------------------------------------------------------------------------------


def both() -> list[ModuleType]:
    from ckptvcs.codec.kernels import compiled

    return [reference, compiled]


@given(st.integers(1, 5000), st.integers(1, 700), st.integers(0, 2**32))
def test_compiled_loops_give_the_same_bits(count: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    columns = min(columns, count)
    rows = Rows(columns, seed % columns)
    height = rows.count(count)
    base, values = normal(count, seed, 0.1), normal(count, seed + 1, 0.1)
    steps = np.exp(random.standard_normal(height)).astype(np.float32)
    amounts = random.integers(1, 99, 256).astype(np.float32)
    scale, half = np.float32(2.0**12), np.float32(0.5)
    spread = random.choice([0.1, 1, 40, 1e4])
    codes = np.rint(random.standard_normal(count) * spread).astype(np.int32)
    bitmap, signs = np.packbits(codes != 0), np.packbits(codes < 0)
    found = np.flatnonzero(codes).astype(np.int32)
    second = np.exp(values)
    second[codes > 0] = 0
    first = np.where(second > 0, base, 0).astype(np.float32)
    odd = np.where(codes < 0, np.float32(random.choice([np.nan, -1, 0])), second)
    gaps = random.integers(0, 256, count).astype(np.uint8)
    gaps[-1] = 3
    planes = random.integers(0, 256, 3 * ((count + 7) // 8)).astype(np.uint8)
    left = random.integers(-127, 128, (height, 3)).astype(np.float32)
    right = random.integers(-127, 128, (3, columns)).astype(np.float32)
    results: list[list[object]] = []
    sums: list[tuple[float, ...]] = []
    for loop in both():
        changed, made = base.copy(), np.empty((2, count), np.float32)
        loop.directions(left, right, rows.start, half, second, made[0])
        loop.product(steps, second[:columns], rows.start, made[1])
        loop.change(changed, bitmap, codes[found], scale, half, amounts, steps, columns, rows.start)
        coded = loop.code_residuals(
            values, base, second, scale, half, half, amounts, steps, columns, rows.start
        )
        sums.append(coded[3])
        assert coded[4] >= max(np.abs(values).max(), np.abs(base).max())
        results.append(
            [
                *coded[:3],
                *loop.quantize_units(first, second, np.float32(0.3), half),
                loop.quantize_units(np.zeros_like(first), odd, half, half)[2],
                changed,
                loop.bit_positions(bitmap, count),
                loop.with_signs(np.abs(codes), signs),
                *loop.split(codes),
                loop.join_bits(planes, gaps, count, 3),
                loop.gap_positions(gaps),
                *loop.divide_roots(first, second),
                made[0],
                made[1],
                *loop.extent(values),
            ]
        )
    assert np.allclose(sums[0], sums[1], rtol=1e-3)
    for one, other in zip(*results, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other, np.asarray(one).dtype).tobytes()
    for name, arguments in (
        ("squares", (values, base)),
        ("weight_squares", (values, base, second, first)),
        ("root_squares", (second, second[::-1].copy())),
        ("log_sums", (second, columns, rows.start, height)),
        ("times_rows", (values[:columns][None], right)),
        ("times_columns", (left, values[:height, None]))
        if height <= count
        else ("times_rows", (values[:columns][None], right)),
    ):
        pair = [getattr(loop, name)(*arguments) for loop in both()]
        for left, right in zip(*pair, strict=True):
            assert np.allclose(left, right, rtol=1e-3, atol=5e-3 * count)


def test_a_base_of_another_type_is_refused() -> None:
    base = from_float32(normal(64, 0), "F16")
    rows = Rows(1), np.full(64, 128, np.uint8)
    weight = encode_delta(from_float32(normal(64, 1), "F16"), base, "F16", 0.1, 0.5, rows)
    moment = encode_first(from_float32(normal(64, 2), "F16"), None, "F16", 1.5, 0.66)
    assert weight is not None
    assert moment is not None
    wide = np.zeros(64, np.uint32)
    beside = Companion(memoryview(put_slice(NEAR_WEIGHT, weight.payload)), wide)
    for data, companion, stands_on in (
        (put_slice(NEAR_SCALED_FIRST, moment.payload), beside, None),
        (put_slice(NEAR_WEIGHT, weight.payload), None, wide),
    ):
        with pytest.raises(CorruptionError):
            decode_slice(memoryview(data), DTYPES["F16"], 64, stands_on, companion)
