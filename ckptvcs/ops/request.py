"""Request: a checkpoint to commit, with its step, message and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptvcs.checkpoint.conventions import step_in_name, step_in_text
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.state import STATE_FILE, Copies, state_checkpoint
from ckptvcs.errors import InvalidInputError
from ckptvcs.history.provenance import Provenance
from ckptvcs.history.schema import Schema
from ckptvcs.ops.arguments import plain_message, plain_metrics, plain_step

Origin = Provenance | Callable[[], Provenance | None] | None
"""The provenance of a commit, or a function that waits for it; None records none."""

EMPTY = Checkpoint("directory", (), (), Schema(()), (), None, {}, {})


@dataclass
class Request:
    """A checkpoint to commit under the name `path`, with validated arguments.

    `inside` says that `path` is relative to the repository's directory.  With `head_stays`, HEAD
    does not move to a branch that this commit starts.  `checkpoint` is set later if it is not at
    hand: another process may read it.  With `fades`, no exact patch is written: the next commits
    would delete it.
    """

    message: str = ""
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    codec: str | None = None
    branch: str | None = None
    head_stays: bool = False
    checkpoint: Checkpoint = EMPTY
    path: str = STATE_FILE
    inside: bool = True
    origin: Origin = None
    fades: bool = False

    def provenance(self) -> Provenance | None:
        """Return the provenance of the commit; None if none is recorded."""
        return self.origin() if callable(self.origin) else self.origin

    def __post_init__(self) -> None:
        """Convert the arguments to plain types.

        Raises:
            InvalidInputError: The step, a metric or the message is not valid.
        """
        self.message = plain_message(self.message)
        self.step, self.metrics = plain_step(self.step), plain_metrics(self.metrics)


def find_step(request: Request) -> int | None:
    """Return the step: the given one, or that of the checkpoint, the message or the file name."""
    if request.step is not None:
        return request.step
    if request.checkpoint.step is not None:
        return request.checkpoint.step
    step = step_in_text(request.message)
    if step is not None or not request.checkpoint.is_all:
        return step
    name = request.path.rpartition("/")[2]
    return step_in_name(name, request.checkpoint.epoch)


def gather_state(
    state: object,
    model: Any,
    optimizer: Any,
    extra: Mapping[str, object] | None,
    copies: Copies | None = None,
    *,
    step: int | None = None,
) -> Checkpoint:
    """Return a checkpoint of a state, or of a model and its optimizers; see `Repo.commit`."""
    from ckptvcs.checkpoint.torch_objects import gather  # noqa: PLC0415

    if (state is ...) == (model is None and optimizer is None):
        raise InvalidInputError("commit either a state, or a model and its optimizer")
    if state is not ... and extra is not None:
        raise InvalidInputError("pass either a state or extra, not both")
    if state is not ...:
        return state_checkpoint(state, None, copies)
    gathered, names = gather(model, optimizer, extra, STATE_FILE, step)
    return state_checkpoint(gathered, names, copies)
