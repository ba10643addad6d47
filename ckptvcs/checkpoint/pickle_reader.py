"""Pickles -> inert trees.  The reader never imports, calls or looks up a name in a pickle.

A pickle is a program.  This reader runs its stack machine, but replaces each global by a record of
its name and each call by a record of its arguments.  A payload such as `os.system` becomes data.
The reader recognizes torch's functions for tensors by name and makes a `TensorRef` of each call.

The reader uses the pure Python unpickler of the standard library on purpose.  Its memo can be any
mapping, so a memo index of 2^32 costs nothing.  The C unpickler would allocate that many entries.

Reading takes time in proportion to the bytes of a pickle, but not memory: one byte can make an
object of a hundred bytes, and a few bytes a copy of a list of a million.  The reader accounts for
the memory of such objects, and refuses a pickle that needs more than real programs write.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_PICKLE_BYTES = 1 << 30
"""Larger pickles are not parsed; their file is still stored exactly."""

# Bytes of memory for objects: a base, and a number for each byte read.  A list of empty dicts is
# among the most expensive objects of real programs and takes 36 for each byte.
_ROOM = 1 << 26
ROOM_PER_BYTE = 40
_MOST_ROOM = 1 << 32
# Sizes of objects in Python 3.11, in bytes, rounded up.
_LIST, _DICT, _ENTRY, _MARK, _TUPLE, _SLOT, _RECORD, _NAME = 64, 72, 100, 140, 56, 8, 120, 300

_MAX_DIMENSIONS = 64
_MAX_STEP = 200  # characters of a name that a path shows
_MAX_PATH = 1000
_MAX_STEPS = 200  # of a path, counted from its end


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle refers to."""

    module: str
    name: str


class Inert:
    """An object that a pickle would make: the callable and its arguments."""

    __slots__ = ("args", "items", "maker", "state")

    def __init__(self, maker: object, args: tuple[Any, ...]) -> None:
        self.maker = maker
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []

    def append(self, item: object) -> None:
        """Record an item as list.append does; pickles append to objects that they make."""
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        """Record items as list.extend does."""
        self.items.extend(items)

    def add(self, item: object) -> None:
        """Record an item as set.add does."""
        self.items.append(item)

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        maker = self.maker
        name = f"{maker.module}.{maker.name}" if isinstance(maker, Global) else "object"
        return f"<inert {name}>"


class InertDict(dict[Any, Any]):
    """An OrderedDict and the attributes it was given (`_metadata` of a state dict)."""

    state: Any = None


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that a pickle refers to: its key in the file, its class, its element count."""

    key: str
    type_name: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor, which is a view of a storage.  Offset and strides count elements.

    `dtype` is torch's name, or None if the tensor has the dtype of the storage.
    """

    storage: StorageRef
    dtype: str | None
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


METADATA = "_metadata"  # what torch writes beside a state dict
_SMALL = 1 << 60


def is_key(key: object) -> bool:
    """Return whether a dict can have this key after a round trip."""
    return isinstance(key, str | bool | float) or (type(key) is int and abs(key) < _SMALL)


def is_member(item: object) -> bool:
    """Return whether a set can have this item after a round trip."""
    return isinstance(item, bytes | None) or is_key(item)


def _key(key: object) -> object:
    """Return `key` if hashing it is cheap, else a record that hashes by identity.

    Hashing a tuple walks it, and a tuple that shares at every level has 2^depth paths; large
    integers can be chosen so that all of them collide.
    """
    if is_member(key):
        return key
    return Inert("key", (key,))


def _pairs(items: list[Any]) -> InertDict:
    return InertDict((_key(key), value) for key, value in items)


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, Inert) and len(value.args) == 1:  # torch.Size(...)
        value = value.args[0]
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        return None  # many tensors can share these sizes, and each would check them again
    return tuple(value) if all(type(n) is int and n >= 0 for n in value) else None


def tensor_ref(args: tuple[Any, ...], dtype: str | None) -> TensorRef | None:
    """Return the tensor that a call of torch rebuilds, or None if the arguments are not valid."""
    if len(args) < 4 or not isinstance(args[0], StorageRef) or type(args[1]) is not int:
        return None
    shape, stride = _sizes(args[2]), _sizes(args[3])
    if shape is None or stride is None or len(shape) != len(stride) or args[1] < 0:
        return None
    return TensorRef(args[0], dtype, args[1], shape, stride)


_ORDERED_DICT = Global("collections", "OrderedDict")


def _ordered_dict(args: tuple[Any, ...]) -> Any:
    """Return the dict that OrderedDict makes of its arguments, or None if they are unusual."""
    if not args:
        return InertDict()
    return _pairs(args[0]) if len(args) == 1 and isinstance(args[0], list) else None


