"""Write plain values and tensors as a torch.save zip file, without torch.

The pickle (protocol 2) holds only types that `torch.load(weights_only=True)` accepts: None, bool,
int, float, str, bytes, list, tuple, dict, set, Counter, torch.Size and tensors.  The records of the
zip file have the order, alignment and names of torch.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptvcs.checkpoint.layout import Source
from ckptvcs.checkpoint.pickle_reader import (
    MAX_PICKLE_BYTES,
    METADATA,
    InertDict,
    is_key,
    is_member,
)
from ckptvcs.checkpoint.torch_zip import CENTRAL, END, END64, LOCAL, LOCATOR64, UNFIT
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.errors import InvalidInputError
from ckptvcs.history.schema import View

_ALIGNMENT = 64
_SHOWN = 100  # characters of a long path
_MAX_NESTING = 1000  # torch.save itself gives up at about as many


@dataclass(frozen=True)
class Leaf:
    """A tensor to write: a view of storage number `storage`."""

    storage: int
    storage_bytes: int
    view: View


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a row-major tensor."""
    strides, stride = [], 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= max(1, length)
    return tuple(reversed(strides))


def _called(value: Any) -> tuple[str, str, object] | None:
    """Return module, name and argument of the call that rebuilds a value; None for other values."""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name == "torch.Size":
        return "torch", "Size", tuple(value)
    if type(value) is set and all(map(is_member, value)):
        return "__builtin__", "set", sorted(value, key=repr)
    if type(value) is Counter and all(type(count) in (int, float) for count in value.values()):
        return "collections", "Counter", dict(value)
    return None


_Steps = Iterator[bytes | tuple[object, str]]
"""The encoding of a container: opcodes, and values with their paths."""


