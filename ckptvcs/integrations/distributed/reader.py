"""CkptReader: commits of CkptWriter, for as many processes as there are."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptvcs.checkpoint.state import fill, make_tensor
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.decode.part_reader import PartReader, Window, windows
from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.integrations.distributed.chunks import DESCRIPTION, chunk_name, load_metadata
from ckptvcs.integrations.distributed.process import open_once
from ckptvcs.integrations.target import Where
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import quiet
from ckptvcs.store.ids import ObjectId

_BATCH_BYTES = 1 << 28  # decoded at a time
_MAX_DESCRIPTION = 1 << 28


class CkptReader(StorageReader):
    """Loads commits of `CkptWriter`, by as many processes as there are, wherever these made it.

    `revision` says which; a `checkpoint_id` that is given to `load` is a revision, too, or the name
    that a commit was saved under.
    """

    def __init__(self, repo: Where = ".", revision: str | int = "HEAD") -> None:
        self._where, self._revision = repo, str(revision)
        self._restorer: Restorer | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin to load."""
        self._restorer = None
        if checkpoint_id is not None:
            self._revision = os.fspath(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What a commit holds.

        Raises:
            NotFoundError: there is no such commit.
            InvalidInputError: it is none of `CkptWriter`.
        """
        repo = open_once(self._where)
        self._restorer = repo.restorer(_find(repo, self._revision))
        self._parts = PartReader(self._restorer)
        self._layouts = [
            self._restorer.layout(file)
            for file in self._restorer.commit.files
            if file.format == "torch-zip"
        ]
        files = {file.path: file for file in self._restorer.commit.files}
        if DESCRIPTION not in files or files[DESCRIPTION].size > _MAX_DESCRIPTION:
            raise InvalidInputError(
                f"'{self._revision}' was not saved by CkptWriter",
                hint="'ckpt checkout' gives its files back",
            )
        content: list[bytes] = []
        self._restorer.write_file(files[DESCRIPTION], lambda b: content.append(bytes(b)), quiet)
        return load_metadata(b"".join(content))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Learn where the chunks are."""
        if self._restorer is None:  # only the coordinator was asked for metadata
            self.read_metadata()
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Decode what this process needs, each chunk once.

        Raises:
            CorruptionError: it does not decode to its recorded hashes, or is not what it is said
                to be.
        """
        wanted: dict[int, list[tuple[ReadItem, Window]]] = {}
        named = windows(self._parts.schema)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                buffer = io.BytesIO()
                torch.save(self._value(item.storage_index.fqn), buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)  # which unpickles what was just made here
            elif 0 not in item.lengths:
                window = self._window(named, item)
                wanted.setdefault(window[0], []).append((item, window))
        for number, data in self._decoded(list(wanted)):
            for item, (_, view) in wanted[number]:
                source = make_tensor(data, view, array=False)
                for axis, (at, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    source = source.narrow(axis, at, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(source)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _decoded(self, numbers: list[int]) -> Iterator[tuple[int, Any]]:
        """The bytes of tensors, some of them at a time in memory."""
        assert self._restorer is not None
        infos = self._parts.schema.tensors
        batch: list[int] = []
        for number in numbers:
            if infos[number].inline:
                yield number, self._parts.raw(number)
                continue
            batch.append(number)
            if sum(infos[n].size_bytes for n in batch) >= _BATCH_BYTES:
                yield from self._restorer.tensors(batch)
                batch = []
        yield from self._restorer.tensors(batch)

    def _window(self, named: Mapping[str, Window], item: ReadItem) -> Window:
        """Where the chunk is that an item is read from."""
        index = item.storage_index
        entry = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        chunks = [c for c in entry.chunks if index.offset is None or c.offsets == index.offset]
        for chunk in chunks[:1]:
            window = named.get(chunk_name(index.fqn, chunk.offsets, chunk.sizes, entry.size))
            if window is not None and window[1].shape == tuple(chunk.sizes):
                return window
        raise CorruptionError(f"the commit lacks a part of {index.fqn}")

    def _value(self, name: str) -> object:
        """A plain value, from whichever process wrote it."""
        path = (self._metadata.planner_data or {}).get(name, (name,))
        for layout, numbers in self._layouts:
            node: Any = layout.tree
            for step in path:
                node = _inside(node, step)
            if node is not _MISSING:
                below = ".".join(map(str, path))
                arrays = frozenset(
                    array.removeprefix(below).removeprefix(".")
                    for array in layout.arrays
                    if f"{array}.".startswith(f"{below}.")
                )
                by_key = {f.key: n for f, n in zip(layout.tensors, numbers, strict=True)}
                return fill(node, lambda ref: self._parts.raw(by_key[ref.storage.key]), arrays)  # noqa: B023
        raise CorruptionError(f"the commit lacks {name}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any name will do."""
        return True


_MISSING = object()


def _inside(node: Any, step: str | int) -> Any:
    """What a container has in a place; lists are dicts where other processes have some of it."""
    if isinstance(node, list) and type(step) is int and 0 <= step < len(node):
        return node[step]
    return node.get(step, _MISSING) if isinstance(node, dict) else _MISSING


def _find(repo: Repository, revision: str) -> ObjectId:
    """The commit that a revision names, or the newest one that was saved under a name."""
    try:
        return repo.resolve(revision)
    except NotFoundError:
        name = PurePosixPath(revision).name
        head = repo.revisions.head()
        for found, commit in [*repo.catalog.line(head), *repo.revisions.visible().items()]:
            if commit.path == name:
                return found
        raise


def load_state(repo: Where = ".", revision: str | int = "HEAD") -> dict[str, Any]:
    """The whole state of a commit of `CkptWriter`, in one process, however many made it.

    Raises:
        NotFoundError: there is no such commit.
        InvalidInputError: it is none of `CkptWriter`.
        CorruptionError: it does not decode to its recorded hashes.
    """
    reader = CkptReader(repo, revision)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return state
