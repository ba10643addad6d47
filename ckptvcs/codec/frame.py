"""Decode the slices of a frame. A frame is one encoded tensor.

    frame = slice slice ... slice       SLICE_WORDS words each, the last one may be shorter
    slice = method (1 byte)  payload

A slice depends only on the same slice of its base. Slices are the unit of hashing, of threads and
of random access, and limit the memory of every operation. Layout: docs/format.md, "Frame".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def slices_of(words: int) -> range:
    """Return the numbers of the slices of a tensor of `words` words."""
    return range(-(-words // SLICE_WORDS))


def slice_size(words: int, number: int) -> int:
    """Return the number of words in slice `number` of a tensor of `words` words."""
    return min(SLICE_WORDS, words - number * SLICE_WORDS)


def put_slice(method: int, payload: bytes) -> bytes:
    """Return the stored form of a slice."""
    return bytes([method]) + payload


@dataclass(frozen=True)
class Companion:
    """The slice of a companion: its bytes, and the words of its base."""

    data: memoryview
    base: Words | None = None


@dataclass(frozen=True)
class _Slice:
    """The payload of a slice of `count` words, and the arguments of `decode_slice`."""

    payload: memoryview
    dtype: DType
    count: int
    base: Words | None
    companion: Companion | None
    own_base: bool
    out: Words | None

    def companion_words(self, dtype: DType | None = None) -> Words | None:
        """Decode the companion, as words of this slice's type unless `dtype` is given."""
        if self.companion is None:
            return None
        data, base = self.companion.data, self.companion.base
        return decode_slice(data, dtype or self.dtype, self.count, base)


def _excp_residual(s: _Slice) -> Words | None:
    return None if s.base is None else excp.decode_residual(s.payload, s.base, s.dtype.name)


def _excp_moment(s: _Slice) -> Words | None:
    return excp.decode_moment(s.payload, s.count, None, s.dtype.name)


def _excp_shared_mask(s: _Slice) -> Words | None:
    if s.companion is None or s.companion.data[:1] != bytes([EXCP_MOMENT]):
        return None
    return excp.decode_moment(s.payload, s.count, s.companion.data[1:], s.dtype.name)


def _near_weight(s: _Slice) -> Words | None:
    name = s.dtype.name
    return near_weight.decode_weight(s.payload, s.base, s.count, name, in_place=s.own_base)


def _near_second(s: _Slice) -> Words | None:
    return near_moments.decode_second(s.payload, s.count, s.dtype.name, s.out)


def _near_first(s: _Slice, second: Words | None = None) -> Words | None:
    return near_moments.decode_first(s.payload, second, s.count, s.dtype.name)


def _near_low_rank(s: _Slice, second: Words | None = None) -> Words | None:
    return near_lowrank.decode_low_rank(s.payload, second, s.count, s.dtype.name, s.out)


def _scaled(decode: Callable[[_Slice, Words], Words | None], s: _Slice) -> Words | None:
    """Decode a first moment that is divided by the root of the second one, its companion."""
    second = s.companion_words()
    return None if second is None else decode(s, second)


def _rounded(s: _Slice) -> Words | None:
    master = None if len(s.payload) else s.companion_words(DTYPES["F32"])
    return None if master is None else from_float32(to_float32(master, "F32"), s.dtype.name)


_LOSSY: dict[int, Callable[[_Slice], Words | None]] = {
    EXCP_RESIDUAL: _excp_residual,
    EXCP_MOMENT: _excp_moment,
    EXCP_SHARED_MASK_MOMENT: _excp_shared_mask,
    NEAR_WEIGHT: _near_weight,
    NEAR_SECOND: _near_second,
    NEAR_FIRST: _near_first,
    NEAR_SCALED_FIRST: partial(_scaled, _near_first),
    ROUNDED: _rounded,
    NEAR_SCALED_LOW_RANK: partial(_scaled, _near_low_rank),
    NEAR_LOW_RANK: _near_low_rank,
}
"""Decoders of the lossy methods; each returns None if the slice lacks its base or companion."""


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
    """Decode one slice of `count` words of `dtype`.

    `base` holds the words of the same slice of the base, `companion` the same slice of the
    companion; each is None if the frame names none. If `own_base` is set, a decoder may overwrite
    `base`. A decoder may write its result to `out` (`count` words) and return it.

    An unknown method is corruption, because newer methods need a format flag, and the flags are
    checked when the repository is opened.

    Raises:
        TruncatedError, CorruptionError: `data` is not a slice of `count` words of `dtype`.
    """
    if not len(data):
        raise TruncatedError("corrupt frame: empty slice")
    method, payload = data[0], data[1:]
    if base is not None and (base.size, base.dtype) != (count, word_type(dtype.word)):
        raise CorruptionError("corrupt frame: its base has another size or type")
    if method == LOSSLESS:
        return lossless.decode(payload, count, base, dtype, out)
    if method == PATCH:
        return patch.decode(payload, count, base, dtype, out)
    if dtype.name not in WEIGHT_DTYPES:
        raise CorruptionError(f"corrupt frame: {dtype.name} words have a lossy encoding")
    decode = _LOSSY.get(method)
    part = _Slice(payload, dtype, count, base, companion, own_base, out)
    if decode is None or (words := decode(part)) is None:
        raise CorruptionError(f"corrupt frame: unknown method {method}, or its base is missing")
    return words
