"""Load optimizer states without changing their dtypes.

torch's `load_state_dict` casts each state to the dtype of its parameter.  It rounds float32 moments
of bfloat16 weights, and converts counters and codes to floats.  Its choice of device is right.

    state --hooks of the user--> [note] --torch casts and moves--> [put back] --hooks of the user-->
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

_INNER = ("optimizer", "_optimizer", "optim")  # attributes of wrappers
_STEP = "step"  # torch handles its dtype and device separately


@contextmanager
def keep_types(holder: Any) -> Iterator[None]:
    """Make an optimizer, and those that it wraps, load states without a change of dtype.

    Changes that the optimizer itself makes to a loaded state are kept.
    """
    with ExitStack() as stack:
        for optimizer in _with_hooks(holder):
            noted: list[Any] = []
            note = optimizer.register_load_state_dict_pre_hook(
                lambda _, state, noted=noted: noted.append(state)
            )
            stack.callback(note.remove)
            put_back = optimizer.register_load_state_dict_post_hook(
                lambda loaded, noted=noted: _put_back(loaded, noted[-1]), prepend=True
            )
            stack.callback(put_back.remove)
        yield


def _with_hooks(holder: Any) -> list[Any]:
    """Return the torch optimizers that an object is or wraps."""
    optimizers: list[Any] = []
    pending, seen = [holder], set[int]()
    while pending:
        optimizer = pending.pop()
        if id(optimizer) in seen or not hasattr(optimizer, "param_groups"):
            continue
        seen.add(id(optimizer))
        # A wrapper may inherit from Optimizer without being initialized as one.
        if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
            optimizers.append(optimizer)
        pending += [
            inner for name in _INNER if (inner := getattr(optimizer, name, None)) is not None
        ]
    return optimizers


def _put_back(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Restore the dtype that each parameter's state has in `state`, if it differs."""
    numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
    weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, weight in zip(numbers, weights, strict=True):
        if number in state["state"] and weight in optimizer.state:
            was, loaded = state["state"][number], optimizer.state[weight]
            optimizer.state[weight] = _typed(was, loaded, None)


def _typed(was: Any, loaded: Any, key: object) -> Any:
    if hasattr(was, "dtype") and hasattr(loaded, "dtype"):
        if key == _STEP or was.dtype == loaded.dtype or was.shape != loaded.shape:
            return loaded
        return was.to(device=loaded.device)
    if isinstance(was, dict) and isinstance(loaded, dict):
        for name, value in loaded.items():
            if name in was:
                loaded[name] = _typed(was[name], value, name)
        return loaded
    if isinstance(was, list | tuple) and type(was) is type(loaded) and len(was) == len(loaded):
        return type(was)(_typed(a, b, None) for a, b in zip(was, loaded, strict=True))
    return loaded
