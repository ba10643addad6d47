"""Encode masks, which say which entries are kept.

A dense mask is stored as a bitmap, a sparse one as the gaps between kept entries. If less than a
fifth of the entries is kept, a byte per gap is close to the entropy. The low bits of long gaps are
stored raw, which keeps the Huffman table small. Layout: docs/format.md, "Mask".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.codec.sections import get_bits, get_bytes, get_section, header, put_bits, put_section
from ckptvcs.codec.words import Bytes
from ckptvcs.errors import CorruptionError, TruncatedError

Mask = NDArray[np.bool_]
Positions = NDArray[np.int32] | NDArray[np.int64]

BITMAP, GAPS, SPLIT_GAPS, UNARY_GAPS, RICE = 0, 1, 2, 3, 4
_ESCAPE = 255
_SPARSE_DENSITY = 0.19
_HIGH_BITS = 3  # of the mean gap; lower bits are almost random and are stored raw
_MAX_SHIFT = 20
_FEW = 1 << 13  # for fewer gaps, the Huffman table can be larger than what it saves


def _to_bytes(gaps: Positions) -> Bytes:
    """Return gaps as bytes; 255 adds 255 and continues the gap."""
    if not gaps.size or int(gaps.max()) < _ESCAPE:
        return gaps.astype(np.uint8)
    escapes = gaps // _ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    out = np.full(int(ends[-1]) + 1, _ESCAPE, np.uint8)
    out[ends] = gaps % _ESCAPE
    return out


def put_mask(mask: Mask, *, short: bool = False) -> bytes:
    """Encode a boolean mask; `short` encodes a short mask."""
    kept = int(np.count_nonzero(mask))
    return put_bitmap(np.packbits(mask), mask.size, kept, short=short)


def put_bitmap(bitmap: Bytes, count: int, kept: int, *, short: bool = False) -> bytes:
    """Encode a mask of `count` entries with `kept` set bits, given as a bitmap."""
    if kept < _SPARSE_DENSITY * count:
        return _put_gaps(kernels.active().bit_positions(bitmap, count), count, short=short)
    whole = header(BITMAP, bitmap.size, short) + put_section(bitmap, short=short)
    if not short or not 0 < kept < _FEW:
        return whole
    return min(whole, _put_rice(_gaps(kernels.active().bit_positions(bitmap, count))), key=len)


def _gaps(positions: Positions) -> Positions:
    gaps: Positions = np.diff(positions, prepend=-1)
    gaps -= 1
    return gaps


def _put_gaps(positions: Positions, count: int, *, short: bool) -> bytes:
    gaps = _gaps(positions)
    shift = max(0, (count // max(positions.size, 1)).bit_length() - _HIGH_BITS)
    if not shift or not short:  # only short masks have the newer forms
        stream = _to_bytes(gaps)
        return header(GAPS, stream.size, short) + put_section(stream, short=short)
    stream = _to_bytes(gaps >> shift)
    head = header(SPLIT_GAPS, stream.size, short)
    split = head + put_section(stream, short=short) + bytes([shift]) + put_bits(gaps, shift)
    if not 0 < gaps.size < _FEW:
        return split
    return min(split, _put_rice(gaps), key=len)


def _put_rice(gaps: Positions) -> bytes:
    """Encode gaps as Golomb-Rice codes, which are near the entropy of random gaps."""
    shift = max(0, int(np.log2(max(1.0, float(gaps.mean()) * np.log(2))) + 0.5))
    ends = np.cumsum((gaps >> shift) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.bool_)
    unary[ends] = True
    packed = np.packbits(unary)
    low = np.packbits((gaps[:, None] >> np.arange(shift)[::-1]) & 1)
    return header(RICE, packed.size, True) + packed.tobytes() + bytes([shift]) + low.tobytes()


def _get_rice_bits(
    data: memoryview, at: int, count: int, shift: int
) -> tuple[NDArray[np.int32], int]:
    """Read the `shift` low bits of `count` gaps, and the offset after them."""
    packed, at = get_bytes(data, at, (count * shift + 7) // 8)
    bits = np.unpackbits(packed, count=count * shift).reshape(count, shift)
    return bits @ (np.int32(1) << np.arange(shift, dtype=np.int32)[::-1]), at


def _positions_of(form: int, stream: Bytes) -> Positions:
    """Return the positions of kept entries if all low bits of the gaps are 0."""
    if form >= UNARY_GAPS:
        return kernels.active().bit_positions(stream, 8 * stream.size)
    if stream.size and stream[-1] == _ESCAPE:
        raise CorruptionError("corrupt mask: it ends inside a gap")
    return kernels.active().gap_positions(stream)


def _get_low_bits(
    form: int, positions: Positions, data: memoryview, at: int
) -> tuple[Positions, int]:
    """Read the low bits of the gaps; return the full positions and the next offset."""
    if at >= len(data) or data[at] > _MAX_SHIFT:
        raise CorruptionError("corrupt mask: its gaps have too many low bits")
    shift = data[at]
    read = _get_rice_bits if form == RICE else get_bits
    low, at = read(data, at + 1, positions.size, shift)
    gaps = _gaps(positions)
    return np.asarray(np.cumsum((gaps.astype(np.int64) << shift) + low + 1) - 1, np.int64), at


def get_positions(
    data: memoryview, at: int, count: int, *, short: bool = False
) -> tuple[Positions, int]:
    """Decode a mask of `count` entries at offset `at`.

    Returns the ascending positions of the kept entries, and the offset after the mask.

    Raises:
        TruncatedError, CorruptionError: the data is not a valid mask.
    """
    bitmap, positions, at = _get(data, at, count, short=short)
    if positions is None:
        positions = kernels.active().bit_positions(bitmap, count)
    return positions, at


def get_bitmap(data: memoryview, at: int, count: int, *, short: bool = False) -> tuple[Bytes, int]:
    """Decode a mask as `get_positions` does, to a bitmap; bits after the last entry are 0."""
    bitmap, positions, at = _get(data, at, count, short=short)
    if positions is not None:
        mask = np.zeros(count, np.bool_)
        mask[positions] = True
        bitmap = np.packbits(mask)
    elif count % 8 and bitmap[-1] & (0xFF >> count % 8):
        bitmap = bitmap.copy()
        bitmap[-1] &= 0xFF << 8 - count % 8 & 0xFF
    return bitmap, at


def get_mask(data: memoryview, at: int, count: int) -> tuple[Mask, int]:
    """Decode a mask as `get_positions` does, to a boolean per entry."""
    bitmap, at = get_bitmap(data, at, count)
    return np.unpackbits(bitmap, count=count).view(np.bool_), at


def _get(
    data: memoryview, at: int, count: int, *, short: bool
) -> tuple[Bytes, Positions | None, int]:
    """Decode a mask to a bitmap, or to positions, whichever its form is."""
    begin = at + (4 if short else 5)
    if begin > len(data):
        raise TruncatedError("corrupt frame: truncated mask header")
    form, size = data[at], int.from_bytes(data[at + 1 : begin], "little")
    if form > (RICE if short else GAPS) or size > max(count, 1):
        raise CorruptionError("corrupt frame: unknown mask form or size")
    if form >= UNARY_GAPS:
        stream, at = get_bytes(data, begin, size)
    else:
        stream, at = get_section(data, begin, size, short=short)
    if form == BITMAP:
        if size != (count + 7) // 8:
            raise CorruptionError("corrupt frame: bitmap has the wrong size")
        return stream, None, at
    positions = _positions_of(form, stream)
    if form >= SPLIT_GAPS:
        positions, at = _get_low_bits(form, positions, data, at)
    if positions.size and positions[-1] >= count:
        raise CorruptionError("corrupt mask: position outside its slice")
    return stream[:0], positions.astype(np.int32), at
