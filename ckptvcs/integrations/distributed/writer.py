"""CkptWriter: commit the states that `torch.distributed.checkpoint` saves.

plan      the coordinator begins the commit, and sends each process a plan
write     each process encodes its items as a shard
finish    the coordinator joins the shards: the only commit point
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptvcs.checkpoint.conventions import step_in_name
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.decode.part_reader import windows
from ckptvcs.encode.shards import Shard
from ckptvcs.errors import InvalidInputError
from ckptvcs.history.log import LogEntry
from ckptvcs.history.schema import Schema
from ckptvcs.integrations.distributed.balance import item_bytes, keep_together
from ckptvcs.integrations.distributed.chunks import DESCRIPTION, chunk_name, dump_metadata, is_path
from ckptvcs.integrations.target import Where, open_once
from ckptvcs.ops.join import DistributedCommit, encode_share
from ckptvcs.ops.request import Request
from ckptvcs.repo import Repo

_GROUPS = "param_groups"

_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    np.empty(0).__reduce__()[0],
    codecs.encode,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
]
"""The functions and types in pickles of numpy arrays."""


class CkptWriter(StorageWriter):
    """Commits each `torch.distributed.checkpoint.save` or `async_save`.

    One writer can be used for many saves.  The `checkpoint_id` of a save, such as `step-2000`,
    names the commit.

    Attributes:
        entry: The log entry of the last commit; set on the coordinator only.
    """

    def __init__(
        self,
        repo: Where = ".",
        *,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
        branch: str | None = None,
    ) -> None:
        """Create the writer.

        Args:
            repo: A repository, or the directory of one; it is created if it does not exist.
            step: The training step; None reads it from the `checkpoint_id`, otherwise from the
                state.
            message: The message of the commit; by default the `checkpoint_id`.
            metrics: Metrics by name.
            codec: The codec for the commits; None uses the setting `codec`.
            branch: The branch to commit to; None uses the branch of HEAD.
        """
        self._where = repo
        self._request = Request(message, step, metrics or {}, codec, branch)
        self._name = "checkpoint"
        self._commit: DistributedCommit | None = None
        self.entry: LogEntry | None = None

    def __getstate__(self) -> dict[str, Any]:
        where = self._where.root if isinstance(self._where, Repo) else self._where
        return {**self.__dict__, "_where": where, "_commit": None, "entry": None}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another save."""
        self._abandon()
        if checkpoint_id is not None:
            self._name = PurePosixPath(os.fspath(checkpoint_id)).name or "checkpoint"

    def _abandon(self) -> None:
        if self._commit is not None:  # another process may have failed without a message
            self._commit.abandon()
        self._commit = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the coordinator.

        Raises:
            InvalidInputError: The save has `use_collectives=False`.
        """
        if not kwargs.get("use_collectives", True):
            raise InvalidInputError("CkptWriter requires use_collectives=True")
        if is_coordinator:
            open_once(self._where, make=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Add the items that this process owns, which may be more than it will write."""
        return dataclasses.replace(plan, storage_data=[item.index for item in plan.items])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the commit, and assign the moments of a weight to the process of the weight.

        Raises:
            BusyError: gc is sweeping and does not finish.
            InvalidInputError: The planner caches plans between saves.
        """
        if not all(plan.usable for plan in plans):
            raise InvalidInputError("CkptWriter requires enable_plan_caching=False")
        request = dataclasses.replace(self._request, path=self._name)
        request.message = request.message or self._name
        if request.step is None:
            request.step = step_in_name(self._name)
        self._commit = DistributedCommit(open_once(self._where, make=True), request)
        shard_plan = self._commit.begin()
        rows = keep_together([plan.items for plan in plans], [plan.storage_data for plan in plans])
        return [
            dataclasses.replace(plan, items=items, storage_data=shard_plan)
            for plan, items in zip(plans, rows, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Encode the shard of this process; it is durable when this method returns."""
        done: Future[list[WriteResult]] = Future()
        results: list[WriteResult] = []
        if plan.items:
            try:
                checkpoint = _Part(planner).checkpoint(plan.items)
                shard = encode_share(open_once(self._where), plan.storage_data, checkpoint)
            except BaseException:
                self._abandon()
                raise
            results = [WriteResult(item.index, item_bytes(item), None) for item in plan.items]
            results[0] = dataclasses.replace(results[0], storage_data=shard)
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the commit; before this the history is unchanged."""
        assert self._commit is not None
        shards: dict[str, Shard] = {
            f"rank-{rank}.pt": row[0].storage_data for rank, row in enumerate(results) if row
        }
        try:
            self.entry = self._commit.finish(shards, {DESCRIPTION: dump_metadata(metadata)})
        finally:
            self._abandon()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any name."""
        return True


