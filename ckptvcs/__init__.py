"""Git for training runs: commit, log and check out checkpoints in the space of a few.

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
    MissingExtraError,
    MissingObjectError,
    NotFoundError,
    StorageError,
    TruncatedError,
    UnsupportedVersionError,
)
from ckptvcs.text import tame_log

if TYPE_CHECKING:
    from ckptvcs.checkpoint.survey import Found, Skipped
    from ckptvcs.files.removal import Removed
    from ckptvcs.gc.collect import GcPlan
    from ckptvcs.gc.decide import Decision
    from ckptvcs.gc.fading import Faded, Patch
    from ckptvcs.gc.retention import Best, Policy
    from ckptvcs.history.commit import Commit, ErrorReport, FileEntry, PartState
    from ckptvcs.history.log import LogEntry
    from ckptvcs.history.note import Note
    from ckptvcs.history.provenance import CodeState, Provenance
    from ckptvcs.history.records import Archived
    from ckptvcs.history.reflog import ReflogEvent, Undone
    from ckptvcs.history.refs import Generation
    from ckptvcs.history.schema import TensorInfo
    from ckptvcs.ops.bisect import Bisection, Verdict
    from ckptvcs.ops.bundle import Bundled
    from ckptvcs.ops.checkout import CheckedOut
    from ckptvcs.ops.commit import CommitResult
    from ckptvcs.ops.diff import Comparison, LayerDifference, TensorDifference
    from ckptvcs.ops.diff_sides import Indistinct
    from ckptvcs.ops.diff_sums import Sums
    from ckptvcs.ops.disk_usage import DiskUsage, UsageRow
    from ckptvcs.ops.each import Visit
    from ckptvcs.ops.export import Exported
    from ckptvcs.ops.fetch import Fetched
    from ckptvcs.ops.import_estimate import Estimate, Forecast
    from ckptvcs.ops.import_folder import Importer, ImportItem
    from ckptvcs.ops.originals import Removal
    from ckptvcs.ops.reader import Reader
    from ckptvcs.ops.refs import DeletedBranch, NamedCommit
    from ckptvcs.ops.repair import Repaired
    from ckptvcs.ops.resume import Resumed, Unusable
    from ckptvcs.ops.show import TensorEntry
    from ckptvcs.ops.stats import Stats
    from ckptvcs.ops.status import Status
    from ckptvcs.ops.tensor import TensorView
    from ckptvcs.ops.verify import Damage, VerifyReport
    from ckptvcs.ops.watch import Watcher, WatchEvent
    from ckptvcs.repo import Repo
    from ckptvcs.store.ids import ObjectId

__version__: str

tame_log()

_HOMES = {
    "Archived": "history.records",
    "Best": "gc.retention",
    "Bisection": "ops.bisect",
    "Bundled": "ops.bundle",
    "CheckedOut": "ops.checkout",
    "CodeState": "history.provenance",
    "Commit": "history.commit",
    "CommitResult": "ops.commit",
    "Comparison": "ops.diff",
    "Damage": "ops.verify",
    "Decision": "gc.decide",
    "DeletedBranch": "ops.refs",
    "DiskUsage": "ops.disk_usage",
    "ErrorReport": "history.commit",
    "Estimate": "ops.import_estimate",
    "Exported": "ops.export",
    "Fetched": "ops.fetch",
    "FileEntry": "history.commit",
    "Forecast": "ops.import_estimate",
    "Found": "checkpoint.survey",
    "GcPlan": "gc.collect",
    "Generation": "history.refs",
    "ImportItem": "ops.import_folder",
    "Importer": "ops.import_folder",
    "Indistinct": "ops.diff_sides",
    "Skipped": "checkpoint.survey",
    "LayerDifference": "ops.diff",
    "LogEntry": "history.log",
    "NamedCommit": "ops.refs",
    "Note": "history.note",
    "ObjectId": "store.ids",
    "PartState": "history.commit",
    "Faded": "gc.fading",
    "Patch": "gc.fading",
    "Policy": "gc.retention",
    "Provenance": "history.provenance",
    "Reader": "ops.reader",
    "ReflogEvent": "history.reflog",
    "Resumed": "ops.resume",
    "Removal": "ops.originals",
    "Removed": "files.removal",
    "Repaired": "ops.repair",
    "Repo": "repo",
    "Stats": "ops.stats",
    "Status": "ops.status",
    "Sums": "ops.diff_sums",
    "TensorDifference": "ops.diff",
    "TensorEntry": "ops.show",
    "TensorInfo": "history.schema",
    "TensorView": "ops.tensor",
    "Unusable": "ops.resume",
    "Undone": "history.reflog",
    "UsageRow": "ops.disk_usage",
    "Verdict": "ops.bisect",
    "VerifyReport": "ops.verify",
    "Visit": "ops.each",
    "WatchEvent": "ops.watch",
    "Watcher": "ops.watch",
}


def __getattr__(name: str) -> object:
    """Load a class on first access.

    The command line imports this package before it can handle an interrupt or a lack of memory, so
    the import must be short.
    """
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        return version("ckptvcs")
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptvcs' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"ckptvcs.{_HOMES[name]}"), name)


__all__ = [
    "Archived",
    "Best",
    "Bisection",
    "Bundled",
    "BusyError",
    "CheckedOut",
    "CkptError",
    "CodeState",
    "Commit",
    "CommitResult",
    "Comparison",
    "ConflictError",
    "CorruptionError",
    "Damage",
    "Decision",
    "DeletedBranch",
    "DiskUsage",
    "ErrorReport",
    "Estimate",
    "Exported",
    "Faded",
    "Fetched",
    "FileEntry",
    "Forecast",
    "Found",
    "GcPlan",
    "Generation",
    "ImportItem",
    "Importer",
    "Indistinct",
    "InvalidInputError",
    "LayerDifference",
    "LogEntry",
    "MissingExtraError",
    "MissingObjectError",
    "NamedCommit",
    "NotFoundError",
    "Note",
    "ObjectId",
    "PartState",
    "Patch",
    "Policy",
    "Provenance",
    "Reader",
    "ReflogEvent",
    "Removal",
    "Removed",
    "Repaired",
    "Repo",
    "Resumed",
    "Skipped",
    "Stats",
    "Status",
    "StorageError",
    "Sums",
    "TensorDifference",
    "TensorEntry",
    "TensorInfo",
    "TensorView",
    "TruncatedError",
    "Undone",
    "UnsupportedVersionError",
    "Unusable",
    "UsageRow",
    "Verdict",
    "VerifyReport",
    "Visit",
    "WatchEvent",
    "Watcher",
]
