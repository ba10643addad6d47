"""Signed integer codes of a quantizer <-> sections, close to their order-0 entropy.

zstd's entropy stage is a Huffman coder, which cannot spend less than a bit on a symbol; so codes
are laid out such that symbols are worth a bit or more:

    sparse   where most codes are zero: a mask of those that are not, their signs as raw bits, and
             magnitudes in unary, plane after plane, each a mask over what the plane before kept
    dense    where few are zero: raw low bits, and the rest as bytes through Huffman

Layout: docs/format.md, "Codes".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.masks import Positions, get_bitmap, get_positions, put_bitmap, put_mask
from ckptvcs.codec.sections import Bytes, get_bytes, get_section, put_bits, put_section
from ckptvcs.errors import CorruptionError, TruncatedError

Integers = NDArray[np.int32]

LONG_SPARSE, DENSE, SPARSE = 0, 1, 2
MAX_CODE = 1 << 24
"""Codes are smaller than this in magnitude."""

_DENSE_SHARE = 0.75  # of codes that are not zero; from there on a byte a code costs less
_UNARY_SHARE = 0.6  # of magnitudes that go on; from there on their bytes cost less than a plane
_MAX_PLANES = 15
_MORE = 128  # beside the number of planes: what the last one keeps is followed by numbers
_BYTE = struct.Struct("<B")
_COUNT = struct.Struct("<I")
_FINE_BITS = 5  # a dense code keeps about this many bits a standard deviation for Huffman


@dataclass(frozen=True)
class Codes:
    """The codes of a slice: `values` where `bitmap` has a bit (the first entry's is the top bit of
    the first byte), and zeros elsewhere; without a bitmap, `values` are all of them.
    """

    bitmap: Bytes | None
    values: Integers

    def dense(self, count: int) -> Integers:
        """All `count` codes."""
        if self.bitmap is None:
            return self.values
        out = np.zeros(count, np.int32)
        out[np.unpackbits(self.bitmap, count=count).view(np.bool_)] = self.values
        return out

    def sparse(self) -> tuple[Bytes, Integers]:
        """The bitmap of those that are not zero, and these."""
        if self.bitmap is not None:
            return self.bitmap, self.values
        there = self.values != 0
        return np.packbits(there), self.values[there]


def put_codes(codes: Codes, count: int) -> bytes:
    """Store the `count` codes of a slice, each below `MAX_CODE` in magnitude."""
    there = np.count_nonzero(codes.values) if codes.bitmap is None else codes.values.size
    if there > _DENSE_SHARE * count:
        return _BYTE.pack(DENSE) + _put_dense(codes.dense(count))
    bitmap, values = codes.sparse()
    signs, large, rest = kernels.active().split(values)
    mask = put_bitmap(bitmap, count, values.size, short=True)
    plane = put_bitmap(large, values.size, rest.size, short=True)
    sizes = _put_sizes(values.size, plane, rest)
    return b"".join([_BYTE.pack(SPARSE), mask, signs.tobytes(), sizes])


def _put_sizes(count: int, plane: bytes, rest: Integers) -> bytes:
    """The sizes of `count` codes, of which those that `plane` keeps are above 1: `rest`."""
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
    parts = [_BYTE.pack(len(planes) | (_MORE if rest.size else 0)), *planes]
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


def _take(layout: struct.Struct, data: memoryview, at: int) -> tuple[int, int]:
    if at + layout.size > len(data):
        raise TruncatedError("corrupt frame: truncated codes")
    return int(layout.unpack_from(data, at)[0]), at + layout.size


def get_codes(data: memoryview, at: int, count: int) -> tuple[Codes, int]:
    """Read the codes of `count` entries at `at`; also where the next section begins.

    Raises:
        TruncatedError, CorruptionError: the data are not valid codes.
    """
    form, at = _take(_BYTE, data, at)
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
    planes, at = _take(_BYTE, data, at)
    more = long or planes & _MORE
    planes &= 255 if long else _MORE - 1
    sizes = np.ones(count, np.int32)
    above: Positions | None = None  # all
    for _ in range(planes):
        kept, at = get_positions(data, at, count if above is None else above.size, short=True)
        above = kept if above is None else above[kept]
        sizes[above] += 1
    left, at = _take(_COUNT, data, at) if more else (0, at)
    if left:
        if left != (count if above is None else above.size):
            raise CorruptionError("corrupt codes: wrong number of magnitudes")
        words, at = _get_words(data, at, left)
        if int(words.max()) >= MAX_CODE:
            raise CorruptionError("corrupt codes: code out of range")
        sizes[slice(None) if above is None else above] += words.astype(np.int32)
    values: Integers = kernels.active().with_signs(sizes, signs)
    return values, at


def _get_dense(data: memoryview, at: int, count: int) -> tuple[Codes, int]:
    shift, at = _take(_BYTE, data, at)
    if shift > 24:
        raise CorruptionError("corrupt codes: too many low bits")
    planes, at = get_bytes(data, at, shift * ((count + 7) // 8))
    high, at = get_section(data, at, count, short=True)
    values: Integers = kernels.active().join_bits(planes, high, count, shift)
    outliers, at = _take(_COUNT, data, at)
    escaped = high == 0
    if outliers != np.count_nonzero(escaped):
        raise CorruptionError("corrupt codes: wrong number of outliers")
    if outliers:
        words, at = _get_words(data, at, outliers)
        values[escaped] = words.view(np.int32)
    if count and max(int(values.max()), -int(values.min())) >= MAX_CODE:
        raise CorruptionError("corrupt codes: code out of range")
    return Codes(None, values), at
