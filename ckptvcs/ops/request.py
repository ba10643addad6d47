"""Request: what is to be committed, and what its user, its content and its name say of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptvcs.checkpoint.conventions import step_in_name, step_in_text
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.state import STATE_FILE, Copies, state_checkpoint
from ckptvcs.codec.spec import CodecSpec
from ckptvcs.errors import InvalidInputError


@dataclass(frozen=True)
class Request:
    """What is to be committed, and what is said about it.  `path` is how it will be named; where
    `head_stays`, HEAD does not follow to a branch that has to be started.
    """

    checkpoint: Checkpoint
    path: str
    inside: bool
    message: str
    step: int | None
    metrics: Mapping[str, float]
    spec: CodecSpec
    branch: str | None = None
    head_stays: bool = False

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        path: str,
        *,
        inside: bool,
        message: object,
        step: object,
        metrics: Mapping[Any, object],
        spec: CodecSpec,
        branch: str | None,
        head_stays: bool = False,
    ) -> Request:
        """A request of what a user has given.

        Raises:
            InvalidInputError: a step, a metric or a message is none.
        """
        return cls(
            checkpoint,
            path,
            inside,
            plain_message(message),
            plain_step(step),
            plain_metrics(metrics),
            spec,
            branch,
            head_stays,
        )


def plain(
    step: object, message: object, metrics: Mapping[Any, object], codec: str | None
) -> dict[str, Any]:
    """What is said of a state, as `commit_checkpoint` takes it.

    Raises:
        InvalidInputError: a step, a metric or a message is none.
    """
    return {
        "path": STATE_FILE,
        "inside": True,
        "step": plain_step(step),
        "message": plain_message(message),
        "metrics": plain_metrics(metrics),
        "codec": codec,
    }


def plain_step(step: object) -> int | None:
    """A step as a commit holds it; whole numbers of numpy and torch are taken too.

    Raises:
        InvalidInputError: it is no whole number from 0.
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
    """Metrics as a commit holds them; anything that `float` takes but text and bool.

    Raises:
        InvalidInputError: a value is no number.
    """
    plain = {}
    for name, value in metrics.items():
        try:
            if not isinstance(name, str) or isinstance(value, bool | str | bytes):
                raise TypeError  # noqa: TRY301  the same answer as for what float refuses
            take = getattr(value, "item", None)  # of a tensor, which may have a gradient
            plain[name] = float(take() if callable(take) else value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InvalidInputError(f"metric {name!r} must be a number, got {value!r}") from None
    return plain


def plain_message(message: object) -> str:
    """A message as a commit holds it.  Raises InvalidInputError."""
    if not isinstance(message, str):
        raise InvalidInputError(f"message must be text, got {message!r}")
    return message


def find_step(request: Request) -> int | None:
    """The step: as given, else what the checkpoint, the message or the file name says."""
    if request.step is not None:
        return request.step
    if request.checkpoint.step is not None:
        return request.checkpoint.step
    said = step_in_text(request.message)
    if said is not None or not request.checkpoint.is_all:
        return said
    name = request.path.rpartition("/")[2]
    return step_in_name(name, request.checkpoint.epoch)


def gather_state(
    state: object,
    model: Any,
    optimizer: Any,
    extra: Mapping[str, object] | None,
    copies: Copies | None = None,
) -> Checkpoint:
    """Return a state, or that of a model and its optimizers, as a checkpoint; see `Repo.commit`.

    Raises:
        InvalidInputError: both are given, or neither is.
    """
    from ckptvcs.checkpoint.torch_objects import gather  # noqa: PLC0415

    if (state is ...) == (model is None and optimizer is None):
        raise InvalidInputError("commit either a state, or a model and its optimizer")
    if state is not ... and extra is not None:
        raise InvalidInputError("pass either a state or extra, not both")
    if state is not ...:
        return state_checkpoint(state, None, copies)
    gathered, names = gather(model, optimizer, extra, STATE_FILE)
    return state_checkpoint(gathered, names, copies)
