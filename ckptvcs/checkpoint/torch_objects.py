"""Live objects of torch -> a state, and a state -> these objects, all of them or none.

An optimizer numbers its parameters.  Only the objects know for sure which weight a number means, so
`gather` returns their names beside the state.  `scatter` works in three steps:

find     every state that is wanted, before anything is loaded
check    keys and shapes of modules and optimizers, which torch would notice half way, or never
load     each by its own `load_state_dict`; states of optimizers keep their types (`optimizers.py`)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptvcs.checkpoint.optimizers import keep_types
from ckptvcs.checkpoint.roles import FIRST, MOMENTS, Names
from ckptvcs.errors import InvalidInputError, NotFoundError

MODEL, OPTIMIZER = "model", "optimizer"
_WRAPPERS = {"_orig_mod.": "_orig_mod", "module.": "module"}
_FAILURES = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
_WHOLE = frozenset({*FIRST, "exp_avg_sq", "max_exp_avg_sq", "square_avg"})
"""Moments that have the shape of their parameter, in all optimizers but a few."""

_LINE = 300  # characters of what torch says


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


@dataclass(frozen=True, eq=False)
class _Load:
    """What is to be loaded, its state, and what it is called."""

    holder: Any
    state: Any
    name: str

    def refuse(self, why: object, hint: str | None = None) -> InvalidInputError:
        text = " ".join(str(why).split())[:_LINE]
        return InvalidInputError(f"'{self.name}' of the commit does not fit: {text}", hint=hint)


def scatter(state: Any, into: Any) -> None:
    """Load a state into the objects it came from: a module and its optimizers (or a dict of these),
    or objects with `load_state_dict`, or rows or dicts of such, by their keys.

    Raises:
        NotFoundError: the state lacks what is to be loaded.
        InvalidInputError: it does not fit.  No module or optimizer is changed then.
    """
    loads = [load for key, holder in _wanted(into) for load in _loads(state, key, holder)]
    checked = []
    for load in loads:
        if hasattr(load.holder, "param_groups"):
            _check_optimizer(load)
            checked.append(load)
        elif hasattr(load.holder, "named_parameters"):
            _check_module(load)
            checked.append(load)
    for load in [load for load in loads if load not in checked] + checked:
        try:
            with keep_types(load.holder):
                load.holder.load_state_dict(load.state)
        except _FAILURES as error:
            raise load.refuse(error) from error


def _wanted(into: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the objects to load, each with the key of its state."""
    if isinstance(into, Mapping):
        yield from into.items()
        return
    row = [inner for one in _row(into) for inner in _row(one)]
    modules, optimizers = _having(row, "named_parameters"), _having(row, "param_groups")
    dicts = [one for one in row if isinstance(one, Mapping)]
    others = len(row) - len(modules) - len(optimizers) - len(dicts)
    if len(modules) > 1 or others or (dicts and len(dicts) + len(optimizers) > 1):
        raise InvalidInputError(
            "load into one module and its optimizers",
            hint="or into objects by key: into={'model': model, 'scheduler': scheduler}",
        )
    if modules:
        yield MODEL, modules
    if optimizers or dicts:
        yield OPTIMIZER, optimizers or dicts[0]


def _having(row: list[Any], attribute: str) -> list[Any]:
    return [one for one in row if hasattr(one, attribute)]


def _row(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list | tuple) else [value]


def _loads(state: Any, key: Any, holder: Any, above: str = "") -> Iterator[_Load]:
    name = f"{above}{key}"
    if not isinstance(state, Mapping) or key not in state:
        raise NotFoundError(f"the commit holds no '{name}'")
    found = state[key]
    if isinstance(holder, Mapping):
        for below, one in holder.items():
            yield from _loads(found, below, one, f"{name}.")
        return
    row = _row(holder)
    states = found if isinstance(found, list) else [found]
    if len(states) != len(row):
        raise InvalidInputError(f"the commit holds {len(states)} of '{name}', not {len(row)}")
    for one, its in zip(row, states, strict=True):
        yield _Load(one, its, name)


