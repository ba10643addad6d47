"""Load optimizer states without changing their dtypes.

torch's `load_state_dict` casts each state to the dtype of its parameter: it rounds float32 moments
of bfloat16 weights, and makes floats of counters and codes.  Its choice of device is right.

    state --hooks of the user--> [note] --torch casts and moves--> [put back] --hooks of the user-->
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

_INNER = ("optimizer", "_optimizer", "optim")  # where wrappers have what they wrap
_STEP = "step"  # torch has rules of its own for its type and its device


@contextmanager
def keep_types(holder: Any) -> Iterator[None]:
    """While this lasts, the optimizer (or what it wraps) loads states as they are, but for their
    device.  What an optimizer does itself with what it has loaded stays done.
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
    found: list[Any] = []
    left, seen = [holder], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen or not hasattr(one, "param_groups"):
            continue
        seen.add(id(one))
        # A wrapper may be an optimizer by its class, and have nothing of one.
        if hasattr(one, "_optimizer_load_state_dict_pre_hooks"):
            found.append(one)
        left += [inner for name in _INNER if (inner := getattr(one, name, None)) is not None]
    return found


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
