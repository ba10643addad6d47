"""Replace functions for good in a process that a test has started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap(owner: object, name: str, wrapper: Callable[..., Any]) -> None:
    """Have calls of `owner.name` go to `wrapper`, which gets the old function and the arguments.

    Raises:
        AttributeError: `owner` does not have the name.
    """
    old = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(old, *args, **kwargs)

    setattr(owner, name, call)
