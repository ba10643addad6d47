"""The slices of a frame: one encoded tensor is cut into slices that are coded and read alone.

    frame = slice slice ... slice       SLICE_WORDS words each, the last one shorter
    slice = method (1 byte)  payload

Slices bound the memory of every operation, whatever the size of the tensor, and are the unit of
hashing, of threads and of random access.  Frames of one tensor along a chain are cut alike, so a
slice decodes from the same slice of its base.  Layout: docs/format.md, "Frame".
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptvcs.codec import excp, lossless, near_lowrank, near_moments, near_weight, patch
from ckptvcs.codec.dtypes import DTYPES, WEIGHT_DTYPES, DType
from ckptvcs.codec.words import Words, from_float32, to_float32, word_type
from ckptvcs.errors import CorruptionError, TruncatedError

SLICE_WORDS = 1 << 20

LOSSLESS = 0
EXCP_RESIDUAL, EXCP_MOMENT, EXCP_SHARED_MASK_MOMENT = 1, 2, 3
NEAR_WEIGHT, NEAR_SECOND, NEAR_FIRST, NEAR_SCALED_FIRST = 4, 5, 6, 7
ROUNDED, NEAR_SCALED_LOW_RANK, NEAR_LOW_RANK = 8, 9, 10
PATCH = 11


def slice_counts(words: int) -> list[int]:
    """The number of words in each slice of a tensor of `words` words."""
    full, rest = divmod(words, SLICE_WORDS)
    return [SLICE_WORDS] * full + ([rest] if rest else [])


def put_slice(method: int, payload: bytes) -> bytes:
    """A slice as it is stored."""
    return bytes([method]) + payload


@dataclass(frozen=True)
class Companion:
    """A slice that another needs: its bytes, and the words it stands on itself."""

    data: memoryview
    base: Words | None = None


def decode_slice(
    data: memoryview,
    dtype: DType,
    count: int,
    base: Words | None = None,
    companion: Companion | None = None,
    *,
    own_base: bool = False,
    out: Words | None = None,
) -> Words:
    """Decode one slice of `count` words.  A base that is its `own_base` may be changed in place;
    what comes back may be `out`, `count` words that are not read.

    `base` is the same slice of the tensor the frame stands on, `companion` the same slice of the
    frame that it names; each None where the frame names none.

    Raises:
        TruncatedError, CorruptionError: `data` is no slice of `count` words of `dtype`.
        UnsupportedVersionError is never raised here: a method that an old reader does not know
        raises the repository's format flags, which are checked when it is opened.
    """
    if not len(data):
        raise TruncatedError("a frame has an empty slice")
    method, payload = data[0], data[1:]
    if base is not None and (base.size, base.dtype) != (count, word_type(dtype.word)):
        raise CorruptionError("a frame stands on a base of another size or type")
    if method == LOSSLESS:
        return lossless.decode(payload, count, base, dtype, out)
    if method == PATCH:
        return patch.decode(payload, count, base, dtype, out)
    if dtype.name not in WEIGHT_DTYPES:
        raise CorruptionError(f"a frame codes {dtype.name} words with loss")
    if method == EXCP_RESIDUAL and base is not None:
        return excp.decode_residual(payload, base, dtype.name)
    if method == EXCP_MOMENT:
        return excp.decode_moment(payload, count, None, dtype.name)
    if method == NEAR_WEIGHT:
        return near_weight.decode_weight(payload, base, count, dtype.name, in_place=own_base)
    if method == NEAR_SECOND:
        return near_moments.decode_second(payload, count, dtype.name, out)
    if method == NEAR_FIRST:
        return near_moments.decode_first(payload, None, count, dtype.name)
    if method == NEAR_LOW_RANK:
        return near_lowrank.decode_low_rank(payload, None, count, dtype.name, out)
    if companion is not None:
        if method == EXCP_SHARED_MASK_MOMENT and companion.data[:1] == bytes([EXCP_MOMENT]):
            return excp.decode_moment(payload, count, companion.data[1:], dtype.name)
        if method == NEAR_SCALED_FIRST:
            second = decode_slice(companion.data, dtype, count, companion.base)
            return near_moments.decode_first(payload, second, count, dtype.name)
        if method == NEAR_SCALED_LOW_RANK:
            second = decode_slice(companion.data, dtype, count, companion.base)
            return near_lowrank.decode_low_rank(payload, second, count, dtype.name, out)
        if method == ROUNDED and not len(payload):
            master = decode_slice(companion.data, DTYPES["F32"], count, companion.base)
            return from_float32(to_float32(master, "F32"), dtype.name)
    raise CorruptionError(f"a frame has a slice of unknown method {method}, or lacks its base")
