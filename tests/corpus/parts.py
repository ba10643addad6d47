"""A training state by the names of its weights, from which other layouts are made, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.corpus.training import State, Training

Tensor = torch.Tensor
ByName = dict[str, Tensor]


@dataclass
class Parts:
    """Weights by name; tensors of the optimizer by key and name of their weight; what else it has
    for each weight (numbers, small or large); its groups, with names for weights.
    """

    weights: ByName
    states: dict[str, ByName]
    rest: dict[str, State]
    groups: list[State]

    def of_group(self, number: int) -> dict[str, ByName]:
        """The tensors of one group, by key."""
        names = self.groups[number]["params"]
        found = {
            key: {name: by_name[name] for name in names if name in by_name}
            for key, by_name in self.states.items()
        }
        return {key: by_name for key, by_name in found.items() if by_name}


def _names(training: Training) -> list[str]:
    known = {id(weight): name for name, weight in training.model.named_parameters()}
    return [known[id(p)] for group in training.optimizer.param_groups for p in group["params"]]


def take(training: Training, *, any_shape: bool = False) -> Parts:
    """The parts of a state: tensors in `states` have the shapes of their weights, or any."""
    names, saved = _names(training), training.optimizer.state_dict()
    weights = training.model.state_dict()
    states: dict[str, ByName] = {}
    rest: dict[str, State] = {}
    for index, own in saved["state"].items():
        name = names[index]
        rest[name] = {}
        for key, value in own.items():
            tensor = isinstance(value, Tensor) and value.numel() > 1
            if tensor and (any_shape or value.shape == weights[name].shape):
                states.setdefault(key, {})[name] = value
            else:
                assert not tensor, f"{key} of {name} is not of its shape"
                rest[name][key] = value
    groups = [
        {**group, "params": [names[index] for index in group["params"]]}
        for group in saved["param_groups"]
    ]
    return Parts(dict(weights), states, rest, groups)


def put(training: Training, parts: Parts) -> None:
    """Load parts."""
    names = _names(training)
    training.model.load_state_dict(parts.weights)
    state = {
        index: {
            **parts.rest.get(name, {}),
            **{key: by_name[name] for key, by_name in parts.states.items() if name in by_name},
        }
        for index, name in enumerate(names)
    }
    groups = [
        {**group, "params": [names.index(name) for name in group["params"]]}
        for group in parts.groups
    ]
    training.optimizer.load_state_dict(
        {"state": {index: own for index, own in state.items() if own}, "param_groups": groups}
    )


def join(tensors: list[Tensor], align: int = 1) -> Tensor:
    """One flat tensor, filled up with zeros."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return torch.cat([flat, flat.new_zeros(-len(flat) % align)])


def cut(flat: Tensor, names: list[str], weights: ByName) -> ByName:
    """The tensors of the shapes of weights that were joined."""
    found, at = {}, 0
    for name in names:
        size = weights[name].numel()
        found[name] = flat[at : at + size].view(weights[name].shape)
        at += size
    return found


def shares(flat: Tensor, ranks: int) -> list[Tensor]:
    """Equal parts, with a storage of their own."""
    return [part.clone() for part in flat.view(ranks, -1)]


def ranges(
    names: list[str], weights: ByName, rank: int, size: int
) -> Iterator[tuple[str, int, int]]:
    """Which weights the share of a rank has: name, first element in the share, elements."""
    at = -rank * size
    for name in names:
        words = math.prod(weights[name].shape)
        start, stop = max(at, 0), min(at + words, size)
        if start < stop:
            yield name, start, stop - start
        at += words
