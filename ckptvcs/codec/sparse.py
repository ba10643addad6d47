"""Masks and the codes at their kept positions <-> sections.

A mask is stored as a bitmap where it is dense and as gaps between kept positions where it is
sparse: a byte a gap is close to the entropy below a density of a fifth, a bitmap above it.  Long
gaps give up their low bits, so that Huffman's alphabet, and its table, stay small.
Layout: docs/format.md, "Mask".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import loops
from ckptvcs.codec.planes import Bytes, get_bits, get_section, put_bits, put_section
from ckptvcs.errors import CorruptionError, TruncatedError

Mask = NDArray[np.bool_]
Positions = NDArray[np.int32] | NDArray[np.int64]

BITMAP, GAPS, SPLIT_GAPS = 0, 1, 2
_HEAD = struct.Struct("<BI")  # form, section size before compression
_ESCAPE = 255
_SPARSE_DENSITY = 0.19
_HIGH_BITS = 4  # of the mean gap that Huffman sees; lower bits are as good as random
_MAX_SHIFT = 20


def _to_bytes(gaps: Positions) -> Bytes:
    """Numbers as bytes; 255 means "255 more"."""
    if not gaps.size or int(gaps.max()) < _ESCAPE:
        return gaps.astype(np.uint8)
    escapes = gaps // _ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    out = np.full(int(ends[-1]) + 1, _ESCAPE, np.uint8)
    out[ends] = gaps % _ESCAPE
    return out


def put_mask(mask: Mask) -> bytes:
    """Store which entries of a slice are kept."""
    return put_bitmap(np.packbits(mask), mask.size, int(np.count_nonzero(mask)))


def put_bitmap(bitmap: Bytes, count: int, kept: int) -> bytes:
    """Store the mask of `count` entries, of which `kept` are kept, given as the bits of bytes."""
    if kept >= _SPARSE_DENSITY * count:
        return _HEAD.pack(BITMAP, bitmap.size) + put_section(bitmap)
    return _put_gaps(loops.active().bit_positions(bitmap, count), count)


def put_positions(positions: Positions, count: int) -> bytes:
    """Store the mask of `count` entries that keeps those at `positions`, ascending."""
    if positions.size < _SPARSE_DENSITY * count:
        return _put_gaps(positions, count)
    mask = np.zeros(count, np.bool_)
    mask[positions] = True
    return put_mask(mask)


def _put_gaps(positions: Positions, count: int) -> bytes:
    gaps = np.diff(positions, prepend=-1)
    gaps -= 1
    kept = positions.size
    shift = max(0, (count // max(kept, 1)).bit_length() - _HIGH_BITS)
    stream = _to_bytes(gaps >> shift)
    if not shift:
        return _HEAD.pack(GAPS, stream.size) + put_section(stream)
    head = _HEAD.pack(SPLIT_GAPS, stream.size)
    return head + put_section(stream) + bytes([shift]) + put_bits(gaps, shift)


def _with_low_bits(positions: Positions, low: NDArray[np.int32], shift: int) -> Positions:
    """Positions of gaps to which `low` bits below `shift` belong."""
    gaps = np.diff(positions, prepend=-1) - 1
    return np.asarray(np.cumsum((gaps.astype(np.int64) << shift) + low + 1) - 1, np.int64)


def get_positions(data: memoryview, at: int, count: int) -> tuple[Positions, int]:
    """Read the mask of `count` entries at `at` as the ascending positions that it keeps; also
    where the next section begins.

    Raises:
        TruncatedError, CorruptionError: there is no such mask.
    """
    if at + _HEAD.size > len(data):
        raise TruncatedError("a frame ends inside a mask header")
    form, size = _HEAD.unpack_from(data, at)
    if form > SPLIT_GAPS or size > max(count, 1):
        raise CorruptionError("a frame holds a mask of an unknown form or size")
    stream, at = get_section(data, at + _HEAD.size, size)
    if form == BITMAP:
        if size != (count + 7) // 8:
            raise CorruptionError("a frame holds a bitmap of a wrong size")
        found: Positions = loops.active().bit_positions(stream, count)
        return found, at
    if stream.size and stream[-1] == _ESCAPE:
        raise CorruptionError("a mask ends inside a gap")
    positions: Positions = loops.active().gap_positions(stream)
    if form == SPLIT_GAPS:
        if at >= len(data) or data[at] > _MAX_SHIFT:
            raise CorruptionError("a frame holds gaps of too many bits")
        low, end = get_bits(data, at + 1, positions.size, data[at])
        positions, at = _with_low_bits(positions, low, data[at]), end
    if positions.size and positions[-1] >= count:
        raise CorruptionError("a mask keeps a position outside its slice")
    return positions.astype(np.int32), at


def get_mask(data: memoryview, at: int, count: int) -> tuple[Mask, int]:
    """Read the mask of `count` entries at `at`; also where the next section begins.

    Raises:
        TruncatedError, CorruptionError: there is no such mask.
    """
    positions, at = get_positions(data, at, count)
    mask = np.zeros(count, np.bool_)
    mask[positions] = True
    return mask, at