class _Pickle:
    """Write one pickle, protocol 2.  `leaf` returns the leaf of a tensor of the caller."""

    def __init__(self, leaf: Callable[[object, str], Leaf | None]) -> None:
        self._leaf = leaf
        self._out = bytearray(b"\x80\x02")

    def dump(self, value: object) -> bytes:
        # An explicit stack: Python's own ends at about three hundred levels.
        stack: list[_Steps] = [iter([(value, "")])]
        while stack:
            item = next(stack[-1], None)
            if item is None:
                stack.pop()
            elif isinstance(item, bytes):
                self._out += item
            else:
                below = self._value(*item)
                if below is not None:
                    if len(stack) > _MAX_NESTING:
                        where = item[1][:_SHOWN]
                        raise InvalidInputError(f"the state is nested too deeply at {where} ...")
                    stack.append(below)
        self._check_size(0, "")
        return bytes(self._out) + b"."

    def _check_size(self, more: int, path: str) -> None:
        if len(self._out) + more > MAX_PICKLE_BYTES:  # a shared value is written each time
            raise InvalidInputError(
                "the state holds more than a gigabyte besides its tensors"
                + (f", up to {path}" if path else ""),
                hint="convert long lists and bytes to tensors: torch.tensor(list)",
            )

    def _global(self, module: str, name: str) -> None:
        self._out += f"c{module}\n{name}\n".encode()

    def _integer(self, value: int, path: str = "") -> None:
        if -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + value.to_bytes(4, "little", signed=True)
        else:
            data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            if len(data) > 255:
                raise InvalidInputError(f"the state holds an integer that is too large at {path}")
            self._out += b"\x8a" + bytes([len(data)]) + data

    def _text(self, value: str, path: str = "") -> None:
        data = value.encode("utf-8", "surrogatepass")
        self._check_size(len(data), path)
        self._out += b"X" + struct.pack("<I", len(data)) + data

    def _tuple(self, values: tuple[int, ...]) -> None:
        self._out += b"("
        for value in values:
            self._integer(value)
        self._out += b"t"

    def _value(self, value: object, path: str) -> _Steps | None:
        """Write a value; return the encoding of its items if it is a container."""
        self._check_size(0, path)
        leaf = self._leaf(value, path)
        if leaf is not None:
            self._tensor(leaf)
        elif value is None:
            self._out += b"N"
        elif type(value) is bool:  # a subclass would be restored as another type
            self._out += b"\x88" if value else b"\x89"
        elif type(value) is int:
            self._integer(value, path)
        elif type(value) is float:
            self._out += b"G" + struct.pack(">d", value)
        elif type(value) is str:
            self._text(value, path)
        elif type(value) is bytes:
            self._global("_codecs", "encode")
            self._out += b"("
            self._text(value.decode("latin1"), path)
            self._text("latin1")
            self._out += b"tR"
        else:
            return self._container(value, path)
        return None

    def _container(self, value: object, path: str) -> _Steps:
        if type(value) in (list, tuple):
            assert isinstance(value, list | tuple)
            yield b"](" if type(value) is list else b"("
            yield from self._row(value, path)
            yield b"e" if type(value) is list else b"t"
        elif type(value) in (dict, InertDict):
            yield b"}"
            yield from self._items(value, path)
        elif type(value) is OrderedDict:
            self._global("collections", "OrderedDict")
            yield b")R"
            yield from self._items(value, path)
            metadata = vars(value).get(METADATA)  # versions of the modules of a state dict
            if metadata is not None:
                yield b"}"
                yield from self._items({METADATA: metadata}, path)
                yield b"b"
        elif (call := _called(value)) is not None:
            self._global(*call[:2])
            yield call[2], path
            yield b"\x85R"
        else:
            kind = type(value)
            raise InvalidInputError(
                f"the state holds a {kind.__module__}.{kind.__qualname__} at {path or 'its top'}",
                hint="convert it, as by float(), to None, bool, int, float, str, bytes, list, "
                "tuple, dict, set, a tensor or a numpy array",
            )

    def _row(self, values: Sequence[object], path: str) -> _Steps:
        dot = "." if path else ""
        for number, item in enumerate(values):
            if type(item) is int:  # most long lists hold integers
                self._integer(item, path)
            else:
                yield item, f"{path}{dot}{number}"

    def _items(self, value: object, path: str) -> _Steps:
        assert isinstance(value, dict)
        yield b"("
        for key, item in value.items():
            if not is_key(key):
                raise InvalidInputError(
                    f"the state has a key that is not text or a number at {path or 'its top'}"
                )
            yield key, path
            yield item, f"{path}.{key}" if path else str(key)
        yield b"u"

    def _tensor(self, leaf: Leaf) -> None:
        view, dtype = leaf.view, DTYPES[leaf.view.dtype]
        native = dtype.storage
        self._global("torch._utils", "_rebuild_tensor_v2" if native else "_rebuild_tensor_v3")
        self._out += b"(("
        self._text("storage")
        if native:
            self._global("torch", native)
        else:
            self._global("torch.storage", "UntypedStorage")
        self._text(str(leaf.storage))
        self._text("cpu")
        self._integer(leaf.storage_bytes // (dtype.size if native else 1))
        self._out += b"tQ"
        self._integer(view.offset)
        self._tuple(view.shape)
        self._tuple(view.stride)
        self._out += b"\x89"
        self._global("collections", "OrderedDict")
        self._out += b")R"
        if not native:
            self._global("torch", dtype.torch)
        self._out += b"tR"


def dump_pickle(value: object, leaf: Callable[[object, str], Leaf | None]) -> bytes:
    """Return the pickle of a state.

    `leaf(value, path)` returns the leaf of a tensor, and None for any other value.

    Raises:
        InvalidInputError: The state holds a value of another type; the message has its path.
    """
    return _Pickle(leaf).dump(value)


@dataclass(frozen=True)
class Payload:
    """The content of a record, produced in blocks on demand.

    If `summed` is false, its checksum is written as 0.
    """

    size: int
    blocks: Callable[[], Iterator[bytes | memoryview | DeviceBytes]]
    summed: bool = True


def _records(
    pickled: bytes, storages: list[Payload], extra: Mapping[str, bytes]
) -> list[tuple[str, Payload]]:
    """Return the records of a torch.save file, in torch's order."""

    def small(data: bytes) -> Payload:
        return Payload(len(data), lambda: iter([data]))

    return [
        ("data.pkl", small(pickled)),
        (".format_version", small(b"1")),
        (".storage_alignment", small(str(_ALIGNMENT).encode())),
        ("byteorder", small(b"little")),
        *((f"data/{number}", storage) for number, storage in enumerate(storages)),
        *((name, small(data)) for name, data in extra.items()),
        ("version", small(b"3\n")),
        (".data/serialization_id", small(b"0" * 40)),
    ]


@dataclass(frozen=True)
class _Header:
    """The name, size and offset of a record, which its two headers in a zip file need."""

    name: bytes
    size: int
    at: int

    @property
    def is_large(self) -> bool:
        return self.size >= UNFIT

    @property
    def is_zip64(self) -> bool:
        """Return whether its size or offset needs 64 bits."""
        return self.is_large or self.at >= UNFIT

    @property
    def _flags(self) -> int:
        return 0x0808 if self.size else 0x0800

    def _extra(self, second_size: int) -> bytes:
        """Return the zip64 field; the local header has 0 in place of the second size."""
        body = struct.pack("<QQ", self.size, second_size) if self.is_large else b""
        body += struct.pack("<Q", self.at) if self.at >= UNFIT else b""
        return struct.pack("<HH", 1, len(body)) + body if body else b""

    def local(self) -> bytes:
        """Return the header before the content, padded so that the content is aligned."""
        extra = self._extra(0)
        padding = -(self.at + 30 + len(self.name) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        sizes = (UNFIT, UNFIT) if self.is_large else (0, 0)
        lengths = len(self.name), len(extra)
        fixed = (b"PK\x03\x04", 0, self._flags, 0, 0, 0, 0, *sizes, *lengths)
        return LOCAL.pack(*fixed) + self.name + extra

    def descriptor(self, crc: int) -> bytes:
        """Return the checksum and the sizes behind the content."""
        layout = "<4sIQQ" if self.is_zip64 else "<4sIII"
        return struct.pack(layout, b"PK\x07\x08", crc, self.size, self.size) if self.size else b""

    def entry(self, crc: int) -> bytes:
        """Return the entry in the central directory."""
        extra = self._extra(self.size)
        size, at = min(self.size, UNFIT), min(self.at, UNFIT)
        sums = (b"PK\x01\x02", 0, 0, self._flags, 0, 0, 0, crc, size, size)
        fixed = (*sums, len(self.name), len(extra), 0, 0, 0, 0, at)
        return CENTRAL.pack(*fixed) + self.name + extra


def write_zip(
    write: Callable[[Any], object],
    stem: str,
    pickled: bytes,
    storages: list[Payload],
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write a zip file as torch does: aligned, uncompressed records, each before its checksum.

    Args:
        write: writes bytes
        stem: the folder of all records
        pickled: the pickle of the state
        storages: the storages of its tensors
        extra: more small records by name
    """
    at = 0
    directory = bytearray()
    records = _records(pickled, storages, extra or {})
    for name, payload in records:
        header = _Header(f"{stem}/{name}".encode(), payload.size, at)
        local = header.local()
        write(local)
        crc = 0
        for block in payload.blocks():
            crc = zlib.crc32(block[:], crc) if payload.summed else 0
            write(block)
        descriptor = header.descriptor(crc)
        write(descriptor)
        directory += header.entry(crc)
        at += len(local) + payload.size + len(descriptor)
    write(bytes(directory))
    write(_directory_end(len(records), len(directory), at))


def _directory_end(count: int, size: int, at: int) -> bytes:
    """Return what follows the central directory: its zip64 record, locator, and old record."""
    short = min(count, 0xFFFF)
    old = (b"PK\x05\x06", 0, 0, short, short, min(size, UNFIT), min(at, UNFIT), 0)
    return (
        END64.pack(b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, size, at)
        + LOCATOR64.pack(b"PK\x06\x07", 0, at + size, 1)
        + END.pack(*old)
    )


class DeviceBytes:
    """The bytes of a tensor (flat, uint8) on a device; a slice is copied to the host."""

    def __init__(self, flat: Any) -> None:
        self.flat = flat

    def __len__(self) -> int:
        return int(self.flat.numel())

    def __getitem__(self, part: slice) -> memoryview:
        return memoryview(self.flat[part].cpu().numpy())


def changed_state() -> InvalidInputError:
    """Return the error for a state that changed during its commit."""
    return InvalidInputError(
        "the state changed while it was being read", hint="commit a copy, or while nothing trains"
    )


class MemorySource(Source):
    """A file in memory, as a sequence of blocks that are not copied."""

    def __init__(self) -> None:
        self._blocks: list[memoryview | DeviceBytes] = []
        self._starts: list[int] = []
        self._copies: list[tuple[bytes, memoryview]] = []
        self._versions: list[tuple[Any, int]] = []
        self.size = 0

    def watch(self, copy: bytes, original: memoryview) -> None:
        """Note that a block is a copy of memory that others may change."""
        self._copies.append((copy, original))

    def watch_version(self, tensor: Any, version: int) -> None:
        """Note how often a tensor had been changed in place so far."""
        self._versions.append((tensor, version))

    def check_unchanged(self) -> None:
        same = all(copy == original for copy, original in self._copies)
        if not same or any(tensor._version != then for tensor, then in self._versions):
            raise changed_state()

    @property
    def blocks(self) -> Sequence[memoryview | DeviceBytes]:
        """The blocks, in order."""
        return self._blocks

    def append(self, block: bytes | memoryview | DeviceBytes) -> None:
        """Append a block."""
        view = block if isinstance(block, DeviceBytes) else memoryview(block).cast("B")
        if len(view):
            self._starts.append(self.size)
            self._blocks.append(view)
            self.size += len(view)

    def on_device(self, offset: int, length: int) -> Any:
        number = bisect_right(self._starts, offset) - 1
        block = self._blocks[number] if number >= 0 else None
        start = offset - self._starts[number]
        if isinstance(block, DeviceBytes) and start + length <= len(block):
            return block.flat[start : start + length]
        return None

    def view(self, offset: int, length: int) -> bytes | memoryview:
        number = bisect_right(self._starts, offset) - 1
        block = self._blocks[number] if number >= 0 else memoryview(b"")
        start = offset - self._starts[number]
        inside = start + length <= len(block)
        return block[start : start + length] if inside else self.read(offset, length)

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        number = bisect_right(self._starts, offset) - 1
        while length:
            if number >= len(self._blocks):
                raise InvalidInputError("a state is shorter than its own layout")
            start = offset - self._starts[number]
            part = self._blocks[number][start : start + length]
            parts.append(part)
            offset += len(part)
            length -= len(part)
            number += 1
        return parts[0].tobytes() if len(parts) == 1 else b"".join(parts)
