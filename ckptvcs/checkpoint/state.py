"""Python states <-> files: the argument of `Repo.commit(state)`, the result of `Repo.checkout`.

`state_checkpoint` writes a state as a torch.save zip file in memory, which is committed like any
other file.  `fill` puts the decoded tensors into the tree of a file's pickle; unknown objects stay
inert.  Only functions that make torch tensors import torch.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from ckptvcs.checkpoint.layout import INLINE_BYTES
from ckptvcs.checkpoint.open import Checkpoint, build
from ckptvcs.checkpoint.optimizer_state import Names
from ckptvcs.checkpoint.pickle_reader import (
    METADATA,
    Global,
    Inert,
    InertDict,
    TensorRef,
    is_member,
)
from ckptvcs.checkpoint.torch_storages import ref_dtype
from ckptvcs.checkpoint.torch_writer import (
    DeviceBytes,
    Leaf,
    MemorySource,
    Payload,
    changed_state,
    dump_pickle,
    row_major,
    write_zip,
)
from ckptvcs.checkpoint.torch_zip import ARRAYS_RECORD, Checksums, parse
from ckptvcs.codec.dtypes import DTYPES, OF_TORCH
from ckptvcs.errors import InvalidInputError, optional
from ckptvcs.history.schema import View

STATE_FILE = "state.pt"

Copies = Callable[[Sequence[memoryview | DeviceBytes]], list[memoryview]]
"""Copies blocks of bytes into memory that training does not change."""

_SHOWN = 100  # characters of a dtype name, which a hostile file can make long

_NUMPY = {dtype.numpy: dtype.name for dtype in DTYPES.values() if dtype.numpy}


class _Storages:
    """The distinct storages of a state, in order of appearance; CPU storages are not copied."""

    def __init__(self) -> None:
        self.payloads: list[memoryview | DeviceBytes] = []
        self.arrays: list[str] = []
        self._numbers: dict[tuple[str, int, int], int] = {}
        self._alive: list[object] = []  # a freed storage's address can be used again
        self.versions: list[tuple[Any, int]] = []

    def leaf(self, value: object, path: str) -> Leaf | None:
        """Return the leaf for a tensor or an array, or None for any other object."""
        if type(value) is np.ndarray:  # a subclass may have more data, such as a mask
            return self._array(value, path)
        torch = sys.modules.get("torch")
        if torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter):
            try:
                return self._tensor(torch, value, path)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise _refused(path) from error
        return None

    def _array(self, array: np.ndarray[Any, Any], path: str) -> Leaf:
        dtype = _NUMPY.get(array.dtype.name)
        if dtype is None or array.dtype.byteorder == ">":
            raise InvalidInputError(
                f"cannot store the array at {path}: dtype {array.dtype} is not supported",
                hint="convert it to a numeric dtype in native byte order, or to a list",
            )
        self.arrays.append(path)
        whole = np.ascontiguousarray(array)
        number = len(self.payloads)
        self.payloads.append(whole.reshape(-1).view(np.uint8).data)
        view = View("", dtype, 0, array.shape, row_major(array.shape))
        return Leaf(number, whole.nbytes, view)

    def _tensor(self, torch: Any, tensor: Any, path: str) -> Leaf:
        dtype = OF_TORCH.get(str(tensor.dtype).removeprefix("torch."))
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if dtype is None or not plain or tensor.is_conj() or tensor.is_neg():
            raise _refused(path)
        if not tensor.is_inference():  # inference tensors have no version counter
            self.versions.append((tensor, tensor._version))
        storage = tensor.detach().untyped_storage()
        key = (str(tensor.device), storage.data_ptr(), storage.nbytes())
        if key not in self._numbers or not storage.nbytes():
            far = is_on_device(tensor) and storage.nbytes() > INLINE_BYTES
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device if far else "cpu")
            flat = flat.set_(storage if far else storage.cpu())
            self._numbers[key] = len(self.payloads)
            self._alive += [storage, flat]
            self.payloads.append(DeviceBytes(flat) if far else flat.numpy().data)
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        view = View("", dtype, tensor.storage_offset(), shape, stride)
        return Leaf(self._numbers[key], storage.nbytes(), view)


def is_on_device(tensor: Any) -> bool:
    """Return whether the tensor is in the memory of a GPU."""
    return str(tensor.device.type) == "cuda"


def _refused(path: str) -> InvalidInputError:
    return InvalidInputError(
        f"cannot store the tensor at {path}: it is sparse, quantized, conjugated, or on meta",
        hint="convert it with .to_dense(), .dequantize() or .resolve_conj()",
    )


def state_checkpoint(
    state: object, names: Names | None = None, copies: Copies | None = None
) -> Checkpoint:
    """Return a state as a checkpoint of one file, `state.pt`.

    Args:
        state: dicts and lists of plain values, torch tensors and numpy arrays
        names: see `build`
        copies: copies all storages; without it, tensors are read in place and must not change

    Raises:
        InvalidInputError: the state has an object that is not a plain type, tensor or numpy array.
    """
    storages = _Storages()
    try:
        pickled = dump_pickle(state, storages.leaf)
    except RuntimeError as error:  # a dict changed size during iteration
        raise changed_state() from error
    extra = {ARRAYS_RECORD: json.dumps(storages.arrays).encode()} if storages.arrays else {}
    source = MemorySource()
    if copies is None:
        for tensor, version in storages.versions:
            source.watch_version(tensor, version)
        payloads = [_payload(_copied_if_small(source, view)) for view in storages.payloads]
    else:
        payloads = [_payload(view) for view in copies(storages.payloads)]
    write_zip(source.append, "state", pickled, payloads, extra)
    layout = parse(source, checksums=Checksums.TRUSTED)
    assert layout is not None
    return build("state", [(STATE_FILE, source, layout)], [], names)


def _copied_if_small(
    source: MemorySource, view: memoryview | DeviceBytes
) -> memoryview | DeviceBytes:
    """Copy a small storage.  It is read several times, and no hash would show a change."""
    if isinstance(view, DeviceBytes) or len(view) > INLINE_BYTES:
        return view
    copy = bytes(view)
    source.watch(copy, view)
    return memoryview(copy)


def _payload(view: memoryview | DeviceBytes) -> Payload:
    # The skeleton does not hold checksums of large tensors: a restore computes them.
    return Payload(len(view), lambda: iter([view]), summed=len(view) <= INLINE_BYTES)


def fill(
    tree: object, tensor: Callable[[TensorRef], np.ndarray[Any, Any]], arrays: frozenset[str]
) -> object:
    """Return the tree with tensors in place of references.

    `tensor` returns the bytes (uint8, flat) of a reference's storage.  It must return the same
    array for the same storage, so that views share memory again.  Tensors at the paths in
    `arrays` become numpy arrays.
    """
    return _Filler(tensor, arrays).fill(tree, "")


_PLAIN = frozenset({type(None), bool, int, float, str, bytes})


class _Filler:
    def __init__(
        self, tensor: Callable[[TensorRef], np.ndarray[Any, Any]], arrays: frozenset[str]
    ) -> None:
        self._tensor, self._arrays = tensor, arrays
        self._done: dict[int, object] = {}

    def fill(self, node: object, path: str) -> object:
        # An explicit stack: recursion would reach Python's limit at about 300 levels.
        stack: list[Generator[tuple[object, str], object, object]] = []
        value: object = None
        wanted: tuple[Any, str] | None = (node, path)
        while wanted or stack:
            if wanted and self._is_begun(wanted[0]):
                value, wanted = self._simple(*wanted), None
            elif wanted:
                stack.append(self._container(*wanted))
                value, wanted = None, None
            if stack:
                try:
                    wanted = stack[-1].send(value)
                except StopIteration as done:
                    stack.pop()
                    value = done.value
        return value

    def _is_begun(self, node: object) -> bool:
        return not isinstance(node, dict | list | tuple) or id(node) in self._done

    def _simple(self, node: object, path: str) -> object:
        if isinstance(node, TensorRef):
            return self._make(node, path)
        return _called(node) if isinstance(node, Inert) else self._done.get(id(node), node)

    def _container(
        self, node: dict[Any, Any] | list[Any] | tuple[Any, ...], path: str
    ) -> Generator[tuple[object, str], object, object]:
        """Yield the items of a container and return its copy; it may contain itself."""
        dot = "." if path else ""
        if isinstance(node, dict):
            out: Any = OrderedDict() if isinstance(node, InertDict) else {}
            self._done[id(node)] = out
            for key, item in node.items():
                plain = type(item) in _PLAIN
                out[key] = item if plain else (yield item, f"{path}{dot}{key}")
            state = node.state if isinstance(node, InertDict) else None
            if isinstance(state, dict) and METADATA in state:
                out._metadata = yield state[METADATA], f"{path}{dot}{METADATA}"
            return out
        items: list[object] = []
        if isinstance(node, list):
            self._done[id(node)] = items
        for number, item in enumerate(node):
            items.append(item if type(item) in _PLAIN else (yield item, f"{path}{dot}{number}"))
        return self._done.setdefault(id(node), tuple(items))

    def _make(self, ref: TensorRef, path: str) -> object:
        dtype = ref_dtype(ref)
        if dtype is None:  # a dtype that only torch knows, such as bits16
            return _window(self._tensor(ref), str(ref.dtype), ref.offset, ref.shape, ref.stride)
        view = View(path, dtype, ref.offset, ref.shape, ref.stride)
        return make_tensor(self._tensor(ref), view, array=path in self._arrays)


def _called(node: Inert) -> object:
    """Return the plain value that a known call makes, or the inert object of any other call."""
    match node.maker, node.args:
        case Global("_codecs", "encode"), (text, *_):
            return str(text).encode("latin1")
        case Global("collections", "Counter"), (dict() as counts,):
            if all(type(count) in (int, float) for count in counts.values()):
                return Counter(dict(counts))
        case Global("builtins" | "__builtin__", "set"), (list() as items,):
            if all(is_member(item) for item in items):
                return set(items)
        case Global("torch", "Size"), (tuple() as sizes,):
            if all(type(size) is int for size in sizes):
                return optional("torch").Size(sizes)
        case _:
            pass
    return node


def make_tensor(data: np.ndarray[Any, Any], view: View, *, array: bool) -> Any:
    """Return a view of the bytes (uint8, flat) of a stored tensor, without a copy.

    It is a numpy array if `array` is true and numpy has the dtype, else a torch tensor.
    """
    dtype = DTYPES[view.dtype]
    if array and dtype.numpy:
        return data.view(dtype.numpy).reshape(view.shape)
    return _window(data, dtype.torch, view.offset, view.shape, view.stride)


def _window(
    data: np.ndarray[Any, Any],
    dtype: str,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> Any:
    torch = optional("torch")
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise InvalidInputError(
            f"torch {torch.__version__} has no dtype {dtype[:_SHOWN]}",
            hint="use 'ckpt checkout' to restore the file",
        )
    storage = torch.from_numpy(data).untyped_storage()
    return torch.empty(0, dtype=torch_dtype).set_(storage, offset, shape, stride)
