"""Save the states of torch objects, and load a state into all of them or none.

An optimizer's state dict numbers its parameters.  Only the objects say for sure which parameter has
which number, so `gather` also returns parameter names.  `scatter` works in three steps:

find     all states, before it loads any
check    keys and shapes of modules and optimizers, which torch checks too late or never
load     each object by its `load_state_dict`; optimizer states keep their dtypes (`optimizers.py`)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptvcs.checkpoint.optimizer_state import FIRST, MOMENTS, Names
from ckptvcs.checkpoint.optimizers import keep_types
from ckptvcs.errors import InvalidInputError, NotFoundError

MODEL, OPTIMIZER, STEP = "model", "optimizer", "step"
_WRAPPERS = {"_orig_mod.": "_orig_mod", "module.": "module"}
_FAILURES = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
_WHOLE = frozenset({*FIRST, "exp_avg_sq", "max_exp_avg_sq", "square_avg"})
"""Moments that have the shape of their parameter in almost all optimizers."""

_MAX_REASON = 300  # characters of an error of torch


def gather(
    model: Any,
    optimizer: Any,
    extra: Mapping[str, object] | None,
    file: str,
    step: int | None = None,
) -> tuple[dict[str, object], Names]:
    """Return the states of a module and its optimizers, without a copy, and the parameter names.

    Args:
        model: module, or None
        optimizer: optimizer, list or dict of optimizers, or None
        extra: other values to add to the state
        file: path of the state's file, for the keys of the names
        step: training step, which the state gets unless `extra` has one

    Raises:
        InvalidInputError: an object has no `state_dict`, or `extra` has the key of an object.
    """
    state: dict[str, object] = {}
    names: Names = {}
    if model is not None:
        state[MODEL] = _state_of(model, MODEL)
        names[file, MODEL] = [[name for name, _ in _named_parameters(model)]]
    if isinstance(optimizer, Mapping):
        state[OPTIMIZER] = {key: _state_of(inner, OPTIMIZER) for key, inner in optimizer.items()}
    elif isinstance(optimizer, list | tuple):
        state[OPTIMIZER] = [_state_of(inner, OPTIMIZER) for inner in optimizer]
        optimizer = dict(enumerate(optimizer))
    elif optimizer is not None:
        state[OPTIMIZER] = _state_of(optimizer, OPTIMIZER)
        names[file, OPTIMIZER] = parameter_names(model, optimizer)
    if isinstance(optimizer, Mapping):
        for key, inner in optimizer.items():
            names[file, f"{OPTIMIZER}.{key}"] = parameter_names(model, inner)
    taken = state.keys() & (extra or {}).keys()
    if taken:
        raise InvalidInputError(f"key '{min(taken)}' in `extra` is reserved for the {min(taken)}")
    if step is not None:
        state[STEP] = step
    return state | dict(extra or {}), names


def parameter_names(model: Any, optimizer: Any) -> list[list[str | None]]:
    """Return the names of an optimizer's parameters in a module, a list for each group."""
    weights = {id(weight): name for name, weight in reversed(_named_parameters(model))}
    groups = getattr(optimizer, "param_groups", [])
    return [[weights.get(id(weight)) for weight in group["params"]] for group in groups]


def _named_parameters(model: Any) -> list[tuple[str, Any]]:
    """Return the parameters of a module; a shared one appears under each of its names."""
    if not hasattr(model, "named_parameters"):
        return []
    try:
        return list(model.named_parameters(remove_duplicate=False))
    except TypeError:  # the object is not a torch module, but has such a method
        return list(model.named_parameters())


def _state_of(holder: Any, what: str) -> object:
    if not hasattr(holder, "state_dict"):
        raise InvalidInputError(
            f"the {what} has no state_dict: {type(holder).__name__}",
            hint="pass the object itself, or a dict of states as the first argument",
        )
    return holder.state_dict()


@dataclass(frozen=True, eq=False)
class _Load:
    """An object to load, its state, and the dotted key of the state."""

    holder: Any
    state: Any
    name: str

    def refuse(self, why: object, hint: str | None = None) -> InvalidInputError:
        text = " ".join(str(why).split())[:_MAX_REASON]
        return InvalidInputError(f"'{self.name}' of the commit does not fit: {text}", hint=hint)