def _check_module(load: _Load) -> None:
    """Try on a copy where names or shapes are not the same: a module may take older ones."""
    own, found = load.holder.state_dict(), load.state
    if isinstance(found, Mapping) and own.keys() == found.keys():
        shapes = ((getattr(own[k], "shape", None), getattr(found[k], "shape", None)) for k in own)
        if all(one == two for one, two in shapes):
            return
    try:
        copy.deepcopy(load.holder).load_state_dict(found)
    except _FAILURES as error:
        raise load.refuse(error, _hint(own, found)) from error


def _hint(own: Mapping[str, Any], found: Any) -> str | None:
    """What to do where the names differ by that of a wrapper alone."""
    names = {str(name) for name in found} if isinstance(found, Mapping) else set()
    for prefix, inner in _WRAPPERS.items():
        if {prefix + name for name in own} == names:
            return f"it was wrapped when it was committed: commit model.{inner}"
        if {prefix + name for name in names} == own.keys():
            return f"load into the module inside: model.{inner}"
    return None


def _check_optimizer(load: _Load) -> None:
    """The same groups, and no moments that are those of other parameters."""
    own = [group["params"] for group in load.holder.param_groups]
    try:
        groups = [group["params"] for group in load.state["param_groups"]]
        moments = {**load.state["state"]}
    except _FAILURES as error:
        raise load.refuse("it is no state of an optimizer") from error
    if [*map(len, own)] != [*map(len, groups)]:
        raise load.refuse(f"groups of {[*map(len, groups)]} parameters, not of {[*map(len, own)]}")
    weights = [tuple(weight.shape) for row in own for weight in row]
    kinds = _moments_by_key(weights, [number for row in groups for number in row], moments)
    if any(_is_in_place(row, len(moments)) for row in kinds.values()):
        return
    for name, row in kinds.items():
        moved = _moved(row, Counter(weights), whole=name in _WHOLE)
        if moved is not None:
            number, shape, weight = moved
            raise load.refuse(
                f"{name} {number} is {[*shape]}, its parameter {[*weight]}",
                "give the optimizer its parameters in the order that it had",
            )


_Moment = tuple[Any, tuple[int, ...], tuple[int, ...]]
"""The number of a parameter, the shape of a moment of it, and its own shape."""


def _moments_by_key(
    weights: list[tuple[int, ...]], numbers: list[Any], moments: Mapping[Any, Any]
) -> dict[str, list[_Moment]]:
    """Return the moments of an optimizer state by their keys, such as `exp_avg`."""
    kinds: dict[str, list[_Moment]] = {}
    for weight, number in zip(weights, numbers, strict=True):
        entry = moments.get(number)
        for name, moment in entry.items() if isinstance(entry, Mapping) else ():
            if name in MOMENTS and hasattr(moment, "shape"):
                kinds.setdefault(name, []).append((number, tuple(moment.shape), weight))
    return kinds


def _is_in_place(row: list[_Moment], count: int) -> bool:
    """Whether all of `count` parameters have a moment of a kind, each of its own shape, and these
    are not the same for all.
    """
    shapes = {shape for _, shape, _ in row}
    return len(row) == count and len(shapes) > 1 and all(one == two for _, one, two in row)


def _moved(row: list[_Moment], weights: Counter[tuple[int, ...]], *, whole: bool) -> _Moment | None:
    """The first moment that belongs to another parameter, if the parameters have another order.

    Factors and projections (Adafactor, SOAP, GaLore) have shapes of their own, which some other
    parameter may have by chance.  An order is wrong only where the moments of a kind have all the
    shapes of their parameters, each of another one; and, if it is a kind that mostly is `whole`,
    where parameters without any may be among those.
    """
    moved = next((one for one in row if one[1] != one[2]), None)
    theirs = Counter(shape for _, shape, _ in row)
    other = theirs - (weights if whole else Counter(weight for _, _, weight in row))
    return None if other else moved
