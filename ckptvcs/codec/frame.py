"""The slices of a frame: one encoded tensor is cut into slices that are coded and read alone.

    frame = slice slice ... slice       SLICE_WORDS words each, the last one shorter
    slice = method (1 byte)  payload

Slices bound the memory of every operation, whatever the size of the tensor, and are the unit of
hashing, of threads and of random access.  Frames of one tensor along a chain are cut alike, so a
slice decodes from the same slice of its base.  Layout: docs/format.md, "Frame".
"""

from __future__ import annotations

from ckptvcs.codec import excp, lossless
from ckptvcs.codec.words import Words
from ckptvcs.dtypes import WEIGHT_DTYPES, DType
from ckptvcs.errors import CorruptionError, TruncatedError

SLICE_WORDS = 1 << 20

LOSSLESS, RESIDUAL, MOMENT, SHARED_MASK_MOMENT = 0, 1, 2, 3


def slice_counts(words: int) -> list[int]:
    """The number of words in each slice of a tensor of `words` words."""
    full, rest = divmod(words, SLICE_WORDS)
    return [SLICE_WORDS] * full + ([rest] if rest else [])


def put_slice(method: int, payload: bytes) -> bytes:
    """A slice as it is stored."""
    return bytes([method]) + payload


def decode_slice(
    data: memoryview,
    dtype: DType,
    count: int,
    base: Words | None = None,
    companion: memoryview | None = None,
) -> Words:
    """Decode one slice of `count` words.

    `base` is the same slice of the tensor the frame stands on, `companion` the same slice of the
    frame that holds a shared mask; each None where the frame names none.

    Raises:
        TruncatedError, CorruptionError: `data` is no slice of `count` words of `dtype`.
        UnsupportedVersionError is never raised here: a method that an old reader does not know
        raises the repository's format flags, which are checked when it is opened.
    """
    if not len(data):
        raise TruncatedError("a frame has an empty slice")
    method, payload = data[0], data[1:]
    if base is not None and base.size != count:
        raise CorruptionError("a frame stands on a base of another size")
    if method == LOSSLESS:
        return lossless.decode(payload, count, base, dtype)
    if dtype.name not in WEIGHT_DTYPES:
        raise CorruptionError(f"a frame codes {dtype.name} words with loss")
    if method == RESIDUAL and base is not None:
        return excp.decode_residual(payload, base, dtype.name)
    if method == MOMENT:
        return excp.decode_moment(payload, count, None, dtype.name)
    if method == SHARED_MASK_MOMENT and companion is not None and companion[:1] == bytes([MOMENT]):
        return excp.decode_moment(payload, count, companion[1:], dtype.name)
    raise CorruptionError(f"a frame has a slice of unknown method {method}, or lacks its base")
