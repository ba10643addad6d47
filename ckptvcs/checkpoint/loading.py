"""A state -> the live objects of torch that it came from, all of them or none.

find     every state that is wanted, before anything is loaded
check    keys and shapes of modules and optimizers, which torch would notice half way, or never
load     each by its own `load_state_dict`
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptvcs.checkpoint.objects import MODEL, OPTIMIZER
from ckptvcs.checkpoint.roles import MOMENTS
from ckptvcs.errors import InvalidInputError, NotFoundError

_WRAPPERS = {"_orig_mod.": "_orig_mod", "module.": "module"}
_FAILURES = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
_LINE = 300  # characters of what torch says


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
    """Load a state into the objects it came from: a module and its optimizers, or objects with
    `load_state_dict`, or rows of such, by their keys.

    Raises:
        NotFoundError: the state lacks what is to be loaded.
        InvalidInputError: it does not fit.  No module or optimizer is changed then.
    """
    loads = [load for key, row in _rows(into) for load in _loads(state, key, row)]
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
            load.holder.load_state_dict(load.state)
        except _FAILURES as error:
            raise load.refuse(error) from error


def _rows(into: Any) -> Iterator[tuple[Any, list[Any]]]:
    """What is to be loaded, by the keys of their states."""
    if isinstance(into, Mapping):
        for key, holder in into.items():
            yield key, [*holder] if isinstance(holder, list | tuple) else [holder]
        return
    given = into if isinstance(into, list | tuple) else [into]
    row = [one for each in given for one in (each if isinstance(each, list | tuple) else [each])]
    modules = [one for one in row if hasattr(one, "named_parameters")]
    optimizers = [one for one in row if hasattr(one, "param_groups")]
    if len(modules) > 1 or len(modules) + len(optimizers) != len(row):
        raise InvalidInputError(
            "load into one module and its optimizers",
            hint="or into objects by key: into={'model': model, 'scheduler': scheduler}",
        )
    if modules:
        yield MODEL, modules
    if optimizers:
        yield OPTIMIZER, optimizers


def _loads(state: Any, key: Any, row: list[Any]) -> Iterator[_Load]:
    if not isinstance(state, Mapping) or key not in state:
        raise NotFoundError(f"the commit holds no '{key}'")
    found = state[key]
    states = found if isinstance(found, list) else [found]
    if len(states) != len(row):
        raise InvalidInputError(f"the commit holds {len(states)} of '{key}', not {len(row)}")
    for holder, one in zip(row, states, strict=True):
        yield _Load(holder, one, str(key))


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
    """The same groups, and moments of the shapes of their parameters."""
    own = [group["params"] for group in load.holder.param_groups]
    try:
        groups = [group["params"] for group in load.state["param_groups"]]
        moments = {**load.state["state"]}
    except _FAILURES as error:
        raise load.refuse("it is no state of an optimizer") from error
    if [*map(len, own)] != [*map(len, groups)]:
        raise load.refuse(f"groups of {[*map(len, groups)]} parameters, not of {[*map(len, own)]}")
    weights = [weight for row in own for weight in row]
    shapes = {weight.shape for weight in weights}
    for weight, number in zip(weights, (n for row in groups for n in row), strict=True):
        for name, moment in (moments.get(number) or {}).items():
            shape = getattr(moment, "shape", weight.shape)
            # Some keep factors, which have shapes of their own.
            if name in MOMENTS and shape != weight.shape and shape in shapes:
                raise load.refuse(
                    f"{name} {number} is {[*shape]}, its parameter {[*weight.shape]}",
                    "give the optimizer its parameters in the order that it had",
                )
