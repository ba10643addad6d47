"""Pickles -> inert trees.  Nothing a pickle names is ever imported, called or looked up.

A pickle is a program.  This reader runs its stack machine with every global replaced by a record
of its name and every call by a record of its arguments, so a payload such as `os.system` becomes
data.  What torch needs to rebuild tensors is recognised by name and becomes a `TensorRef`.

The pure Python unpickler of the standard library is used on purpose: its memo is a dict, so that
a memo index of 2^32 costs nothing, where the C one would allocate it.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

MAX_PICKLE_BYTES = 1 << 26
# Operations that are allowed bound time and memory: so many for whatever a state holds besides
# tensors, and so many for each of its storages (two tensors of Adam's take 31 each).
_OPERATIONS = 1 << 20
_OPERATIONS_A_STORAGE = 100
"""Larger pickles are not read for structure; their file is still stored exactly."""

_MAX_STEP = 200  # characters of a name that a path shows
_MAX_PATH = 1000
_MAX_DEPTH = 200  # nothing below this many levels is looked at; it is stored all the same


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to."""

    module: str
    name: str


class Inert:
    """An object that a pickle would have made: who would be called with what."""

    __slots__ = ("args", "items", "maker", "state")

    def __init__(self, maker: object, args: tuple[Any, ...]) -> None:
        self.maker = maker
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []

    def append(self, item: object) -> None:
        """What a list would do; pickles append to objects they made."""
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        """What a list would do."""
        self.items.extend(items)

    def add(self, item: object) -> None:
        """What a set would do."""
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


@dataclass(frozen=True)
class StorageRef:
    """A storage that a pickle points at: its key in the file, and the type it was saved as."""

    key: str
    type_name: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor: a window on a storage.  `dtype` is torch's name where the tensor gives its own,
    None where it is that of the storage.  Offset and strides count elements.
    """

    storage: StorageRef
    dtype: str | None
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


METADATA = "_metadata"  # what torch writes beside a state dict
_SMALL = 1 << 60


def is_key(key: object) -> bool:
    """Whether it comes back as the key of a dict."""
    return isinstance(key, str | bool | float) or (type(key) is int and abs(key) < _SMALL)


def is_member(item: object) -> bool:
    """Whether it comes back in a set."""
    return isinstance(item, bytes | None) or is_key(item)


def _key(key: object) -> object:
    """`key`, if hashing it is cheap; else a record that hashes by identity.

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
    if isinstance(value, tuple | list) and all(type(n) is int and n >= 0 for n in value):
        return tuple(value)
    return None


def _tensor(args: tuple[Any, ...], dtype: str | None) -> TensorRef | None:
    if len(args) < 4 or not isinstance(args[0], StorageRef) or type(args[1]) is not int:
        return None
    shape, stride = _sizes(args[2]), _sizes(args[3])
    if shape is None or stride is None or len(shape) != len(stride) or args[1] < 0:
        return None
    return TensorRef(args[0], dtype, args[1], shape, stride)


