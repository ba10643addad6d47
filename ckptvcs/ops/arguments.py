"""Check the arguments of the Python API: steps, metrics and messages."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from ckptvcs.errors import InvalidInputError


def plain_step(step: object) -> int | None:
    """Return a step as an int; accepts integers of numpy and torch.

    Raises:
        InvalidInputError: The step is not a non-negative integer.
    """
    if step is None:
        return None
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = -1
    if not 0 <= number < 1 << 62:
        raise InvalidInputError(f"step must be a non-negative integer, got {step!r}")
    return number


def plain_metrics(metrics: Mapping[Any, object]) -> dict[str, float]:
    """Return metrics as floats; accepts everything that `float` accepts, except text and bool.

    Raises:
        InvalidInputError: A value is not a number, or a name is not text.
    """
    plain = {}
    for name, value in metrics.items():
        try:
            if not isinstance(name, str) or isinstance(value, bool | str | bytes):
                raise TypeError  # noqa: TRY301  the same message as for values that float refuses
            item = getattr(value, "item", None)  # `float` warns if a tensor has a gradient
            plain[name] = float(item() if callable(item) else value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InvalidInputError(f"metric {name!r} must be a number, got {value!r}") from None
    return plain


def plain_message(message: object) -> str:
    """Return a message if it is text; raises InvalidInputError otherwise."""
    if not isinstance(message, str):
        raise InvalidInputError(f"message must be text, got {message!r}")
    return message
