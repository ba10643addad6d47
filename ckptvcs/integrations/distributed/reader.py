"""CkptReader: load commits of CkptWriter with any number of processes."""

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
from ckptvcs.integrations.target import Where, open_once
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import quiet
from ckptvcs.store.ids import ObjectId

_BATCH_BYTES = 1 << 28  # decoded tensors in memory at a time
_MAX_DESCRIPTION = 1 << 28


class CkptReader(StorageReader):
    """Loads commits of `CkptWriter`; the number of processes may differ from that of the save.

    If you pass a `checkpoint_id` to `torch.distributed.checkpoint.load`, it replaces `revision`: it
    is a revision, or the name under which a commit was saved.
    """

    def __init__(self, repo: Where = ".", revision: str | int = "HEAD") -> None:
        """Create the reader.

        Args:
            repo: A repository, or the directory of one.
            revision: The commit to load.
        """
        self._where, self._revision = repo, str(revision)
        self._restorer: Restorer | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another load."""
        self._restorer = None
        if checkpoint_id is not None:
            self._revision = os.fspath(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the commit.

        Raises:
            NotFoundError: The commit does not exist.
            InvalidInputError: `CkptWriter` did not save the commit.
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
                hint="restore its files with 'ckpt checkout'",
            )
        content: list[bytes] = []
        self._restorer.write_file(files[DESCRIPTION], lambda b: content.append(bytes(b)), quiet)
        return load_metadata(b"".join(content))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Store the metadata of the coordinator."""
        if self._restorer is None:  # torch calls `read_metadata` on the coordinator only
            self.read_metadata()
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Decode the chunks of a plan, each once, and copy them into the tensors of the planner.

        Raises:
            CorruptionError: A chunk is missing, or does not decode to its recorded hash.
        """
        wanted: dict[int, list[tuple[ReadItem, Window]]] = {}
        named = windows(self._parts.schema)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                buffer = io.BytesIO()
                torch.save(self._value(item.storage_index.fqn), buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)  # unpickles only the bytes that were saved above
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
        """Yield the bytes of tensors, decoded in batches of about `_BATCH_BYTES`."""
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
        """Return the position of the chunk that an item is read from."""
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
        """Return a value that is not a tensor, from the file of the process that wrote it."""
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
        """Accept any name."""
        return True


_MISSING = object()


def _inside(node: Any, step: str | int) -> Any:
    """Return an entry of a container, or `_MISSING`.

    A list is a dict here if several processes wrote its entries.
    """
    if isinstance(node, list) and type(step) is int and 0 <= step < len(node):
        return node[step]
    return node.get(step, _MISSING) if isinstance(node, dict) else _MISSING


def _find(repo: Repository, revision: str) -> ObjectId:
    """Return the commit of a revision, or the newest one that was saved under that name."""
    try:
        return repo.resolve(revision)
    except NotFoundError:
        name = PurePosixPath(revision).name
        head = repo.revisions.head()
        for commit_id, commit in [*repo.catalog.line(head), *repo.revisions.visible().items()]:
            if commit.path == name:
                return commit_id
        raise


def load_state(repo: Where = ".", revision: str | int = "HEAD") -> dict[str, Any]:
    """Return the whole state of a commit of `CkptWriter` in one process.

    Args:
        repo: A repository, or the directory of one.
        revision: The commit to load.

    Raises:
        NotFoundError: The commit does not exist.
        InvalidInputError: `CkptWriter` did not save the commit.
        CorruptionError: A tensor does not decode to its recorded hash.
    """
    reader = CkptReader(repo, revision)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return state