def _call(maker: object, args: object, depth: int = 0) -> Any:
    """Return the tree node for a call of `maker`."""
    if not isinstance(args, tuple):
        raise pickle.UnpicklingError("a call without an argument tuple")
    node: object = None
    match maker:
        case Global("collections", "OrderedDict"):
            node = _ordered_dict(args)
        case Global("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor"):
            node = tensor_ref(args, None)
        case Global("torch._utils", "_rebuild_tensor_v3") if len(args) > 6:
            if isinstance(args[6], Global):
                node = tensor_ref(args, args[6].name)
        case Global("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
            node = args[0] if args and isinstance(args[0], TensorRef) else None
        case Global("torch._tensor", "_rebuild_from_type_v2") if len(args) > 2 and not depth:
            node = _call(args[0], args[2], 1)
            node = node if isinstance(node, TensorRef) else None
    return Inert(maker, args) if node is None else node


_PurePython: Any = vars(pickle)["_Unpickler"]  # its stubs do not have it


class _Memo:
    """The memo of a pickle: a list for consecutive numbers, which real programs write.

    Other numbers are in a dict, which takes fifteen times as much memory.
    """

    def __init__(self, charge: Callable[[int], None]) -> None:
        self._charge = charge
        self._row: list[object] = []
        self._far: dict[int, object] = {}

    def __len__(self) -> int:
        return len(self._row) + len(self._far)

    def __getitem__(self, number: int) -> object:
        if 0 <= number < len(self._row):
            return self._row[number]
        return self._far[number]

    def __setitem__(self, number: int, value: object) -> None:
        if number == len(self._row):
            self._row.append(value)
        elif 0 <= number < len(self._row):
            self._row[number] = value
        else:
            self._charge(_MARK)
            self._far[number] = value


def _charged(load: Callable[[Any], None], size_bytes: int) -> Callable[[InertUnpickler], None]:
    """Return a method that accounts for memory, then loads as the standard library does."""

    def charge_and_load(reader: InertUnpickler) -> None:
        reader.charge(size_bytes)
        load(reader)

    return charge_and_load


class InertUnpickler(_PurePython):  # type: ignore[misc]
    """Reads one pickle from `file` without running any of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self._file, self._start, self._size = file, file.tell(), size
        self.charged_bytes, self._allowed = 0, _ROOM
        self.memo = _Memo(self.charge)

    def charge(self, size_bytes: int) -> None:
        """Account for memory before it is allocated.

        Raises:
            pickle.UnpicklingError: the sum is too large for the bytes read so far.
        """
        self.charged_bytes += size_bytes
        if self.charged_bytes > self._allowed:
            read = self._file.tell() - self._start
            self._allowed = min(_ROOM + ROOM_PER_BYTE * read, _MOST_ROOM)
            if self.charged_bytes > self._allowed:
                raise pickle.UnpicklingError("its objects take too much memory")

    def pop_mark(self) -> list[Any]:
        items: list[Any] = super().pop_mark()
        self.charged_bytes -= _MARK
        return items

    def find_class(self, module: str, name: str) -> Global:
        self.charge(_NAME)
        return Global(str(module), str(name))

    def get_extension(self, code: int) -> None:
        self.charge(_NAME)
        self.append(Global("copyreg", f"extension {code}"))

    def persistent_load(self, pid: object) -> object:
        self.charge(_RECORD)
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage":
            kind, key, numel = pid[1], pid[2], pid[4]
            if isinstance(kind, Global) and type(key) is str and type(numel) is int:
                return StorageRef(key, kind.name, numel)
        return Inert("persistent id", (pid,))

    load_mark = _charged(_PurePython.load_mark, _MARK)
    load_empty_list = _charged(_PurePython.load_empty_list, _LIST)
    load_empty_dictionary = _charged(_PurePython.load_empty_dictionary, _DICT)
    load_tuple1 = _charged(_PurePython.load_tuple1, _TUPLE)
    load_tuple2 = _charged(_PurePython.load_tuple2, _TUPLE)
    load_tuple3 = _charged(_PurePython.load_tuple3, _TUPLE)

    def load_tuple(self) -> None:
        items = self.pop_mark()
        self.charge(_TUPLE + _SLOT * len(items))
        self.append(tuple(items))

    def _called(self, maker: object, args: object) -> object:
        self.charge(_RECORD)
        if maker == _ORDERED_DICT and isinstance(args, tuple) and args:
            # A pickle can make many of these from one list.
            self.charge(_ENTRY * len(args[0]) if isinstance(args[0], list) else 0)
        return _call(maker, args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack.append(self._called(self.stack.pop(), args))

    def _append_inert(self, maker: object, args: Sequence[Any]) -> None:
        self.charge(_RECORD + _SLOT * len(args))
        self.append(Inert(maker, tuple(args)))

    def load_newobj_ex(self) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        self._append_inert(self.stack.pop(), (*args, keywords))

    def load_inst(self) -> None:
        module = self.readline()[:-1].decode("latin1")
        name = self.readline()[:-1].decode("latin1")
        self.charge(_NAME)
        self._append_inert(Global(module, name), self.pop_mark())

    def load_obj(self) -> None:
        maker, *args = self.pop_mark()
        self._append_inert(maker, args)

    def load_build(self) -> None:
        state = self.stack.pop()
        holder = self.stack[-1]
        if isinstance(holder, Inert | InertDict):
            holder.state = state

    def load_setitem(self) -> None:
        self.charge(_ENTRY)
        value = self.stack.pop()
        self.stack[-2][_key(self.stack[-1])] = value
        self.stack.pop()

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.charge(_ENTRY * (len(items) // 2))
        container = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            container[_key(key)] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.charge(_RECORD + _ENTRY * (len(items) // 2))
        self.append(_pairs(list(zip(items[::2], items[1::2], strict=True))))

    def load_empty_set(self) -> None:
        self._append_inert(Global("builtins", "set"), ())

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    def load_frozenset(self) -> None:
        self._append_inert(Global("builtins", "frozenset"), self.pop_mark())

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self._size:  # do not allocate a claimed size
            raise pickle.UnpicklingError("a byte array longer than its pickle")
        self.append(self.read(length))


# Each opcode calls the method of this class with the name of the standard library's.
InertUnpickler.dispatch = {
    opcode: getattr(InertUnpickler, load.__name__) for opcode, load in _PurePython.dispatch.items()
}


def read_pickle(file: BinaryIO, size: int) -> Any:
    """Return the inert tree of the pickle at the file's position (at most `size` bytes).

    Raises:
        pickle.UnpicklingError: the pickle is not valid, or its objects take too much memory.
    """
    try:
        return InertUnpickler(file, size).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # A hostile or broken pickle can fail anywhere in the stack machine, in any way.
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def _step(key: str | float) -> str:
    """Return a key as part of a path, cut: hostile pickles share a huge key among tensors."""
    if isinstance(key, int) and abs(key) >= _SMALL:
        return "int"  # Python refuses to print huge integers
    return str(key)[:_MAX_STEP]


_CONTAINERS = (dict, list, tuple, Inert)
_NODES = (*_CONTAINERS, TensorRef, StorageRef)


def _children(node: object) -> Iterator[tuple[str, object]]:
    """Yield the children of a container that are nodes, with their names, in order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, _NODES):
                yield (
                    (_step(key) if isinstance(key, str | int | float) else type(key).__name__),
                    value,
                )
        if isinstance(node, InertDict) and isinstance(node.state, _NODES):
            yield "__dict__", node.state
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            if isinstance(value, _NODES):  # most items of long lists are numbers
                yield str(number), value
    elif isinstance(node, Inert):
        yield from _children_of_inert(node)


