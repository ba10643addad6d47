"""Byte streams <-> stored sections: constant, raw or zstd, whichever is smallest.

zstd is used as a fast Huffman coder: matches must be long and are hardly looked for, since the
short ones that chance throws up in numeric planes cost more than they save (measured: 3 % over the
entropy, against 13 % at level 1 and 25 % at level 3, on exponents).  Streams that do
not compress are found by the entropy of a sample and copied, which costs nothing on the way back.
Layout: docs/format.md, "Section".
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from ckptvcs.codec import kernels
from ckptvcs.errors import CorruptionError, TruncatedError, refuse_memory

Bytes = NDArray[np.uint8]
Value = TypeVar("Value", bound=np.generic)

RAW, ZSTD, CONSTANT = 0, 1, 2
_SAMPLE = 1 << 14
_HUFFMAN = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, write_content_size=False
)
_SHORT_HUFFMAN = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, write_content_size=False, format=zstandard.FORMAT_ZSTD1_MAGICLESS
)
_TEXT = zstandard.ZstdCompressionParameters.from_level(3, write_content_size=False)
_COMPRESSIBLE_BITS = 7.93  # Huffman gains less than its tables cost above this many bits a byte


def entropy_bits(values: Bytes) -> float:
    """Order-0 entropy of `values` in bits a byte."""
    counts = np.bincount(values, minlength=256)
    counts = counts[counts > 0]
    share = counts / max(1, values.size)
    return float(-(share * np.log2(share)).sum())


def sample(values: NDArray[Value], size: int = _SAMPLE) -> NDArray[Value]:
    """At most about `size` of `values`: 16 runs at even distances, so that runs stay together."""
    if values.size <= size:
        return values
    return np.concatenate([values[run] for run in _runs(values.size, size)])


def sample_positions(count: int, size: int = _SAMPLE) -> NDArray[np.int64]:
    """Where the entries of a `sample` of `count` values stand."""
    if count <= size:
        return np.arange(count)
    return np.concatenate([np.arange(run.start, run.stop) for run in _runs(count, size)])


def _runs(count: int, size: int) -> list[slice]:
    length = size // 16
    starts = [(count - length) * n // 15 for n in range(16)]
    return [slice(start, start + length) for start in starts]


def put_section(values: Bytes, *, text: bool = False, short: bool = False) -> bytes:
    """Store one byte stream of at most 2^32 - 1 bytes; `text` says that repeats are likely.

    A `short` section, of less than 2^24 bytes, has a smaller head, and zstd's magic number is left
    out: near slices are often so small that these count.
    """
    if values.size and values[0] == values[-1] and (values == values[0]).all():
        return _head(CONSTANT, 1, short) + bytes(values[:1])
    if text or entropy_bits(sample(values)) < _COMPRESSIBLE_BITS:
        parameters = _TEXT if text else _SHORT_HUFFMAN if short else _HUFFMAN
        try:
            packed = zstandard.ZstdCompressor(compression_params=parameters).compress(values.data)
        except zstandard.ZstdError as error:
            refuse_memory(error)
            raise
        if len(packed) < values.size:
            return _head(ZSTD, len(packed), short) + packed
    return _head(RAW, values.size, short) + values.tobytes()


def _head(tag: int, size: int, short: bool) -> bytes:
    return bytes([tag]) + size.to_bytes(3 if short else 4, "little")


def get_section(data: memoryview, at: int, size: int, *, short: bool = False) -> tuple[Bytes, int]:
    """Read the section at `at`, which must decode to `size` bytes; also where the next one begins.

    Raises:
        TruncatedError: the section runs past the end of `data`.
        CorruptionError: it is not a section of `size` bytes.
    """
    begin = at + (4 if short else 5)
    if begin > len(data):
        raise TruncatedError("corrupt frame: truncated section header")
    tag, stored = data[at], int.from_bytes(data[at + 1 : begin], "little")
    end = begin + stored
    if end > len(data):
        raise TruncatedError("corrupt frame: truncated section")
    if tag == RAW and stored == size:
        return np.frombuffer(data[begin:end], np.uint8), end
    if tag == CONSTANT and stored == 1 and size:
        return np.full(size, data[begin], np.uint8), end
    if tag == ZSTD:
        return inflate(data[begin:end], size, short=short), end
    raise CorruptionError("corrupt frame: section has the wrong type or size")


def put_bits(values: NDArray[np.integer], bits: int) -> bytes:
    """Store the lowest `bits` bits of each value, a plane of single bits after another."""
    return b"".join(np.packbits((values >> bit) & 1).tobytes() for bit in range(bits))


def get_bits(data: memoryview, at: int, count: int, bits: int) -> tuple[NDArray[np.int32], int]:
    """Read what `put_bits` stored for `count` values; also where the next section begins.

    Raises:
        TruncatedError: they run past the end of `data`.
    """
    planes, at = get_bytes(data, at, bits * ((count + 7) // 8))
    return kernels.active().join_bits(planes, np.zeros(0, np.uint8), count, bits), at


def get_bytes(data: memoryview, at: int, size: int) -> tuple[Bytes, int]:
    """Bytes as they stand, and where the next ones begin.  Raises TruncatedError."""
    if at + size > len(data):
        raise TruncatedError("corrupt frame: truncated codes")
    return np.frombuffer(data[at : at + size], np.uint8), at + size


def inflate(packed: memoryview, size: int, *, short: bool = False) -> Bytes:
    """Undo zstd, never producing more than the `size` bytes that are expected."""
    form = zstandard.FORMAT_ZSTD1_MAGICLESS if short else zstandard.FORMAT_ZSTD1
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27, format=form).stream_reader(
            packed
        )
        values = np.empty(size + 1, np.uint8)
        got = 0
        while count := reader.readinto(values.data[got:]):
            got += count
            if got > size:
                break
    except zstandard.ZstdError as error:
        refuse_memory(error)
        raise CorruptionError(f"a compressed section is damaged ({error})") from error
    if got != size:
        raise CorruptionError("corrupt section: wrong decompressed size")
    return values[:size]
