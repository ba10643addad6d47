"""Who writes what, of what several processes have: a weight and its moments stay together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem


def item_bytes(item: WriteItem) -> int:
    """The bytes of a tensor, or of a part of one; 0 for values."""
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def keep_together(
    planned: Sequence[Sequence[WriteItem]], owned: Sequence[Iterable[MetadataIndex]]
) -> list[list[WriteItem]]:
    """The items of each process, by what a planner has `planned` and what each process has.

    A planner gives what several processes have to any one of them, each item by itself; a moment
    is coded by what it says of its weight.  The same state is always shared out the same way, so
    that each process has the base of its tensors in memory.
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
    """Return the ranks that have each item."""
    holders: dict[MetadataIndex, set[int]] = {}
    for rank, indices in enumerate(owned):
        for index in indices:
            holders.setdefault(index, set()).add(rank)
    return holders


def _keys(names: set[str]) -> dict[str, str]:
    """For each name what it belongs to: `optim.state.0.weight.exp_avg` to `model.0.weight`, what
    has no weight to what it stands in.
    """
    ends = {name.partition(".")[2] or name: name for name in sorted(names)}
    owners = {name: _owner(name, ends) for name in names}
    weights = set(owners.values())
    return {
        name: owner or (name if name in weights else name.rpartition(".")[0])
        for name, owner in owners.items()
    }


def _owner(name: str, ends: dict[str, str]) -> str | None:
    """The weight whose name, without its first step, stands inside a longer name."""
    steps = name.split(".")
    for length in range(len(steps) - 2, 0, -1):
        for start in range(1, len(steps) - length):
            found = ends.get(".".join(steps[start : start + length]))
            if found not in (None, name):
                return found
    return None
