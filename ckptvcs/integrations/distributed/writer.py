"""CkptWriter: what `torch.distributed.checkpoint` saves becomes a commit.

plan    the coordinator begins the commit, and gives each process a ticket
write   each process makes a checkpoint of its items, and codes it
finish  the coordinator joins the shards: the only commit point
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
from ckptvcs.integrations.distributed.process import open_once
from ckptvcs.integrations.target import Where
from ckptvcs.ops.join import DistributedCommit, encode_share
from ckptvcs.repo import Repo

_GROUPS = "param_groups"

_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    np.empty(0).__reduce__()[0],
    codecs.encode,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
]
"""What a pickle of numpy's arrays calls."""


class CkptWriter(StorageWriter):
    """Commits what `torch.distributed.checkpoint.save` or `async_save` saves.

    May be used for many saves, each named by its `checkpoint_id`, from which (`step-2000`) the step
    is taken too.  On the coordinator `entry` is the last commit, as the log has it.
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
        """`repo` is a repository, or where one is to be opened, or made if there is none."""
        self._where = repo
        self._said: dict[str, Any] = {
            "step": step,
            "message": message,
            "metrics": dict(metrics or {}),
            "codec": codec,
            "branch": branch,
        }
        self._name = "checkpoint"
        self._joint: DistributedCommit | None = None
        self.entry: LogEntry | None = None

    def __getstate__(self) -> dict[str, Any]:
        where = self._where.root if isinstance(self._where, Repo) else self._where
        return {**self.__dict__, "_where": where, "_joint": None, "entry": None}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save."""
        self._give_up()
        if checkpoint_id is not None:
            self._name = PurePosixPath(os.fspath(checkpoint_id)).name or "checkpoint"

    def _give_up(self) -> None:
        if self._joint is not None:  # another process failed, and this one was not told
            self._joint.abandon()
        self._joint = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises InvalidInputError: all processes are to save without talking to each other."""
        if not kwargs.get("use_collectives", True):
            raise InvalidInputError("a commit of several processes needs use_collectives=True")
        if is_coordinator:
            open_once(self._where, make=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """What this process has, which may be more than it is to write."""
        return dataclasses.replace(plan, storage_data=[item.index for item in plan.items])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the commit; the moments of a weight go to the process that has the weight.

        Raises:
            BusyError: gc sweeps, and does not come to an end.
            InvalidInputError: plans are kept from save to save.
        """
        if not all(plan.usable for plan in plans):
            raise InvalidInputError("a commit needs a plan of its own: enable_plan_caching=False")
        said = {**self._said, "message": self._said["message"] or self._name}
        if said["step"] is None:
            said["step"] = step_in_name(self._name)  # rather than what the state says
        self._joint = DistributedCommit(open_once(self._where, make=True), self._name, **said)
        ticket = self._joint.begin()
        given = keep_together([plan.items for plan in plans], [plan.storage_data for plan in plans])
        return [
            dataclasses.replace(plan, items=items, storage_data=ticket)
            for plan, items in zip(plans, given, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Code the shards of this process: durable when this returns."""
        done: Future[list[WriteResult]] = Future()
        results: list[WriteResult] = []
        if plan.items:
            try:
                checkpoint = _Part(planner).checkpoint(plan.items)
                shard = encode_share(open_once(self._where), plan.storage_data, checkpoint)
            except BaseException:
                self._give_up()
                raise
            results = [WriteResult(item.index, item_bytes(item), None) for item in plan.items]
            results[0] = dataclasses.replace(results[0], storage_data=shard)
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the commit: before this nothing is in the history."""
        assert self._joint is not None
        shards: dict[str, Shard] = {
            f"rank-{rank}.pt": row[0].storage_data for rank, row in enumerate(results) if row
        }
        try:
            self.entry = self._joint.finish(shards, {DESCRIPTION: dump_metadata(metadata)})
        finally:
            self._give_up()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any name will do."""
        return True


class _Part:
    """What one process has of a state, as a checkpoint of its own."""

    def __init__(self, planner: SavePlanner) -> None:
        self._planner = planner
        self._paths = getattr(planner, "mappings", None) or {}
        self._tree: dict[str | int, Any] = {}

    def checkpoint(self, items: Sequence[WriteItem]) -> Checkpoint:
        """A state of the tensors and values of a plan, tensors named as `chunk_name` does.

        Raises:
            InvalidInputError: it holds what is neither a tensor nor a plain value.
        """
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
        made = state_checkpoint(_with_lists(self._tree))
        known = {}
        for info in made.schema.tensors:
            views = tuple(
                dataclasses.replace(view, name=names.get(view.name, view.name))
                for view in info.views
            )
            known[info.name] = dataclasses.replace(
                info, name=names.get(info.name, info.name), views=views
            )
        schema = Schema(tuple(known[info.name] for info in made.schema.tensors))
        missing = names.values() - windows(schema).keys()
        if missing:
            raise InvalidInputError(f"the state has names that are too long: {min(missing)[:80]}")
        return dataclasses.replace(made, schema=schema)

    def _put_groups(self) -> None:
        """What an optimizer says of its parameters tells moments from weights: each process has it,
        though one alone is asked to write it.
        """
        for name, value in getattr(self._planner, "state_dict", {}).items():
            if _GROUPS in self._paths.get(name, ()) and not isinstance(value, torch.Tensor):
                self._put(name, value)

    def _put(self, name: str, value: object, full: str = "") -> str:
        """Put something in its place: what a tensor there is called."""
        path = self._paths.get(name)
        steps = [*path] if path and is_path(path) else [name]
        node = self._tree
        for step in steps[:-1]:
            node = node.setdefault(step, {})
        last = steps[-1] if steps[-1] not in node or not full else full  # a second chunk of it
        node[last] = value
        return ".".join(map(str, [*steps[:-1], last]))


def _with_lists(node: Any) -> Any:
    """The same state, with lists where a list was taken apart and all of it is here."""
    if type(node) is not dict:
        return node
    inner = {key: _with_lists(value) for key, value in node.items()}
    numbered = bool(inner) and {*inner} == {*range(len(inner))}
    return [inner[number] for number in range(len(inner))] if numbered else inner


def _plain(name: str, data: io.BytesIO) -> object:
    """A value that a planner has written, without running what it may say."""
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(io.BytesIO(data.getbuffer()), weights_only=True)
    except Exception as error:
        raise InvalidInputError(
            f"the state holds what is neither a tensor nor a plain value at {name}",
            hint="a state holds None, bool, int, float, str, bytes, list, tuple, dict, tensors and "
            "numpy arrays",
        ) from error


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage that holds nothing else; a copy only where it has to be."""
    tensor = tensor.detach()
    size = tensor.numel() * tensor.element_size()
    if type(tensor) is torch.Tensor and tensor.is_contiguous():
        if tensor.untyped_storage().nbytes() == size:
            return tensor
        if tensor.device.type == "cpu" and size:
            flat = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
            return flat.view(tensor.dtype).view(tensor.shape)
    return tensor.clone(memory_format=torch.contiguous_format).as_subclass(torch.Tensor)
