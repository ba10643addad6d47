"""One part of a commit, or its state in Python.

A part is written as the object that the checkpoint held for it (the dict under `model`, say)
where that is made of plain values; else as a flat dict of its tensors by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from ckptvcs.checkpoint.torch_writer import (
    Leaf,
    Payload,
    dump_pickle,
    row_major,
    write_zip,
    zip_records,
)
from ckptvcs.checkpoint.torch_zip import ARRAYS_RECORD
from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.words import octets, word_type
from ckptvcs.decode.commit_reader import Restorer, in_our_order
from ckptvcs.decode.file_writer import look_at_files, named_paths, save_directory, save_file
from ckptvcs.errors import CkptError, InvalidInputError, NotFoundError
from ckptvcs.files.names import refuse_trusted
from ckptvcs.files.targets import Target, looked, named
from ckptvcs.history.commit import FileEntry
from ckptvcs.history.schema import LITTLE, Schema, View
from ckptvcs.parallel import quiet

_NOT_IN_SAFETENSORS = frozenset({"C32", "C128"})
_MAX_ELEMENTS = 1 << 59  # in bytes no more than 63 bits hold
_MAX_WINDOW = 1 << 32  # bytes; of elements that stand in one place it may have any number

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


Window = tuple[int, View]
"""The position of a stored tensor in the schema, and what of it is seen."""


def windows(schema: Schema) -> dict[str, Window]:
    """Every tensor under every name it has; of two that have the same, the first."""
    found: dict[str, Window] = {}
    for number, info in enumerate(schema.tensors):
        own = View(info.name, info.dtype, 0, info.shape, row_major(info.shape))
        views = info.views or (own,)
        for view in views:
            found.setdefault(view.name, (number, view))
        found.setdefault(info.name, (number, views[0]))  # a storage whose name was taken
    return found


class PartReader:
    """The tensors of one commit, as objects and by name."""

    def __init__(self, restorer: Restorer) -> None:
        self._restorer = restorer
        self.schema = restorer.schema
        self._decoded: dict[int, Bytes] = {}
        self._plain: dict[int, Bytes] = {}  # of those that are stored in another order

    @cached_property
    def _inline(self) -> dict[int, bytes]:
        return self._restorer.inline()

    def fidelity(self, window: Window) -> str:
        """`exact`, `near` or `dropped`: how a tensor comes back; small ones are always exact."""
        info = self.schema.tensors[window[0]]
        form = "exact" if info.inline else self._restorer.fidelity[info.part]
        return form if form != "near" or window[0] in self._near else "exact"

    @cached_property
    def _near(self) -> set[int]:
        return self._restorer.near()

    def _blocks(self, number: int) -> Iterator[bytes | memoryview]:
        if number < 0:
            return iter(())
        info = self.schema.tensors[number]
        if info.inline:
            blocks: Iterator[bytes | memoryview] = iter([self._inline.get(number, b"")])
        else:
            blocks = self._restorer.blocks(number)
        if info.order == LITTLE:
            return blocks
        word = word_type(info.type.word)
        return (octets(in_our_order(np.frombuffer(block, word), info)) for block in blocks)

    def plain(self, number: int) -> Bytes:
        """All bytes of a tensor, the same array each time, its numbers in our order."""
        if number < 0 or self.schema.tensors[number].order == LITTLE:
            return self.raw(number)
        if number not in self._plain:
            info = self.schema.tensors[number]
            words = self.raw(number).view(word_type(info.type.word))
            self._plain[number] = in_our_order(words, info).view(np.uint8)
        return self._plain[number]

    def raw(self, number: int) -> Bytes:
        """All bytes of a tensor as they are stored, the same array each time."""
        if number < 0:
            return np.empty(0, np.uint8)
        if number not in self._decoded:
            if self.schema.tensors[number].inline:
                self._decoded[number] = np.frombuffer(self._inline.get(number, b""), np.uint8)
                self._decoded[number] = self._decoded[number].copy()
            else:
                self._decoded[number] = self._restorer.tensor(number)
        return self._decoded[number]

    def decode_ahead(self, numbers: Iterable[int]) -> None:
        """Decode the stored ones of some tensors together, so that threads never wait."""
        infos, done = self.schema.tensors, self._decoded
        wanted = [n for n in dict.fromkeys(numbers) if not infos[n].inline and n not in done]
        self._decoded.update(self._restorer.tensors(wanted))

    # -- states --------------------------------------------------------------------------------

    def state(self) -> object:
        """What was committed: the object of a file; for a directory a dict of these by path, those
        of links that lead to them included, with bytes for files that are no checkpoints.
        """
        commit = self._restorer.commit
        files = [file for file in commit.files if file.skeleton is not None]
        if commit.source != "directory":
            return self._state_of(files[0])
        states = {file.path: self._state_of(file) for file in files}
        links = {f.path: f.link for f in commit.files if f.link is not None}
        found = {path: within(path, links.get) for path in links}
        return states | {path: states[to] for path, to in found.items() if to in states}

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
            # It was committed as it is, and may hold any claim and any depth.
            raise InvalidInputError(
                f"{path} cannot be loaded as Python objects: {type(error).__name__}",
                hint="use 'ckpt checkout' to restore the file",
            ) from error

    def _flat_state(self, tensors: Iterable[tuple[StoredTensor, int]]) -> dict[str, Any]:
        """The tensors of a safetensors file by their names, also those without elements."""
        state = {}
        for found, number in tensors:
            shape = _possible(found.name, found.shape)
            view = View(found.name, found.dtype, 0, shape, row_major(shape))
            state[found.key] = make_tensor(self.plain(number), view, array=False)
        return state

    def tensors(self, wanted: Mapping[str, Window]) -> dict[str, Any]:
        """Some tensors by name, as `state` has them: those of one stored tensor share it."""
        for name, (_, view) in wanted.items():
            _possible(name, view.shape)
        self.decode_ahead(number for number, _ in wanted.values())
        return {
            name: make_tensor(self.plain(number), view, array=name in self._arrays)
            for name, (number, view) in wanted.items()
        }

    @cached_property
    def _arrays(self) -> set[str]:
        """The names of those tensors that were numpy arrays."""
        commit, found = self._restorer.commit, set()
        for file in commit.files:
            if file.format == "torch-zip" and self._restorer.mentions(file, ARRAYS_RECORD):
                prefix = f"{file.path}:" if commit.source == "directory" else ""
                found |= {prefix + path for path in self._restorer.layout(file)[0].arrays}
        return found

    # -- parts ---------------------------------------------------------------------------------

    def named(self, part: str) -> list[tuple[str, int, View]]:
        """Every tensor of a part under every name it has: name, stored tensor, window on it."""
        found = windows(self.schema).items()
        rows = [
            (name, number, view)
            for name, (number, view) in found
            if self.schema.tensors[number].part == part
        ]
        if not rows:
            raise NotFoundError(f"commit {self._restorer.name[:8]} has no part '{part}'")
        return rows

    def _subtree(self, part: str) -> tuple[object, dict[str, int]] | None:
        """The object that holds a whole part and nothing else, and its tensors by key."""
        found = [
            (tree, keys)
            for file in self._restorer.commit.files
            if file.skeleton is not None and file.format in ("torch-zip", "torch-legacy")
            for tree, keys in self._subtrees(file, part)
        ]
        return found[0] if len(found) == 1 else None

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
        """Write one part as .safetensors, or as a file of torch.save under any other name.

        Raises:
            NotFoundError: the commit does not have that part.
            ConflictError: the file has changed since the look.
        """
        rows, path = self.named(part), named(target)
        if path.suffix == ".safetensors":
            write_whole(target, lambda out: self._save_safetensors(_short(rows), out))
        else:
            write_whole(target, lambda out: self._save_torch(part, rows, path.stem, out))

    def save_tensor(self, name: str, window: Window, target: Path | Target) -> None:
        """Write one tensor as .safetensors, under its name, or as a file of torch.save, alone."""
        number, view = window
        if named(target).suffix == ".safetensors":
            write_whole(target, lambda out: self._save_safetensors([(name, number, view)], out))
            return
        data = self.window(window)
        shape, size = view.shape, len(data)
        leaf = Leaf(
            0, view.dtype, size // DTYPES[view.dtype].size, size, 0, shape, row_major(shape)
        )
        records = zip_records(dump_pickle(None, lambda *_: leaf), [_payload(data)], {})
        write_whole(target, lambda out: write_zip(out.write, named(target).stem, records))

    def export(
        self,
        target: Path | Target,
        part: str | None,
        progress: Callable[[int], None],
        *,
        force: bool = False,
    ) -> None:
        """Write what was committed, in the form that it was committed in, where that is what
        `target` says: a file of torch, of safetensors by its suffix, or a directory where there is
        no suffix of either; else, or with `part`, one part (`model`) as `save` does.

        Raises:
            NotFoundError: the commit does not have that part.
            ConflictError: the file has changed since the look; or, without `force`, a
                directory holds names that tools execute or trust.
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

    def _save_torch(
        self, part: str, rows: list[tuple[str, int, View]], stem: str, out: BinaryIO
    ) -> None:
        storages: dict[int, int] = {}

        def leaf_of(number: int, view: View) -> Leaf:
            size = 0 if number < 0 else self.schema.tensors[number].size_bytes
            storage = storages.setdefault(number, len(storages))
            elements = size // DTYPES[view.dtype].size
            return Leaf(storage, view.dtype, elements, size, view.offset, view.shape, view.stride)

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
                storages.clear()  # it holds more than plain values
        if pickled is None:
            views = {name: (number, view) for name, number, view in rows}

            def flat_leaf(value: object, _: str) -> Leaf | None:
                return leaf_of(*value) if isinstance(value, tuple) else None

            pickled = dump_pickle(views, flat_leaf)
        payloads = [
            Payload(
                0 if number < 0 else self.schema.tensors[number].size_bytes,
                lambda number=number: self._blocks(number),  # type: ignore[misc]
            )
            for number in storages
        ]
        write_zip(out.write, stem, zip_records(pickled, payloads, {}))

    def _save_safetensors(self, rows: list[tuple[str, int, View]], out: BinaryIO) -> None:
        """Write tensors as a safetensors file, block by block.

        The safetensors library needs all tensors in memory at once and writes to a path only.
        It also orders metadata differently on each run.
        """
        header: dict[str, Any] = {}
        at = 0
        for name, _number, view in rows:
            size = int(np.prod(view.shape, dtype=np.int64)) * DTYPES[view.dtype].size
            shape = list(view.shape)
            if view.dtype in _NOT_IN_SAFETENSORS or (view.dtype == "F4" and not shape):
                raise InvalidInputError(
                    f"safetensors cannot store {name} ({view.dtype} {shape})",
                    hint="use a file name that ends in .pt",
                )
            if view.dtype == "F4":  # two in a byte, which are counted there
                shape[-1] *= 2
            header[name] = {"dtype": view.dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        head = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
        head += b" " * (-len(head) % 8)
        out.write(len(head).to_bytes(8, "little") + head)
        for _, number, view in rows:
            info = self.schema.tensors[number]
            if (view.dtype, view.shape) == (info.dtype, info.shape):
                for block in self._blocks(number):
                    out.write(block)
            else:
                out.write(self.window((number, view)))

    def window(self, window: Window) -> bytes:
        """The elements of a window, row after row."""
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
    """Write a file, whole or not at all.

    Raises:
        ConflictError: the file has changed since the look, which comes first.
    """
    with looked(target) as at, at.file() as out:
        write(out)


def _short(rows: list[tuple[str, int, View]]) -> list[tuple[str, int, View]]:
    """Names without what all of them begin with: a file, and a key of the checkpoint's top."""
    for mark in (":", "."):
        tops = {name.partition(mark)[0] for name, _, _ in rows if mark in name}
        if len(tops) == 1 and all(mark in name for name, _, _ in rows):
            short = [(name.partition(mark)[2], number, view) for name, number, view in rows]
            if mark == ":" or next(iter(tops)) in PART_KEYS:
                rows = short
    return rows


def _possible(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape, if a tensor can have it: one without elements may be of any length otherwise."""
    if math.prod(length for length in shape if length) >= _MAX_ELEMENTS:
        raise InvalidInputError(
            f"{name} has an invalid shape: {list(shape)}",
            hint="use 'ckpt checkout' to restore the file",
        )
    return shape


def _payload(data: bytes) -> Payload:
    return Payload(len(data), lambda: iter([data]))
