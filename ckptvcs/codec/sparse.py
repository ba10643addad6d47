"""Masks and the codes at their kept positions <-> sections.

A mask is stored as a bitmap where it is dense and as gaps between kept positions where it is
sparse: a byte a gap is close to the entropy below a density of a fifth, a bitmap above it.
Layout: docs/format.md, "Mask".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec.planes import Bytes, get_section, put_section
from ckptvcs.errors import CorruptionError, TruncatedError

Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]

BITMAP, GAPS = 0, 1
_HEAD = struct.Struct("<BI")  # form, section size before compression
_ESCAPE = 255
_SPARSE_DENSITY = 0.19


def _to_gaps(mask: Mask) -> Bytes:
    """Distance of each kept position from the one before, less one; 255 means "255 more"."""
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    escapes = gaps // _ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    out = np.full(int(ends[-1]) + 1 if ends.size else 0, _ESCAPE, np.uint8)
    out[ends] = gaps % _ESCAPE
    return out


def _from_gaps(gaps: Bytes, count: int) -> Positions:
    final = gaps != _ESCAPE
    positions: Positions = np.cumsum(gaps.astype(np.int64) + final)[final] - 1
    if gaps.size and (not final[-1] or positions[-1] >= count):
        raise CorruptionError("a mask keeps a position outside its slice")
    return positions


def put_mask(mask: Mask) -> bytes:
    """Store which entries of a slice are kept."""
    sparse = np.count_nonzero(mask) < _SPARSE_DENSITY * mask.size
    stream = _to_gaps(mask) if sparse else np.packbits(mask)
    return _HEAD.pack(GAPS if sparse else BITMAP, stream.size) + put_section(stream)


def get_positions(data: memoryview, at: int, count: int) -> tuple[Positions, int]:
    """Read the mask of `count` entries at `at` as the ascending positions that it keeps; also
    where the next section begins.

    Raises:
        TruncatedError, CorruptionError: there is no such mask.
    """
    if at + _HEAD.size > len(data):
        raise TruncatedError("a frame ends inside a mask header")
    form, size = _HEAD.unpack_from(data, at)
    if form > GAPS or size > max(count, 1):
        raise CorruptionError("a frame holds a mask of an unknown form or size")
    stream, at = get_section(data, at + _HEAD.size, size)
    if form == GAPS:
        return _from_gaps(stream, count), at
    if size != (count + 7) // 8:
        raise CorruptionError("a frame holds a bitmap of a wrong size")
    return np.flatnonzero(np.unpackbits(stream, count=count)), at


def get_mask(data: memoryview, at: int, count: int) -> tuple[Mask, int]:
    """Read the mask of `count` entries at `at`; also where the next section begins.

    Raises:
        TruncatedError, CorruptionError: there is no such mask.
    """
    positions, at = get_positions(data, at, count)
    mask = np.zeros(count, np.bool_)
    mask[positions] = True
    return mask, at
