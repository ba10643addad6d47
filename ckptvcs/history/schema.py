"""Schema: the tensors of a checkpoint.  Skeleton: the template of a file, without its tensors.

A schema contains nothing that changes from step to step, so all commits of a run share one.  A
skeleton contains the rest of a file (headers, pickles, small tensors).  With the skeleton of
another step as base, it compresses to a few dozen bytes.  Layout: docs/format.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from ckptvcs.codec.dtypes import DTYPES, DType
from ckptvcs.errors import CorruptionError
from ckptvcs.history.canonical_json import Json, dump
from ckptvcs.history.fields import NATURAL, Fields, FieldType, many

LITTLE, BIG, UNKNOWN = "little", "big", "unknown"
_LENGTH = struct.Struct("<I")
_MAX_DIMS = 64
_MAX_NUMBER = 1 << 44  # limit for a number of elements, an offset or a stride


@dataclass(frozen=True)
class View:
    """A tensor of the saved program: a window on a stored tensor; numbers count elements."""

    name: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def fits(self, elements: int) -> bool:
        """Return whether the view lies inside a tensor with this number of elements."""
        if len(self.shape) != len(self.stride) or len(self.shape) > _MAX_DIMS:
            return False
        if max(self.offset, *self.shape, *self.stride, 0) >= _MAX_NUMBER:
            return False
        if math.prod(self.shape) >= _MAX_NUMBER:
            return False
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return 0 in self.shape or self.offset + last < elements


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, in row-major order.

    Attributes:
        name: The full name.
        dtype: The element type, such as `BF16`.
        shape: The shape.
        part: `model`, `optimizer` or `rest`.
        role: What the tensor is, such as a weight or an optimizer moment.
        inline: Whether the tensor is so small that the file template contains its bytes.
        pair: The position in the schema of the weight that a moment belongs to.
        views: The views of the tensor, if there are others than the tensor itself.
        evidence: How the role was detected.
        order: The byte order: `little`, `big` or `unknown`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: str
    role: str
    inline: bool = False
    pair: int | None = None
    views: tuple[View, ...] = ()
    evidence: str = ""
    order: str = LITTLE

    @property
    def type(self) -> DType:
        """Element type."""
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def words(self) -> int:
        """Number of words (a complex element is two)."""
        return self.elements * self.type.size // self.type.word

    @property
    def size_bytes(self) -> int:
        """Bytes of the raw tensor."""
        return self.elements * self.type.size


@dataclass(frozen=True)
class Schema:
    """All tensors of a commit, in the order of its files."""

    tensors: tuple[TensorInfo, ...]

    def stored(self, part: str) -> list[int]:
        """Return the positions of a part's tensors in frames, in the order of its hash table."""
        return [
            number
            for number, info in enumerate(self.tensors)
            if info.part == part and not info.inline
        ]


_NATURALS = many(NATURAL)


def _load_shape(value: Json) -> tuple[int, ...]:
    shape: tuple[int, ...] = _NATURALS.load(value)
    if len(shape) > _MAX_DIMS or math.prod(shape) >= _MAX_NUMBER:
        raise CorruptionError("a schema contains a tensor with an invalid shape")
    return shape


_SHAPE = FieldType(_load_shape)
_VIEW = Fields(View, shape=_SHAPE)
_TENSOR = Fields(TensorInfo, shape=_SHAPE, views=many(_VIEW.type))
_SCHEMA = Fields(Schema, tensors=many(_TENSOR.type))
dump_schema = _SCHEMA.dump


def _check_tensor(info: TensorInfo) -> None:
    if info.dtype not in DTYPES or info.part not in ("model", "optimizer", "rest"):
        raise CorruptionError(f"tensor {info.name!r} has an unknown dtype or part")
    if info.order not in (LITTLE, BIG, UNKNOWN):
        raise CorruptionError(f"tensor {info.name!r} has an unknown byte order")
    for view in info.views:
        dtype = DTYPES.get(view.dtype)
        if dtype is None or not view.fits(info.size_bytes // dtype.size):
            raise CorruptionError(f"tensor {info.name!r} has a view outside of it")


def load_schema(data: bytes) -> Schema:
    """Read a schema.  Raises CorruptionError."""
    schema = _SCHEMA.load(data, "a schema")
    for info in schema.tensors:
        _check_tensor(info)
        if info.pair is not None and info.pair >= len(schema.tensors):
            raise CorruptionError("a schema pairs a tensor with a missing one")
    return schema


class Op(IntEnum):
    """The kind of a segment of a file."""

    LITERAL = 0  # bytes of the skeleton; argument: their number
    TENSOR = 1  # bytes of a tensor; argument: position in the schema
    CRC32 = 2  # checksum of a tensor, 4 bytes, little-endian; argument: position in the schema
    INLINE = 3  # tensor in the skeleton; argument: position in the schema


Segment = tuple[Op, int]


def dump_skeleton(segments: list[Segment], literals: bytes) -> bytes:
    """Return the content of a skeleton."""
    head = dump({"segments": [number for segment in segments for number in segment]})
    return _LENGTH.pack(len(head)) + head + literals


@dataclass(frozen=True)
class Skeleton:
    """The segments of a file, and the bytes of its literals and inline tensors."""

    segments: tuple[Segment, ...]
    literals: memoryview

    def walk(self, schema: Schema) -> Iterator[tuple[Op, int, memoryview]]:
        """Yield each segment with its bytes (empty for tensors and checksums).

        Raises:
            CorruptionError: a tensor is not in the schema, or there are too few or too many bytes.
        """
        at = 0
        for op, argument in self.segments:
            if op != Op.LITERAL and argument >= len(schema.tensors):
                raise CorruptionError("a skeleton refers to a tensor that is not in the schema")
            length = 0
            if op == Op.LITERAL:
                length = argument
            elif op == Op.INLINE:
                length = schema.tensors[argument].size_bytes
            if at + length > len(self.literals):
                raise CorruptionError("a skeleton has too few literal bytes")
            yield op, argument, self.literals[at : at + length]
            at += length
        if at != len(self.literals):
            raise CorruptionError("a skeleton has too many literal bytes")


def _segments_of(numbers: tuple[int, ...]) -> tuple[Segment, ...]:
    ops, arguments = numbers[::2], numbers[1::2]
    if len(ops) != len(arguments) or any(op > Op.INLINE for op in ops):
        raise CorruptionError("a skeleton contains an invalid segment")
    return tuple((Op(op), argument) for op, argument in zip(ops, arguments, strict=True))


_SEGMENTS = Fields(_segments_of, segments=_NATURALS)


def load_skeleton(data: bytes) -> Skeleton:
    """Read a skeleton.  Raises CorruptionError."""
    if len(data) < _LENGTH.size:
        raise CorruptionError("a skeleton is too short")
    (length,) = _LENGTH.unpack_from(data)
    body = memoryview(data)[_LENGTH.size :]
    if length > len(body):
        raise CorruptionError("a skeleton is too short")
    segments = _SEGMENTS.load(bytes(body[:length]), "a skeleton")
    return Skeleton(segments, body[length:])
