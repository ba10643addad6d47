"""Load the state of a commit as Python objects, or write one of its parts to a file.

A part is written as its object in the checkpoint (the dict under `model`, say) if that has only
plain values, else as a flat dict of its tensors by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ckptvcs.checkpoint.conventions import PART_KEYS, SUFFIXES
from ckptvcs.checkpoint.layout import Layout, StoredTensor
from ckptvcs.checkpoint.links import within
from ckptvcs.checkpoint.pickle_reader import TensorRef, walk
from ckptvcs.checkpoint.state import fill, make_tensor
from ckptvcs.checkpoint.torch_storages import ref_dtype
from ckptvcs.checkpoint.torch_writer import Leaf, Payload, dump_pickle, row_major, write_zip
from ckptvcs.checkpoint.torch_zip import ARRAYS_RECORD
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.words import Bytes, octets, word_type
from ckptvcs.decode.commit_reader import Restorer, in_our_order
from ckptvcs.decode.file_writer import look_at_files, named_paths, save_directory, save_file
from ckptvcs.errors import CkptError, InvalidInputError, NotFoundError
from ckptvcs.files.names import refuse_trusted
from ckptvcs.files.targets import Target, looked, named
from ckptvcs.history.commit import INEXACT, FileEntry
from ckptvcs.history.schema import LITTLE, Schema, View
from ckptvcs.parallel import quiet

_NOT_IN_SAFETENSORS = frozenset({"C32", "C128"})
_MAX_ELEMENTS = 1 << 59  # 16-byte elements whose size in bytes fits into 63 bits
_MAX_WINDOW = 1 << 32  # bytes of a view that repeats elements (stride 0)

Window = tuple[int, View]
"""The number of a tensor in the schema, and a view of it."""


def windows(schema: Schema) -> dict[str, Window]:
    """Return all tensors under all their names; the first of several with the same name."""
    tensors: dict[str, Window] = {}
    for number, info in enumerate(schema.tensors):
        whole = View(info.name, info.dtype, 0, info.shape, row_major(info.shape))
        views = info.views or (whole,)
        for view in views:
            tensors.setdefault(view.name, (number, view))
        tensors.setdefault(info.name, (number, views[0]))
    return tensors


class PartReader:
    """The tensors of one commit, as objects and by name."""

    def __init__(self, restorer: Restorer) -> None:
        self._restorer = restorer
        self.schema = restorer.schema
        self._decoded: dict[int, Bytes] = {}
        self._plain: dict[int, Bytes] = {}  # of tensors with another byte order

    @cached_property
    def _inline(self) -> dict[int, bytes]:
        return self._restorer.inline()

    def fidelity(self, window: Window) -> str:
        """Return `exact`, `near`, `archived` or `dropped`; inline tensors are always exact."""
        info = self.schema.tensors[window[0]]
        form = "exact" if info.inline else self._restorer.fidelity[info.part]
        return form if form not in INEXACT or window[0] in self._near else "exact"

    @cached_property
    def _near(self) -> set[int]:
        return self._restorer.near()

    def _blocks(self, number: int) -> Iterator[memoryview]:
        if number < 0 or (info := self.schema.tensors[number]).inline:
            return iter([octets(self.plain(number))])
        if info.order == LITTLE:
            return self._restorer.blocks(number)
        word, blocks = word_type(info.type.word), self._restorer.blocks(number)
        return (octets(in_our_order(np.frombuffer(block, word), info)) for block in blocks)

    def plain(self, number: int) -> Bytes:
        """Return all bytes of a tensor, little-endian; the same array on each call."""
        if number < 0 or self.schema.tensors[number].order == LITTLE:
            return self.raw(number)
        if number not in self._plain:
            info = self.schema.tensors[number]
            words = self.raw(number).view(word_type(info.type.word))
            self._plain[number] = in_our_order(words, info).view(np.uint8)
        return self._plain[number]

    def raw(self, number: int) -> Bytes:
        """Return all bytes of a tensor as stored; the same array on each call."""
        if number < 0:
            return np.empty(0, np.uint8)
        if number not in self._decoded:
            if self.schema.tensors[number].inline:
                data = self._inline.get(number, b"")
                self._decoded[number] = np.frombuffer(data, np.uint8).copy()
            else:
                self._decoded[number] = self._restorer.tensor(number)
        return self._decoded[number]

    def decode_ahead(self, numbers: Iterable[int]) -> None:
        """Decode the stored tensors among `numbers` together, to keep all threads busy."""
        infos, done = self.schema.tensors, self._decoded
        wanted = [n for n in dict.fromkeys(numbers) if not infos[n].inline and n not in done]
        self._decoded.update(self._restorer.tensors(wanted))

    # -- states --------------------------------------------------------------------------------

    def state(self) -> object:
        """Return the object in the committed file; for a directory, a dict of them by path.

        Links map to the object of their target, and files that are not checkpoints to bytes.
        """
        commit = self._restorer.commit
        files = [file for file in commit.files if file.skeleton is not None]
        if commit.source != "directory":
            return self._state_of(files[0])
        states = {file.path: self._state_of(file) for file in files}
        links = {f.path: f.link for f in commit.files if f.link is not None}
        targets = {path: within(path, links.get) for path in links}
        return states | {path: states[to] for path, to in targets.items() if to in states}

    def _state_of(self, file: FileEntry) -> object:
        """Return the object in a file: a dict of tensors for safetensors, else bytes."""
        layout, numbers = self._restorer.layout(file)
        if layout.tree is not None or layout.format == "safetensors":
            self.decode_ahead(n for n in numbers if n >= 0)
        if layout.format == "safetensors":
            return self._flat_state(zip(layout.tensors, numbers, strict=True))
        if layout.format != "raw" and layout.problem is None:
            by_key = {f.key: n for f, n in zip(layout.tensors, numbers, strict=True)}
            return self._filled(layout, by_key, file.path)
        if self._restorer.commit.source == "state":
            raise InvalidInputError(
                f"the structure of this state cannot be read: {layout.problem}",
                hint="use 'ckpt checkout' to restore the file",
            )
        parts: list[bytes] = []
        self._restorer.write_file(file, lambda data: parts.append(bytes(data)), quiet)
        return b"".join(parts)

    def _filled(self, layout: Layout, numbers: Mapping[str, int], path: str) -> object:
        try:
            return fill(
                layout.tree, lambda ref: self.plain(numbers[ref.storage.key]), layout.arrays
            )
        except CkptError:
            raise
        except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            # Committed files may be malformed or deeply nested.
            raise InvalidInputError(
                f"{path} cannot be loaded as Python objects: {type(error).__name__}",
                hint="use 'ckpt checkout' to restore the file",
            ) from error

    def _flat_state(self, tensors: Iterable[tuple[StoredTensor, int]]) -> dict[str, Any]:
        """Return the tensors of a safetensors file by name, including empty ones."""
        state = {}
        for found, number in tensors:
            shape = _possible(found.name, found.shape)
            view = View(found.name, found.dtype, 0, shape, row_major(shape))
            state[found.key] = make_tensor(self.plain(number), view, array=False)
        return state

    def tensors(self, wanted: Mapping[str, Window]) -> dict[str, Any]:
        """Return tensors by name, as in `state`: views of one stored tensor share its memory."""
        for name, (_, view) in wanted.items():
            _possible(name, view.shape)
        self.decode_ahead(number for number, _ in wanted.values())
        return {
            name: make_tensor(self.plain(number), view, array=name in self._arrays)
            for name, (number, view) in wanted.items()
        }

    @cached_property
    def _arrays(self) -> set[str]:
        """Return the names of tensors that were numpy arrays."""
        commit, arrays = self._restorer.commit, set()
        for file in commit.files:
            if file.format == "torch-zip" and self._restorer.mentions(file, ARRAYS_RECORD):
                prefix = f"{file.path}:" if commit.source == "directory" else ""
                arrays |= {prefix + path for path in self._restorer.layout(file)[0].arrays}
        return arrays

    # -- parts ---------------------------------------------------------------------------------

    def named(self, part: str) -> dict[str, Window]:
        """Return the tensors of a part, under all their names."""
        tensors = {
            name: window
            for name, window in windows(self.schema).items()
            if self.schema.tensors[window[0]].part == part
        }
        if not tensors:
            raise NotFoundError(f"commit {self._restorer.name[:8]} has no part '{part}'")
        return tensors

    def _subtree(self, part: str) -> tuple[object, dict[str, int]] | None:
        """Return the object with exactly the tensors of a part, and its tensors by key."""
        subtrees = [
            (tree, keys)
            for file in self._restorer.commit.files
            if file.skeleton is not None and file.format in ("torch-zip", "torch-legacy")
            for tree, keys in self._subtrees(file, part)
        ]
        return subtrees[0] if len(subtrees) == 1 else None

    def _subtrees(self, file: FileEntry, part: str) -> Iterator[tuple[object, dict[str, int]]]:
        """Yield the dicts of a file, at most one level deep, whose tensors are all of a part."""
        layout, numbers = self._restorer.layout(file)
        if not isinstance(layout.tree, dict):
            return
        keys = {f.key: n for f, n in zip(layout.tensors, numbers, strict=True)}
        for tree in (layout.tree, *layout.tree.values()):
            refs = [node for _, node in walk(tree) if isinstance(node, TensorRef)]
            owners = [keys.get(ref.storage.key, -1) for ref in refs]
            parts = {self.schema.tensors[n].part for n in owners if n >= 0}
            if isinstance(tree, dict) and parts == {part}:
                yield tree, keys
                if tree is layout.tree:
                    return

    def save(self, part: str, target: Path | Target) -> None:
        """Write one part as safetensors if the suffix is .safetensors, else as torch.save does.

        Raises:
            NotFoundError: the commit does not have that part.
            ConflictError: the file changed after it was looked at.
        """
        tensors, path = self.named(part), named(target)
        if path.suffix == ".safetensors":
            write_whole(target, lambda out: self._save_safetensors(_short(tensors), out))
        else:
            write_whole(target, lambda out: self._save_torch(part, tensors, path.stem, out))

    def save_tensor(self, name: str, window: Window, target: Path | Target) -> None:
        """Write one tensor, by name in a .safetensors file, else alone as torch.save does."""
        if named(target).suffix == ".safetensors":
            write_whole(target, lambda out: self._save_safetensors({name: window}, out))
            return
        data, view = self.window(window), window[1]
        leaf = Leaf(0, len(data), replace(view, offset=0, stride=row_major(view.shape)))
        pickled, stem = dump_pickle(None, lambda *_: leaf), named(target).stem
        payload = Payload(len(data), lambda: iter([data]))
        write_whole(target, lambda out: write_zip(out.write, stem, pickled, [payload]))

    def export(
        self,
        target: Path | Target,
        part: str | None,
        progress: Callable[[int], None],
        *,
        force: bool = False,
    ) -> None:
        """Write the committed file or directory if its format fits the suffix of `target`.

        Otherwise, or if `part` is given, write one part (default: `model`) as `save` does. A
        directory needs a target without a suffix of torch or safetensors files.

        Raises:
            NotFoundError: the commit does not have that part.
            ConflictError: the file changed after it was looked at; or, without `force`, a
                directory has names that tools execute or trust.
        """
        restorer, commit = self._restorer, self._restorer.commit
        files = [file for file in commit.files if file.skeleton is not None]
        suffix = named(target).suffix
        whole = part is None and commit.source == "directory" and suffix not in SUFFIXES
        alone = commit.source != "directory" and (
            (files[0].format == "safetensors") == (suffix == ".safetensors")
        )
        with looked(target) as at:
            if whole:
                if not force:
                    refuse_trusted(named_paths(commit, own=False))
                save_directory(restorer, at, look_at_files(commit, at), progress)
            elif part is None and alone:
                save_file(restorer, at, progress)
            else:
                self.save(part or "model", at)
                progress(commit.raw_bytes)

    def restore(self, target: Path | Target) -> None:
        """Write the committed file or directory, whatever the suffix of `target`.

        Raises:
            ConflictError: the file changed after it was looked at.
        """
        with looked(target) as at:
            if self._restorer.commit.source == "directory":
                save_directory(self._restorer, at, look_at_files(self._restorer.commit, at), quiet)
            else:
                save_file(self._restorer, at, quiet)

    def forget(self) -> None:
        """Free the decoded tensors; the next use decodes them again."""
        self._decoded, self._plain = {}, {}

    def _save_torch(
        self, part: str, tensors: Mapping[str, Window], stem: str, out: BinaryIO
    ) -> None:
        storages: dict[int, int] = {}

        def leaf_of(number: int, view: View) -> Leaf:
            size = 0 if number < 0 else self.schema.tensors[number].size_bytes
            return Leaf(storages.setdefault(number, len(storages)), size, view)

        pickled = None
        subtree = self._subtree(part)
        if subtree is not None:
            tree, keys = subtree

            def leaf(value: object, _: str) -> Leaf | None:
                if not isinstance(value, TensorRef):
                    return None
                view = View("", ref_dtype(value) or "U8", value.offset, value.shape, value.stride)
                return leaf_of(keys.get(value.storage.key, -1), view)

            try:
                pickled = dump_pickle(tree, leaf)
            except InvalidInputError:
                storages.clear()  # the object has other than plain values
        if pickled is None:

            def flat_leaf(value: object, _: str) -> Leaf | None:
                return leaf_of(*value) if isinstance(value, tuple) else None

            pickled = dump_pickle(dict(tensors), flat_leaf)
        payloads = [
            Payload(
                0 if number < 0 else self.schema.tensors[number].size_bytes,
                lambda number=number: self._blocks(number),  # type: ignore[misc]
            )
            for number in storages
        ]
        write_zip(out.write, stem, pickled, payloads)

    def _save_safetensors(self, tensors: Mapping[str, Window], out: BinaryIO) -> None:
        """Write tensors as a safetensors file, block by block.

        The safetensors library needs all tensors in memory at once and writes to a path only.
        It also orders metadata differently on each run.
        """
        header: dict[str, Any] = {}
        at = 0
        for name, (_, view) in tensors.items():
            size = int(np.prod(view.shape, dtype=np.int64)) * DTYPES[view.dtype].size
            shape = list(view.shape)
            if view.dtype in _NOT_IN_SAFETENSORS or (view.dtype == "F4" and not shape):
                raise InvalidInputError(
                    f"safetensors cannot store {name} ({view.dtype} {shape})",
                    hint="use a file name that ends in .pt",
                )
            if view.dtype == "F4":  # safetensors counts elements, two per byte
                shape[-1] *= 2
            header[name] = {"dtype": view.dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        head = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
        head += b" " * (-len(head) % 8)
        out.write(len(head).to_bytes(8, "little") + head)
        for number, view in tensors.values():
            info = self.schema.tensors[number]
            if (view.dtype, view.shape) == (info.dtype, info.shape):
                for block in self._blocks(number):
                    out.write(block)
            else:
                out.write(self.window((number, view)))

    def window(self, window: Window) -> bytes:
        """Return the elements of a view in row-major order."""
        number, view = window
        info, size = self.schema.tensors[number], DTYPES[view.dtype].size
        if math.prod(view.shape) * size > max(_MAX_WINDOW, info.size_bytes):
            raise InvalidInputError(f"{view.name} is too large to write: its view repeats elements")
        flat = self.plain(number)
        cells = flat.view(word_type(size) if size <= 8 else np.dtype("V16"))
        strides = tuple(step * size for step in view.stride)
        _possible(view.name, view.shape)
        return as_strided(cells[view.offset :], view.shape, strides, writeable=False).tobytes()


def write_whole(target: Path | Target, write: Callable[[BinaryIO], None]) -> None:
    """Write a file atomically.

    Raises:
        ConflictError: the file changed after it was looked at, before writing.
    """
    with looked(target) as at, at.file() as out:
        write(out)


def _short(tensors: dict[str, Window]) -> dict[str, Window]:
    """Remove a common file name, and a common top-level key of a part, from all names."""
    for mark in (":", "."):
        tops = {name.partition(mark)[0] for name in tensors}
        shared = len(tops) == 1 and all(mark in name for name in tensors)
        if shared and (mark == ":" or tops <= PART_KEYS):
            tensors = {name.partition(mark)[2]: window for name, window in tensors.items()}
    return tensors


def _possible(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape if its nonzero lengths are possible, else raise InvalidInputError."""
    if math.prod(length for length in shape if length) >= _MAX_ELEMENTS:
        raise InvalidInputError(
            f"{name} has an invalid shape: {list(shape)}",
            hint="use 'ckpt checkout' to restore the file",
        )
    return shape