def _children_of_inert(node: Inert) -> Iterator[tuple[str, object]]:
    """Yield the arguments, the state and the items of an inert object."""
    yield from ((f"@arg{number}", value) for number, value in _children(node.args))
    yield from _children(node.state if isinstance(node.state, dict) else {"@state": node.state})
    for number, value in enumerate(node.items):
        if isinstance(value, tuple) and len(value) == 2:
            name = _step(value[0]) if isinstance(value[0], str | int) else str(number)
            if isinstance(value[1], _NODES):
                yield name, value[1]
        elif isinstance(value, _NODES):
            yield str(number), value


def walk(
    tree: object, kinds: tuple[type, ...] = (dict, TensorRef, StorageRef)
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield every node of these `kinds` with the end of its path, parents first.

    The walk enters a shared container once: hostile pickles share on every level.
    """
    seen: set[int] = set()
    # Paths are chains of links, so nodes share the memory of their parents' paths.
    stack: list[tuple[Any, object]] = [(None, tree)]
    while stack:
        link, node = stack.pop()
        if isinstance(node, _CONTAINERS):
            if id(node) in seen:
                continue
            seen.add(id(node))
            below = [((link, name), child) for name, child in _children(node)]
            stack.extend(reversed(below))
        if isinstance(node, kinds):
            yield _path(link), node


def _path(link: Any) -> tuple[str, ...]:
    """Return the names in a chain of links; a long path loses its top, which says less."""
    names: list[str] = []
    room = _MAX_PATH
    while link is not None and len(names) < _MAX_STEPS:
        link, name = link
        room -= len(name)
        if room < 0:
            break
        names.append(name)
    return tuple(reversed(names))
