"""Assign tensors to processes: the same process writes a weight and its moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem


def item_bytes(item: WriteItem) -> int:
    """Return the size of a tensor or chunk in bytes; 0 for other values."""
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def keep_together(
    planned: Sequence[Sequence[WriteItem]], owned: Sequence[Iterable[MetadataIndex]]
) -> list[list[WriteItem]]:
    """Return the items that each process writes.

    The planner of torch assigns each item that several processes own to any of them.  A moment is
    encoded relative to its weight, so both must be in the same process.  The same state is always
    assigned in the same way, so that each process has the bases of its tensors in memory.

    Args:
        planned: The items that the planner assigned to each process.
        owned: The items that each process owns.
    """
    holders = _holders(owned)
    shared: list[list[WriteItem]] = [[] for _ in planned]
    keys = _keys({item.index.fqn for items in planned for item in items})
    groups: dict[str, list[tuple[int, WriteItem]]] = {}
    for rank, items in enumerate(planned):
        for item in items:
            if len(holders.get(item.index, ())) > 1:
                groups.setdefault(keys[item.index.fqn], []).append((rank, item))
            else:
                shared[rank].append(item)
    loads = [sum(map(item_bytes, items)) for items in shared]
    sizes = {key: sum(item_bytes(item) for _, item in group) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: (-sizes[key], key)):
        group = groups[key]
        able = set.intersection(*(holders[item.index] for _, item in group))
        if able:
            rank = min(able, key=lambda rank: (loads[rank], rank))
            shared[rank] += [item for _, item in group]
            loads[rank] += sizes[key]
        else:
            for rank, item in group:
                shared[rank].append(item)
                loads[rank] += item_bytes(item)
    return shared


def _holders(owned: Sequence[Iterable[MetadataIndex]]) -> dict[MetadataIndex, set[int]]:
    """Return the ranks that own each item."""
    holders: dict[MetadataIndex, set[int]] = {}
    for rank, indices in enumerate(owned):
        for index in indices:
            holders.setdefault(index, set()).add(rank)
    return holders


def _keys(names: set[str]) -> dict[str, str]:
    """Return the group of each name.

    `optim.state.0.weight.exp_avg` belongs to `model.0.weight`.  A name without a weight belongs to
    its container.
    """
    ends = {name.partition(".")[2] or name: name for name in sorted(names)}
    owners = {name: _owner(name, ends) for name in names}
    weights = set(owners.values())
    return {
        name: owner or (name if name in weights else name.rpartition(".")[0])
        for name, owner in owners.items()
    }


def _owner(name: str, ends: dict[str, str]) -> str | None:
    """Return the weight whose name without its first segment is inside a longer name."""
    steps = name.split(".")
    for length in range(len(steps) - 2, 0, -1):
        for start in range(1, len(steps) - length):
            weight = ends.get(".".join(steps[start : start + length]))
            if weight not in (None, name):
                return weight
    return None
