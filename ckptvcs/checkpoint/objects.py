"""Live objects of torch -> a state and the names of its parameters, and back.

An optimizer numbers its parameters; which weight a number means only the objects themselves know
for sure.  These names are used when roles are assigned, and are no part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptvcs.checkpoint.roles import Names
from ckptvcs.errors import InvalidInputError, NotFoundError

MODEL, OPTIMIZER = "model", "optimizer"


def gather(
    model: Any, optimizer: Any, extra: Mapping[str, object] | None, file: str
) -> tuple[dict[str, object], Names]:
    """The state of a module and of an optimizer (or a row of them) under `model` and `optimizer`,
    with what is `extra` beside them; nothing is copied.  The names are for a state in `file`.

    Raises:
        InvalidInputError: something has no state, or `extra` has one of their keys.
    """
    state: dict[str, object] = {}
    names: Names = {}
    if model is not None:
        state[MODEL] = _state_of(model, MODEL)
    if optimizer is not None:
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
    named = getattr(model, "named_parameters", dict)
    weights = {id(weight): name for name, weight in dict(named()).items()}
    groups = getattr(optimizer, "param_groups", [])
    return [[weights.get(id(weight)) for weight in group["params"]] for group in groups]


def _state_of(holder: Any, what: str) -> object:
    if not hasattr(holder, "state_dict"):
        raise InvalidInputError(
            f"the {what} has no state_dict: {type(holder).__name__}",
            hint="give the object itself, or a dict of states as the first argument",
        )
    return holder.state_dict()


def scatter(state: Any, into: Any) -> None:
    """Load a state into the objects it came from: a module and an optimizer (or several of these),
    or objects with `load_state_dict` by their keys.

    Raises:
        NotFoundError: the state lacks what is to be loaded.
        InvalidInputError: it does not fit.
    """
    for path, holder in _holders(into):
        found = state
        for key in path:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                raise NotFoundError(f"the commit holds no '{path[0]}'") from None
        try:
            holder.load_state_dict(found)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(f"'{path[0]}' of the commit does not fit: {error}") from error


def _holders(into: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """What is to be loaded, each with the keys that lead to its state."""
    if isinstance(into, Mapping):
        return [((key,), holder) for key, holder in into.items()]
    row: Sequence[Any] = into if isinstance(into, list | tuple) else [into]
    modules = [one for one in row if hasattr(one, "named_parameters")]
    optimizers = [one for one in row if hasattr(one, "param_groups")]
    if len(modules) > 1 or len(modules) + len(optimizers) != len(row):
        raise InvalidInputError(
            "load into one module and its optimizers",
            hint="or into objects by key: into={'model': model, 'scheduler': scheduler}",
        )
    found: list[tuple[tuple[Any, ...], Any]] = [((MODEL,), module) for module in modules]
    if len(optimizers) == 1:
        return [*found, ((OPTIMIZER,), optimizers[0])]
    return found + [((OPTIMIZER, number), one) for number, one in enumerate(optimizers)]
