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

from ckptvcs.codec import loops
from ckptvcs.codec.planes import get_bytes, get_section, put_bits, put_section
from ckptvcs.codec.sparse import Positions, get_positions, put_bitmap, put_mask, put_positions
from ckptvcs.errors import CorruptionError, TruncatedError

Integers = NDArray[np.int32]

SPARSE, DENSE = 0, 1
MAX_CODE = 1 << 24
"""Codes are smaller than this in magnitude."""

_DENSE_SHARE = 0.75  # of codes that are not zero; from there on a byte a code costs less
_UNARY_SHARE = 0.6  # of magnitudes that go on; from there on their bytes cost less than a plane
_MAX_PLANES = 15
_BYTE = struct.Struct("<B")
_COUNT = struct.Struct("<I")
_FINE_BITS = 5  # a dense code keeps about this many bits a standard deviation for Huffman


@dataclass(frozen=True)
class Codes:
    """The codes of a slice: `values` at `positions`, ascending, and zeros elsewhere; without
    positions, `values` are all of them.
    """

    positions: Positions | None
    values: Integers

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return max(int(self.values.max(initial=0)), -int(self.values.min(initial=0)))

    def dense(self, count: int) -> Integers:
        """All `count` codes."""
        if self.positions is None:
            return self.values
        out = np.zeros(count, np.int32)
        out[self.positions] = self.values
        return out

    def sparse(self) -> tuple[Positions, Integers]:
        """Positions and values of those that are not zero."""
        if self.positions is not None:
            return self.positions, self.values
        bitmap = np.packbits(self.values != 0)
        active = loops.active()
        return active.bit_positions(bitmap, self.values.size), active.kept(self.values, bitmap)


def put_codes(codes: Codes, count: int) -> bytes:
    """Store the `count` codes of a slice, each below `MAX_CODE` in magnitude."""
    if codes.positions is not None:
        mask = put_positions(codes.positions, count, short=True)
        return _BYTE.pack(SPARSE) + mask + _put_signed(codes.values)
    return _put_all(codes.values)


def _put_all(codes: Integers) -> bytes:
    bitmap = np.packbits(codes != 0)
    count = int(np.count_nonzero(codes))
    if count > _DENSE_SHARE * codes.size:
        return _BYTE.pack(DENSE) + _put_dense(codes)
    active, sizes = loops.active(), np.abs(codes)
    large = np.packbits(sizes > 1)
    rest = active.kept(sizes, large)
    signs = active.extract(np.packbits(codes < 0), bitmap)
    mask = put_bitmap(bitmap, codes.size, count, short=True)
    plane = put_bitmap(active.extract(large, bitmap), count, rest.size, short=True)
    return b"".join([_BYTE.pack(SPARSE), mask, signs.tobytes(), _put_sizes(count, plane, rest)])


def _put_signed(values: Integers) -> bytes:
    """Codes that are not zero."""
    sizes = np.abs(values)
    large = sizes > 1
    plane = put_mask(large, short=True)
    return np.packbits(values < 0).tobytes() + _put_sizes(values.size, plane, sizes[large])


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
    parts = [_BYTE.pack(len(planes)), *planes, _COUNT.pack(rest.size)]
    if rest.size:
        parts.append(_put_words((rest - level).astype(np.uint32)))
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
        raise TruncatedError("a frame ends inside its codes")
    return int(layout.unpack_from(data, at)[0]), at + layout.size


def get_codes(data: memoryview, at: int, count: int) -> tuple[Codes, int]:
    """Read the codes of `count` entries at `at`; also where the next section begins.

    Raises:
        TruncatedError, CorruptionError: there are no such codes.
    """
    form, at = _take(_BYTE, data, at)
    if form == DENSE:
        return _get_dense(data, at, count)
    if form != SPARSE:
        raise CorruptionError("a frame holds codes of an unknown form")
    positions, at = get_positions(data, at, count, short=True)
    values, at = _get_signed(data, at, positions.size)
    return Codes(positions, values), at


def _get_signed(data: memoryview, at: int, count: int) -> tuple[Integers, int]:
    signs, at = get_bytes(data, at, (count + 7) // 8)
    planes, at = _take(_BYTE, data, at)
    sizes = np.ones(count, np.int32)
    above: Positions = np.arange(count if planes else 0, dtype=np.int32)
    for _ in range(planes):
        kept, at = get_positions(data, at, above.size, short=True)
        above = loops.active().raise_sizes(sizes, above, kept)
    left, at = _take(_COUNT, data, at)
    if left:
        if left != (above.size if planes else count):
            raise CorruptionError("a frame holds magnitudes that belong nowhere")
        words, at = _get_words(data, at, left)
        if int(words.max()) >= MAX_CODE:
            raise CorruptionError("a frame holds a code that is too large")
        sizes[above if planes else slice(None)] += words.astype(np.int32)
    values: Integers = loops.active().with_signs(sizes, signs)
    return values, at


def _get_dense(data: memoryview, at: int, count: int) -> tuple[Codes, int]:
    shift, at = _take(_BYTE, data, at)
    if shift > 24:
        raise CorruptionError("a frame holds codes of too many bits")
    planes, at = get_bytes(data, at, shift * ((count + 7) // 8))
    high, at = get_section(data, at, count, short=True)
    values: Integers = loops.active().join_bits(planes, high, count, shift)
    outliers, at = _take(_COUNT, data, at)
    escaped = high == 0
    if outliers != np.count_nonzero(escaped):
        raise CorruptionError("a frame holds outliers that belong nowhere")
    if outliers:
        words, at = _get_words(data, at, outliers)
        values[escaped] = words.view(np.int32)
    if count and max(int(values.max()), -int(values.min())) >= MAX_CODE:
        raise CorruptionError("a frame holds a code that is too large")
    return Codes(None, values), at