def scatter(state: Any, into: Any) -> None:
    """Load a state into its objects.

    `into` is a module and its optimizers (or a dict of optimizers); or a dict whose values are
    objects with `load_state_dict`, or lists or dicts of such objects.

    Raises:
        NotFoundError: the state has no entry for an object.
        InvalidInputError: an entry does not fit.  No module or optimizer is changed.
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
    row = [holder for value in _row(into) for holder in _row(value)]
    modules, optimizers = _having(row, "named_parameters"), _having(row, "param_groups")
    dicts = [holder for holder in row if isinstance(holder, Mapping)]
    others = len(row) - len(modules) - len(optimizers) - len(dicts)
    if len(modules) > 1 or others or (dicts and len(dicts) + len(optimizers) > 1):
        raise InvalidInputError(
            "cannot match these objects: `into` takes one module and its optimizers",
            hint="pass other objects by key: into={'model': model, 'scheduler': scheduler}",
        )
    if modules:
        yield MODEL, modules
    if optimizers or dicts:
        yield OPTIMIZER, optimizers or dicts[0]


def _having(row: list[Any], attribute: str) -> list[Any]:
    return [holder for holder in row if hasattr(holder, attribute)]


def _row(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list | tuple) else [value]


def _loads(state: Any, key: Any, holder: Any, above: str = "") -> Iterator[_Load]:
    name = f"{above}{key}"
    if not isinstance(state, Mapping) or key not in state:
        raise NotFoundError(f"the commit has no '{name}'")
    entry = state[key]
    if isinstance(holder, Mapping):
        for below, inner in holder.items():
            yield from _loads(entry, below, inner, f"{name}.")
        return
    holders = _row(holder)
    states = entry if isinstance(entry, list) else [entry]
    if len(states) != len(holders):
        raise InvalidInputError(
            f"'{name}' of the commit does not fit: states: {len(states)}, not {len(holders)}"
        )
    for inner, its_state in zip(holders, states, strict=True):
        yield _Load(inner, its_state, name)


def _check_module(load: _Load) -> None:
    """Check names and shapes; if they differ, try a copy, since modules can accept old states."""
    current, saved = load.holder.state_dict(), load.state
    if isinstance(saved, Mapping) and current.keys() == saved.keys():
        pairs = ((current[name], saved[name]) for name in current)
        if all(getattr(a, "shape", None) == getattr(b, "shape", None) for a, b in pairs):
            return
    try:
        copy.deepcopy(load.holder).load_state_dict(saved)
    except _FAILURES as error:
        raise load.refuse(error, _wrapper_hint(current, saved)) from error


def _wrapper_hint(current: Mapping[str, Any], saved: Any) -> str | None:
    """Return a hint if the names differ only by the prefix of a wrapper."""
    names = {str(name) for name in saved} if isinstance(saved, Mapping) else set()
    for prefix, inner in _WRAPPERS.items():
        if {prefix + name for name in current} == names:
            return f"commit model.{inner}: this commit has the names of the wrapped model"
        if {prefix + name for name in names} == current.keys():
            return f"load into the module inside: model.{inner}"
    return None


def _check_optimizer(load: _Load) -> None:
    """Check the parameter groups, and that moments fit the shapes of their parameters."""
    current = [group["params"] for group in load.holder.param_groups]
    try:
        saved = [group["params"] for group in load.state["param_groups"]]
        moments = {**load.state["state"]}
    except _FAILURES as error:
        raise load.refuse("it is not the state of an optimizer") from error
    sizes, saved_sizes = [*map(len, current)], [*map(len, saved)]
    if sizes != saved_sizes:
        raise load.refuse(f"its groups have {saved_sizes} parameters, the optimizer's {sizes}")
    weights = [tuple(weight.shape) for row in current for weight in row]
    kinds = _moments_by_key(weights, [number for row in saved for number in row], moments)
    if any(_is_in_place(row, len(moments)) for row in kinds.values()):
        return
    for name, row in kinds.items():
        moved = _moved(row, Counter(weights), whole=name in _WHOLE)
        if moved is not None:
            number, shape, weight = moved
            raise load.refuse(
                f"{name} {number} has shape {[*shape]}, its parameter {[*weight]}",
                "create the optimizer with its parameters in the order of the commit",
            )


_Moment = tuple[Any, tuple[int, ...], tuple[int, ...]]
"""The number of a parameter, the shape of its moment, and the shape of the parameter."""


def _moments_by_key(
    weights: list[tuple[int, ...]], numbers: list[Any], moments: Mapping[Any, Any]
) -> dict[str, list[_Moment]]:
    """Return the moments of an optimizer state by key, such as `exp_avg`."""
    kinds: dict[str, list[_Moment]] = {}
    for weight, number in zip(weights, numbers, strict=True):
        entry = moments.get(number)
        for name, moment in entry.items() if isinstance(entry, Mapping) else ():
            if name in MOMENTS and hasattr(moment, "shape"):
                kinds.setdefault(name, []).append((number, tuple(moment.shape), weight))
    return kinds


def _is_in_place(row: list[_Moment], count: int) -> bool:
    """Return whether all of `count` parameters have a moment of this key with their own shape.

    Moments of a single shape prove nothing.
    """
    shapes = {shape for _, shape, _ in row}
    fits = all(shape == weight for _, shape, weight in row)
    return len(row) == count and len(shapes) > 1 and fits


def _moved(row: list[_Moment], weights: Counter[tuple[int, ...]], *, whole: bool) -> _Moment | None:
    """Return the first moment of another parameter, if the parameters have another order.

    Factors and projections (Adafactor, SOAP, GaLore) have other shapes than their parameters, and
    another parameter may have such a shape by chance.  So the order is wrong only if the moments
    have, in all, the shapes of their parameters.  For a key that is mostly `whole`, they may also
    have the shapes of parameters without moments.
    """
    moved = next((moment for moment in row if moment[1] != moment[2]), None)
    shapes = Counter(shape for _, shape, _ in row)
    unknown = shapes - (weights if whole else Counter(weight for _, _, weight in row))
    return None if unknown else moved
