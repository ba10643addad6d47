"""Git for training runs: commit, log and check out checkpoints in the space of a few of them.

repo = ckptvcs.Repo.init("runs/exp1")
repo.commit({"model": model.state_dict()}, step=2000, metrics={"loss": 2.31})
state = repo.checkout(2000)
"""

from typing import TYPE_CHECKING

from ckptvcs.errors import (
    BusyError,
    CkptError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    MissingObjectError,
    NotFoundError,
    StorageError,
    TruncatedError,
    UnsupportedVersionError,
)
from ckptvcs.plain import tame_log

if TYPE_CHECKING:
    from ckptvcs.care import Stats
    from ckptvcs.history.log import LogEntry
    from ckptvcs.repo import Repo

tame_log()

_HOMES = {"LogEntry": "history.log", "Repo": "repo", "Stats": "care"}


def __getattr__(name: str) -> object:
    """Load a class when it is first asked for.  The command line, which is below this package, can
    so be interrupted, and find no memory, from its first moment.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptvcs' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"ckptvcs.{_HOMES[name]}"), name)


__all__ = [
    "BusyError",
    "CkptError",
    "ConflictError",
    "CorruptionError",
    "InvalidInputError",
    "LogEntry",
    "MissingObjectError",
    "NotFoundError",
    "Repo",
    "Stats",
    "StorageError",
    "TruncatedError",
    "UnsupportedVersionError",
]
