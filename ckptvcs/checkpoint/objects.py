"""Live objects of torch -> a state and the names of its parameters.

An optimizer numbers its parameters; which weight a number means only the objects themselves know
for sure.  These names are used when roles are assigned, and are no part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptvcs.checkpoint.roles import Names
from ckptvcs.errors import InvalidInputError

MODEL, OPTIMIZER = "model", "optimizer"


def gather(
    model: Any, optimizer: Any, extra: Mapping[str, object] | None, file: str
) -> tuple[dict[str, object], Names]:
    """The state of a module and of an optimizer (or a row or a dict of them) under `model` and
    `optimizer`, with what is `extra` beside them; nothing is copied.  The names are for a state in
    `file`.

    Raises:
        InvalidInputError: something has no state, or `extra` has one of their keys.
    """
    state: dict[str, object] = {}
    names: Names = {}
    if model is not None:
        state[MODEL] = _state_of(model, MODEL)
        names[file, MODEL] = [[name for name, _ in _named_parameters(model)]]
    if isinstance(optimizer, Mapping):
        state[OPTIMIZER] = {name: _state_of(one, OPTIMIZER) for name, one in optimizer.items()}
        for name, one in optimizer.items():
            names[file, f"{OPTIMIZER}.{name}"] = parameter_names(model, one)
    elif optimizer is not None:
        row = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        states = [_state_of(one, OPTIMIZER) for one in row]
        state[OPTIMIZER] = states if row is optimizer else states[0]
        for number, one in enumerate(row):
            path = f"{OPTIMIZER}.{number}" if row is optimizer else OPTIMIZER
            names[file, path] = parameter_names(model, one)
    taken = state.keys() & (extra or {}).keys()
    if taken:
        raise InvalidInputError(
            f"'{min(taken)}' stands for the {min(taken)}, not for what is extra"
        )
    return state | dict(extra or {}), names


def parameter_names(model: Any, optimizer: Any) -> list[list[str | None]]:
    """For each group of an optimizer the names that a module has for its parameters."""
    weights = {id(weight): name for name, weight in reversed(_named_parameters(model))}
    groups = getattr(optimizer, "param_groups", [])
    return [[weights.get(id(weight)) for weight in group["params"]] for group in groups]


def _named_parameters(model: Any) -> list[tuple[str, Any]]:
    """The parameters of a module by all names that they have, the first one first."""
    if not hasattr(model, "named_parameters"):
        return []
    try:
        return list(model.named_parameters(remove_duplicate=False))
    except TypeError:  # something that is no module of torch, and has such a method
        return list(model.named_parameters())


def _state_of(holder: Any, what: str) -> object:
    if not hasattr(holder, "state_dict"):
        raise InvalidInputError(
            f"the {what} has no state_dict: {type(holder).__name__}",
            hint="give the object itself, or a dict of states as the first argument",
        )
    return holder.state_dict()