class _Part:
    """The part of a state that one process writes, as a checkpoint."""

    def __init__(self, planner: SavePlanner) -> None:
        self._planner = planner
        self._paths = getattr(planner, "mappings", None) or {}
        self._tree: dict[str | int, Any] = {}

    def checkpoint(self, items: Sequence[WriteItem]) -> Checkpoint:
        """Return the tensors and values of a plan; tensors are named by `chunk_name`."""
        names: dict[str, str] = {}
        for item in items:
            data = self._planner.resolve_data(item)
            name = item.index.fqn
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                self._put(name, _plain(name, data))
                continue
            assert isinstance(data, torch.Tensor)
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            full = chunk_name(name, chunk.offsets, chunk.sizes, item.tensor_data.size)
            names[self._put(name, _compact(data), full)] = full
        self._put_groups()
        checkpoint = state_checkpoint(_with_lists(self._tree))
        renamed = {}
        for info in checkpoint.schema.tensors:
            views = tuple(
                dataclasses.replace(view, name=names.get(view.name, view.name))
                for view in info.views
            )
            renamed[info.name] = dataclasses.replace(
                info, name=names.get(info.name, info.name), views=views
            )
        schema = Schema(tuple(renamed[info.name] for info in checkpoint.schema.tensors))
        missing = names.values() - windows(schema).keys()
        if missing:
            raise InvalidInputError(f"the state has names that are too long: {min(missing)[:80]}")
        return dataclasses.replace(checkpoint, schema=schema)

    def _put_groups(self) -> None:
        """Add the parameter groups of the optimizers, by which moments are recognized.

        Every process has them, but the planner assigns them to one process.
        """
        for name, value in getattr(self._planner, "state_dict", {}).items():
            if _GROUPS in self._paths.get(name, ()) and not isinstance(value, torch.Tensor):
                self._put(name, value)

    def _put(self, name: str, value: object, full: str = "") -> str:
        """Insert a value at its path, and return the name of a tensor there."""
        path = self._paths.get(name)
        steps = [*path] if path and is_path(path) else [name]
        node = self._tree
        for step in steps[:-1]:
            node = node.setdefault(step, {})
        last = steps[-1] if steps[-1] not in node or not full else full  # another chunk has it
        node[last] = value
        return ".".join(map(str, [*steps[:-1], last]))


def _with_lists(node: Any) -> Any:
    """Return the state with each dict of the keys 0 ... N-1 as the list that the planner split."""
    if type(node) is not dict:
        return node
    inner = {key: _with_lists(value) for key, value in node.items()}
    numbered = bool(inner) and {*inner} == {*range(len(inner))}
    return [inner[number] for number in range(len(inner))] if numbered else inner


def _plain(name: str, data: io.BytesIO) -> object:
    """Load a value that a planner pickled, without running code of the pickle."""
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(io.BytesIO(data.getbuffer()), weights_only=True)
    except Exception as error:
        raise InvalidInputError(
            f"the value at {name} has an unsupported type",
            hint="use None, bool, int, float, str, bytes, list, tuple, dict, tensors and numpy "
            "arrays only",
        ) from error


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with a storage of its exact size; copies only if necessary."""
    tensor = tensor.detach()
    size = tensor.numel() * tensor.element_size()
    if type(tensor) is torch.Tensor and tensor.is_contiguous():
        if tensor.untyped_storage().nbytes() == size:
            return tensor
        if tensor.device.type == "cpu" and size:
            flat = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
            return flat.view(tensor.dtype).view(tensor.shape)
    return tensor.clone(memory_format=torch.contiguous_format).as_subclass(torch.Tensor)