def _call(maker: object, args: object, depth: int = 0) -> Any:
    """What calling `maker` leaves in the tree."""
    if not isinstance(args, tuple):
        raise pickle.UnpicklingError("a call without an argument tuple")
    found: object = None
    match maker:
        case Global("collections", "OrderedDict") if not args:
            return InertDict()
        case Global("collections", "OrderedDict") if len(args) == 1 and isinstance(args[0], list):
            return _pairs(args[0])
        case Global("builtins" | "__builtin__", "set" | "frozenset") if len(args) == 1:
            return Inert(maker, args)
        case Global("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor"):
            found = _tensor(args, None)
        case Global("torch._utils", "_rebuild_tensor_v3") if len(args) > 6:
            if isinstance(args[6], Global):
                found = _tensor(args, args[6].name)
        case Global("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
            found = args[0] if args and isinstance(args[0], TensorRef) else None
        case Global("torch._tensor", "_rebuild_from_type_v2") if len(args) > 2 and not depth:
            found = _call(args[0], args[2], 1)
            found = found if isinstance(found, TensorRef) else None
    return Inert(maker, args) if found is None else found


_PurePython: Any = vars(pickle)["_Unpickler"]  # its stubs do not have it


class _Budget:
    """The handlers of the stack machine, handed out so many times and no more."""

    def __init__(self, handlers: dict[int, Any], storages: int) -> None:
        self._handlers = handlers
        self._left = _OPERATIONS + _OPERATIONS_A_STORAGE * storages

    def __getitem__(self, code: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError("a pickle of too many operations")
        return self._handlers[code]


class InertUnpickler(_PurePython):  # type: ignore[misc]
    """Reads one pickle from `file` without running any of it."""

    handlers: ClassVar[dict[int, Any]] = dict(_PurePython.dispatch)

    def __init__(self, file: BinaryIO, size: int, storages: int) -> None:
        super().__init__(file, encoding="latin1")
        self._size = size
        self.dispatch = _Budget(self.handlers, storages)

    def find_class(self, module: str, name: str) -> Global:
        return Global(str(module), str(name))

    def get_extension(self, code: int) -> None:
        self.append(Global("copyreg", f"extension {code}"))

    def persistent_load(self, pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage":
            kind, key, numel = pid[1], pid[2], pid[4]
            if isinstance(kind, Global) and type(key) is str and type(numel) is int:
                return StorageRef(key, kind.name, numel)
        return Inert("persistent id", (pid,))

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    def _load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack.append(_call(self.stack.pop(), args))

    def _load_newobj_ex(self) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        maker = self.stack.pop()
        self.stack.append(Inert(maker, (*tuple(args), keywords)))

    def _load_inst(self) -> None:
        module = self.readline()[:-1].decode("latin1")
        name = self.readline()[:-1].decode("latin1")
        args = self.pop_mark()
        self.append(Inert(Global(module, name), tuple(args)))

    def _load_obj(self) -> None:
        args = self.pop_mark()
        self.append(Inert(args[0], tuple(args[1:])))

    def _load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Inert | InertDict):
            made.state = state

    def _load_setitem(self) -> None:
        value = self.stack.pop()
        self.stack[-2][_key(self.stack[-1])] = value
        self.stack.pop()

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        made = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            made[_key(key)] = value

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_pairs(list(zip(items[::2], items[1::2], strict=True))))

    def _load_empty_set(self) -> None:
        self.append(Inert(Global("builtins", "set"), ()))

    def _load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    def _load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(Inert(Global("builtins", "frozenset"), tuple(items)))

    def _load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        if length > self._size:  # the size is claimed before a byte of it is there
            raise pickle.UnpicklingError("a byte array longer than its pickle")
        self.append(self.read(length))

    handlers[pickle.REDUCE[0]] = _load_reduce
    handlers[pickle.NEWOBJ[0]] = _load_newobj
    handlers[pickle.NEWOBJ_EX[0]] = _load_newobj_ex
    handlers[pickle.INST[0]] = _load_inst
    handlers[pickle.OBJ[0]] = _load_obj
    handlers[pickle.BUILD[0]] = _load_build
    handlers[pickle.BYTEARRAY8[0]] = _load_bytearray8
    handlers[pickle.SETITEM[0]] = _load_setitem
    handlers[pickle.SETITEMS[0]] = _load_setitems
    handlers[pickle.DICT[0]] = _load_dict
    handlers[pickle.EMPTY_SET[0]] = _load_empty_set
    handlers[pickle.ADDITEMS[0]] = _load_additems
    handlers[pickle.FROZENSET[0]] = _load_frozenset


def read_pickle(file: BinaryIO, size: int, storages: int) -> Any:
    """The inert tree of the pickle at the file's position, which has at most `size` bytes.

    `storages` is how many its file has; pickles of far more operations are not read.

    Raises:
        pickle.UnpicklingError: it is no pickle that can be read.
    """
    try:
        return InertUnpickler(file, size, storages).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # A hostile or broken pickle can fail anywhere in the stack machine, in any way.
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def _step(key: str | float) -> str:
    """A key as a path shows it.  Hostile pickles share one huge key among many tensors."""
    if isinstance(key, int) and abs(key) >= _SMALL:
        return "int"  # Python refuses to print huge integers
    return str(key)[:_MAX_STEP]


def children(node: object) -> Iterator[tuple[str, object]]:
    """The named parts of a tree node, in order."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (_step(key) if isinstance(key, str | int | float) else type(key).__name__), value
        if isinstance(node, InertDict) and node.state is not None:
            yield "__dict__", node.state
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield str(number), value
    elif isinstance(node, Inert):
        for number, value in enumerate(node.args):
            yield f"@arg{number}", value
        if isinstance(node.state, dict):
            yield from children(node.state)
        elif node.state is not None:
            yield "@state", node.state
        for number, value in enumerate(node.items):
            if isinstance(value, tuple) and len(value) == 2:
                named = isinstance(value[0], str | int)
                yield (_step(value[0]) if named else str(number)), value[1]
            else:
                yield str(number), value


_NODES = (dict, list, tuple, Inert, TensorRef, StorageRef)


def walk(tree: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every dict, tensor and storage with its path, parents first.

    A container is entered once, however often it is shared: hostile pickles share on every level.
    """
    seen: set[int] = set()
    # The path is a chain of links, so that depth costs memory only once.
    stack: list[tuple[Any, int, object]] = [(None, 0, tree)]
    while stack:
        link, depth, node = stack.pop()
        if isinstance(node, dict | list | tuple | Inert):
            if id(node) in seen or depth > _MAX_DEPTH:
                continue
            seen.add(id(node))
            below = [
                ((link, name), depth + 1, child)
                for name, child in children(node)
                if isinstance(child, _NODES)
            ]
            stack.extend(reversed(below))
        if isinstance(node, dict | TensorRef | StorageRef):
            names: list[str] = []
            while link is not None:
                link, name = link
                names.append(name)
            while sum(map(len, names)) > _MAX_PATH:
                names.pop()  # the top: what a path ends in tells more
            yield tuple(reversed(names)), node
