"""Encode signed integer codes in nearly the size of their order-0 entropy.

The entropy coder of zstd is a Huffman coder: each symbol takes at least one bit. Therefore the
layout gives it only symbols whose entropy is at least about one bit:

    sparse   few codes are not 0: a mask of these, their signs as raw bits, and their magnitudes in
             unary: each plane is a mask over the entries that the plane before it keeps
    dense    few codes are 0: raw low bits, and a Huffman-coded byte for the high bits

Layout: docs/format.md, "Codes".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.masks import Positions, get_bitmap, get_positions, put_bitmap, put_mask
from ckptvcs.codec.sections import get_bytes, get_section, put_bits, put_section, take
from ckptvcs.codec.words import Bytes, Integers
from ckptvcs.errors import CorruptionError

LONG_SPARSE, DENSE, SPARSE = 0, 1, 2
MAX_CODE = 1 << 24
"""Every code has a magnitude below this."""

_DENSE_SHARE = 0.75  # if more codes than this are not 0, the dense form is smaller
_UNARY_SHARE = 0.6  # if a plane would keep more entries than this, plain numbers are smaller
_MAX_PLANES = 15
_HAS_REST = 128  # added to the number of planes if numbers follow the last plane
_BYTE = struct.Struct("<B")
_COUNT = struct.Struct("<I")
_FINE_BITS = 5  # Huffman gets about this many bits of a dense code per standard deviation


@dataclass(frozen=True)
class Codes:
    """The codes of a slice.

    `values` (int32) are the codes of the entries that `bitmap` keeps; the other codes are 0. The
    first entry is the top bit of the first byte. Without a bitmap, `values` holds all codes.
    """

    bitmap: Bytes | None
    values: Integers

    def dense(self, count: int) -> Integers:
        """Return all `count` codes."""
        if self.bitmap is None:
            return self.values
        out = np.zeros(count, np.int32)
        out[np.unpackbits(self.bitmap, count=count).view(np.bool_)] = self.values
        return out

    def sparse(self) -> tuple[Bytes, Integers]:
        """Return the bitmap of the codes that are not 0, and these codes."""
        if self.bitmap is not None:
            return self.bitmap, self.values
        nonzero = self.values != 0
        return np.packbits(nonzero), self.values[nonzero]


def put_codes(codes: Codes, count: int) -> bytes:
    """Encode the `count` codes of a slice, with magnitudes below `MAX_CODE`."""
    nonzero = np.count_nonzero(codes.values) if codes.bitmap is None else codes.values.size
    if nonzero > _DENSE_SHARE * count:
        return _BYTE.pack(DENSE) + _put_dense(codes.dense(count))
    bitmap, values = codes.sparse()
    signs, large, rest = kernels.active().split(values)
    mask = put_bitmap(bitmap, count, values.size, short=True)
    plane = put_bitmap(large, values.size, rest.size, short=True)
    sizes = _put_sizes(values.size, plane, rest)
    return b"".join([_BYTE.pack(SPARSE), mask, signs.tobytes(), sizes])


def _put_sizes(count: int, plane: bytes, rest: Integers) -> bytes:
    """Encode `count` magnitudes; `plane` keeps those above 1, which are `rest`."""
    planes = [plane] if rest.size else []
    level = 2
    while rest.size and level <= _MAX_PLANES:
        above = rest > level
        if not above.any():
            rest = rest[:0]
        elif np.count_nonzero(above) > _UNARY_SHARE * rest.size:
            break
        else:
            planes.append(put_mask(above, short=True))
            rest = rest[above]
            level += 1
    parts = [_BYTE.pack(len(planes) | (_HAS_REST if rest.size else 0)), *planes]
    if rest.size:
        parts += [_COUNT.pack(rest.size), _put_words((rest - level).astype(np.uint32))]
    return b"".join(parts)


def _put_words(words: NDArray[np.uint32]) -> bytes:
    planes = np.ascontiguousarray(words.view(np.uint8).reshape(words.size, 4).T)
    return b"".join(put_section(plane, short=True) for plane in planes)


def _get_words(data: memoryview, at: int, count: int) -> tuple[NDArray[np.uint32], int]:
    rows = np.empty((count, 4), np.uint8)
    for plane in range(4):
        rows[:, plane], at = get_section(data, at, count, short=True)
    return rows.reshape(-1).view("<u4"), at


def _put_dense(codes: Integers) -> bytes:
    spread = float(np.abs(codes[:: max(1, codes.size >> 16)]).mean())
    shift = max(0, int(np.log2(max(spread, 1))) - _FINE_BITS + 1)
    parts = [_BYTE.pack(shift), put_bits(codes, shift)]
    high = codes >> shift
    escaped = np.abs(high) > 127
    parts.append(put_section(np.where(escaped, 0, high + 128).astype(np.uint8), short=True))
    outliers = codes[escaped]
    parts.append(_COUNT.pack(outliers.size))
    if outliers.size:
        parts.append(_put_words(outliers.view(np.uint32)))
    return b"".join(parts)


def get_codes(data: memoryview, at: int, count: int) -> tuple[Codes, int]:
    """Decode `count` codes at offset `at`; return them and the offset after them.

    Raises:
        TruncatedError, CorruptionError: the data is not valid codes.
    """
    (form,), at = take(_BYTE, data, at)
    if form == DENSE:
        return _get_dense(data, at, count)
    if form not in (LONG_SPARSE, SPARSE):
        raise CorruptionError("corrupt frame: unknown form of codes")
    bitmap, at = get_bitmap(data, at, count, short=True)
    count = int(np.count_nonzero(np.unpackbits(bitmap)))
    values, at = _get_signed(data, at, count, long=form == LONG_SPARSE)
    return Codes(bitmap, values), at


def _get_signed(data: memoryview, at: int, count: int, *, long: bool) -> tuple[Integers, int]:
    signs, at = get_bytes(data, at, (count + 7) // 8)
    (planes,), at = take(_BYTE, data, at)
    has_rest = long or planes & _HAS_REST
    planes &= 255 if long else _HAS_REST - 1
    sizes = np.ones(count, np.int32)
    above: Positions | None = None  # None: all entries
    for _ in range(planes):
        kept, at = get_positions(data, at, count if above is None else above.size, short=True)
        above = kept if above is None else above[kept]
        sizes[above] += 1
    (rest,), at = take(_COUNT, data, at) if has_rest else ((0,), at)
    if rest:
        if rest != (count if above is None else above.size):
            raise CorruptionError("corrupt codes: wrong number of magnitudes")
        words, at = _get_words(data, at, rest)
        if int(words.max()) >= MAX_CODE:
            raise CorruptionError("corrupt codes: code out of range")
        sizes[slice(None) if above is None else above] += words.astype(np.int32)
    return kernels.active().with_signs(sizes, signs), at


def _get_dense(data: memoryview, at: int, count: int) -> tuple[Codes, int]:
    (shift,), at = take(_BYTE, data, at)
    if shift > 24:
        raise CorruptionError("corrupt codes: too many low bits")
    planes, at = get_bytes(data, at, shift * ((count + 7) // 8))
    high, at = get_section(data, at, count, short=True)
    values = kernels.active().join_bits(planes, high, count, shift)
    (outliers,), at = take(_COUNT, data, at)
    escaped = high == 0
    if outliers != np.count_nonzero(escaped):
        raise CorruptionError("corrupt codes: wrong number of outliers")
    if outliers:
        words, at = _get_words(data, at, outliers)
        values[escaped] = words.view(np.int32)
    if count and max(int(values.max()), -int(values.min())) >= MAX_CODE:
        raise CorruptionError("corrupt codes: code out of range")
    return Codes(None, values), at
