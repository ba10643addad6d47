"""ExCP (Li et al., ICML 2024, arXiv 2406.11257), the published method to compare with.

    residual   D = W - base; base is the decoded weight of the previous commit (closed loop)
    prune      keep D(i) if |D(i)| > r,  r = min(clip, alpha / sqrt(mean v)) * median|D|
               keep m(i), v(i) if D(i) is kept and |m(i)| > beta * mean|m|
    quantize   a k-means codebook of 2^bits - 1 float16 centres for each of D, m and v;
               pruned entries are exactly 0
    store      one mask for D, one for m and v; codes as Huffman-coded bytes

The authors' code stores three masks; sharing one between m and v changes no value. Second moments
that become 0 or underflow are part of the method. Slice layouts: docs/format.md, "ExCP slices".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.masks import Mask, get_mask, put_mask
from ckptvcs.codec.sections import get_section, put_section
from ckptvcs.codec.spec import ExcpSpec
from ckptvcs.codec.words import Floats, Words, from_float32, to_float32
from ckptvcs.errors import CorruptionError, TruncatedError

Centres = NDArray[np.float16]

_LLOYD_ROUNDS = 50
_HISTOGRAM_BINS = 4096
_FIT_VALUES = 1 << 17  # more values would move the centres by less than float16 resolves


def residual_threshold(median: float, mean_square: float | None, spec: ExcpSpec) -> float:
    """Return r, the magnitude up to which residuals are pruned.

    `median` is median|D|, `mean_square` is mean(v); None if the weight has no second moment.
    """
    if spec.multiplier is not None:
        return spec.multiplier * median
    if not mean_square:
        return spec.clip * median
    return min(spec.clip, spec.alpha / float(np.sqrt(mean_square))) * median


def fit_codebook(values: Floats, size: int) -> Centres:
    """Return at most `size` sorted centres for `values` (flat, finite), by 1-D k-means.

    The initial density of the centres is the cube root of that of the values, which is optimal for
    many centres. Then Lloyd's algorithm runs on the sorted values. Equal centres are merged.
    """
    if not values.size:
        return np.zeros(0, np.float16)
    ordered = np.sort(values[:: -(-values.size // _FIT_VALUES)].astype(np.float64))
    counts, edges = np.histogram(ordered, bins=_HISTOGRAM_BINS)
    mass = np.cumsum(np.cbrt(counts))
    wanted = (np.arange(size) + 0.5) / size * mass[-1]
    centres = edges[np.searchsorted(mass, wanted)]
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    for _ in range(_LLOYD_ROUNDS):
        borders = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        starts = np.concatenate(([0], borders))
        ends = np.concatenate((borders, [ordered.size]))
        filled = ends > starts
        moved = (sums[ends[filled]] - sums[starts[filled]]) / (ends - starts)[filled]
        if moved.size == centres.size and np.array_equal(moved, centres):
            break
        centres = moved
    with np.errstate(over="ignore"):
        return np.unique(centres.astype(np.float16))


def quantize(values: Floats, centres: Centres) -> NDArray[np.uint8]:
    """Return the index of the nearest centre for each value."""
    table = centres.astype(np.float32)
    return np.searchsorted((table[1:] + table[:-1]) / 2, values).astype(np.uint8)


def _put_codes(codes: NDArray[np.uint8], centres: Centres) -> bytes:
    return bytes([centres.size]) + centres.tobytes() + put_section(codes)


def _get_values(data: memoryview, at: int, count: int) -> Floats:
    """Return the `count` float32 values of a codebook and codes that end `data`."""
    if at >= len(data):
        raise TruncatedError("corrupt frame: codebook is missing")
    size = data[at]
    at += 1
    if at + 2 * size > len(data):
        raise TruncatedError("corrupt frame: truncated codebook")
    table = np.frombuffer(data[at : at + 2 * size], "<f2").astype(np.float32)
    codes, at = get_section(data, at + 2 * size, count)
    if at != len(data) or (count and int(codes.max()) >= size):
        raise CorruptionError("corrupt frame: codes outside the codebook, or trailing bytes")
    return table[codes]


def encode_residual(
    words: Words, base: Words, mask: Mask, centres: Centres, dtype: str
) -> tuple[bytes, Words]:
    """Encode a slice of a weight against its base; return it and its decoded words."""
    kept = to_float32(words[mask], dtype) - to_float32(base[mask], dtype)
    codes = quantize(kept, centres)
    data = put_mask(mask) + _put_codes(codes, centres)
    return data, _add(base, mask, centres.astype(np.float32)[codes], dtype)


def decode_residual(data: memoryview, base: Words, dtype: str) -> Words:
    """Decode a slice of a weight: method 1.

    Raises:
        TruncatedError, CorruptionError: `data` is not a slice of as many words as `base`.
    """
    mask, at = get_mask(data, 0, base.size)
    return _add(base, mask, _get_values(data, at, int(np.count_nonzero(mask))), dtype)


def _add(base: Words, mask: Mask, residual: Floats, dtype: str) -> Words:
    out = base.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        out[mask] = from_float32(to_float32(base[mask], dtype) + residual, dtype)
    return out


def encode_moment(
    words: Words, mask: Mask, centres: Centres, dtype: str, *, own_mask: bool
) -> tuple[bytes, Words]:
    """Encode a slice of a moment; return it and its decoded words.

    `own_mask` stores the mask, else the decoder reads it from the companion.
    """
    codes = quantize(to_float32(words[mask], dtype), centres)
    data = (put_mask(mask) if own_mask else b"") + _put_codes(codes, centres)
    return data, _scatter(mask, centres.astype(np.float32)[codes], dtype)


def decode_moment(data: memoryview, count: int, companion: memoryview | None, dtype: str) -> Words:
    """Decode a slice of `count` words of a moment: method 2, or 3 with a `companion`.

    Raises:
        TruncatedError, CorruptionError: `data` (or the companion) is not a moment slice.
    """
    if companion is None:
        mask, at = get_mask(data, 0, count)
    else:
        mask, at = get_mask(companion, 0, count)[0], 0
    return _scatter(mask, _get_values(data, at, int(np.count_nonzero(mask))), dtype)


def _scatter(mask: Mask, values: Floats, dtype: str) -> Words:
    rounded = from_float32(values, dtype)
    out = np.zeros(mask.size, rounded.dtype)
    out[mask] = rounded
    return out
