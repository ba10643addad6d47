"""Git for training runs: commit, log and check out checkpoints in the space of a few of them.

repo = ckptvcs.Repo.init("runs/exp1")
repo.commit({"model": model.state_dict()}, step=2000, metrics={"loss": 2.31})
state = repo.checkout(2000)
"""

from ckptvcs.care import Stats
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
from ckptvcs.history.log import LogEntry
from ckptvcs.plain import tame_log
from ckptvcs.repo import Repo

tame_log()

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
