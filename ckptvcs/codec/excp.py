"""ExCP as published (Li et al., ICML 2024, arXiv 2406.11257): the baseline of lossy coding.

    residual   D = W - base, base being what decode returns for the commit before (closed loop)
    prune      keep D(i) where |D(i)| > r,  r = min(clip, alpha / sqrt(mean v)) * median|D|
               keep m(i), v(i) where D(i) is kept and |m(i)| > beta * mean|m|
    quantize   a k-means codebook of 2^bits - 1 float16 centres for each of D, m and v;
               what is pruned is exactly zero
    store      each mask once (m and v share theirs), codes as bytes through a Huffman coder

The released code quantizes whole tensors and codes the three masks apart; coding m and v with one
mask changes no value.  Zeroed and underflowing second moments are part of the method: this codec
is here to be compared with.  Slice layouts: docs/format.md, "ExCP slices".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.masks import Mask, get_mask, put_mask
from ckptvcs.codec.sections import get_section, put_section
from ckptvcs.codec.spec import ExcpSpec
from ckptvcs.codec.words import Words, from_float32, to_float32
from ckptvcs.errors import CorruptionError, TruncatedError

Floats = NDArray[np.float32]
Centres = NDArray[np.float16]

_HEAD = struct.Struct("<B")  # number of centres
_LLOYD_ROUNDS = 50
_HISTOGRAM_BINS = 4096
_FITTED = 1 << 17  # more values move the centres by less than float16 resolves


def residual_threshold(median: float, mean_square: float | None, spec: ExcpSpec) -> float:
    """The size below which a residual is pruned; `mean_square` is mean(v), if there is a v."""
    if spec.multiplier is not None:
        return spec.multiplier * median
    if not mean_square:
        return spec.clip * median
    return min(spec.clip, spec.alpha / float(np.sqrt(mean_square))) * median


def fit_codebook(values: Floats, size: int) -> Centres:
    """At most `size` sorted centres for `values` (flat, finite), by 1-D k-means.

    Starts from the density that is best for many centres (the cube root of the values'
    density) and runs Lloyd's rounds on the sorted values.  Equal centres are merged.
    """
    if not values.size:
        return np.zeros(0, np.float16)
    ordered = np.sort(values[:: -(-values.size // _FITTED)].astype(np.float64))
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
    """The position of the nearest centre for each value."""
    table = centres.astype(np.float32)
    return np.searchsorted((table[1:] + table[:-1]) / 2, values).astype(np.uint8)


def _put_codes(codes: NDArray[np.uint8], centres: Centres) -> bytes:
    return _HEAD.pack(centres.size) + centres.tobytes() + put_section(codes)


def _get_values(data: memoryview, at: int, count: int) -> Floats:
    """Read a codebook and `count` codes, up to the end of `data`: their float32 values."""
    if at >= len(data):
        raise TruncatedError("corrupt frame: codebook is missing")
    size = data[at]
    at += _HEAD.size
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
    """Code one slice of a weight against its base; also what `decode_residual` will return."""
    kept = to_float32(words[mask], dtype) - to_float32(base[mask], dtype)
    codes = quantize(kept, centres)
    data = put_mask(mask) + _put_codes(codes, centres)
    return data, _add(base, mask, centres.astype(np.float32)[codes], dtype)


def decode_residual(data: memoryview, base: Words, dtype: str) -> Words:
    """Base + residual, one rounded float32 addition an entry, then one rounding to `dtype`.

    Raises:
        TruncatedError, CorruptionError: `data` is not a residual slice of `base`'s size.
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
    """Code one slice of a moment; without `own_mask` the decoder gets the mask from elsewhere."""
    codes = quantize(to_float32(words[mask], dtype), centres)
    data = (put_mask(mask) if own_mask else b"") + _put_codes(codes, centres)
    return data, _scatter(mask, centres.astype(np.float32)[codes], dtype)


def decode_moment(data: memoryview, count: int, companion: memoryview | None, dtype: str) -> Words:
    """The `count` words of a moment; `companion` is the slice whose mask this one shares.

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
