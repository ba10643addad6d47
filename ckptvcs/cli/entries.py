"""How a commit and its numbers are shown, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ckptvcs.text import from_number, printable, size

if TYPE_CHECKING:
    from ckptvcs import ErrorReport, LogEntry, ObjectId

Json = Any
_MAX_IDS = 12  # in a line


def ratio(raw: int, stored: int) -> str:
    """How many times smaller."""
    if not stored:
        return "-"
    value = raw / stored
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x"


def error_json(error: ErrorReport) -> dict[str, Json]:
    """A report of errors with stable keys."""
    return {name: from_number(value) for name, value in asdict(error).items()}


def entry_json(entry: LogEntry) -> dict[str, Json]:
    """A commit with stable keys."""
    commit = entry.commit
    return {
        "id": entry.id,
        "step": commit.step,
        "message": entry.message,
        "raw_bytes": commit.raw_bytes,
        "stored_bytes": entry.stored_bytes,
        "patch_bytes": commit.patch_bytes,
        "kind": commit.kind,
        "depth": commit.depth,
        "exact": entry.exact,
        "fidelity": dict(entry.fidelity),
        "error": error_json(commit.error),
        "codec": commit.codec,
        "time": commit.time,
        "metrics": {name: from_number(value) for name, value in entry.metrics.items()},
        "fields": dict(entry.fields),
        "parents": list(commit.parents),
        "branch": entry.branch,
        "tags": list(entry.tags),
    }


def fidelity(entry: LogEntry) -> str:
    """`exact`, `weights exact`, or how far the near weights are off, and the optimizer's next step
    where that is far.
    """
    if set(entry.fidelity.values()) == {"dropped"}:
        return "dropped"
    if entry.exact:
        return "exact"
    if entry.fidelity.get("model") == "exact":
        return "weights exact"
    error = entry.commit.error
    update = f", update {error.update_nmse:.2g}" if error.update_nmse > _FAR else ""
    return f"near {error.weight_rel:.2g}{update}"


def ids(names: Sequence[str]) -> str:
    """Short ids, the first few of many."""
    more = f" and {len(names) - _MAX_IDS} more" if len(names) > _MAX_IDS else ""
    return ", ".join(name[:8] for name in names[:_MAX_IDS]) + more


def commit_name(entry: LogEntry) -> str:
    """Return `step 700 (7b0c4f3e)`, or the id of a commit without a step."""
    return entry.id[:8] if entry.step is None else f"step {entry.step} ({entry.id[:8]})"


def fields(values: Mapping[str, str]) -> str:
    """`data=v2 host=a`."""
    return " ".join(f"{printable(key)}={printable(value)}" for key, value in values.items())


def metrics(values: Mapping[str, float]) -> str:
    """`loss=2.31 acc=0.5`."""
    return " ".join(f"{printable(name)}={value:.4g}" for name, value in values.items())


_FAR = 0.7  # relative squared error of a step
_LOG = ["step", "id", "message", "metrics", "size", "ratio", "fidelity"]


def _log_row(entry: LogEntry, names: Sequence[str]) -> list[str]:
    commit = entry.commit
    marks = f"({', '.join(names)}) " if names else ""
    return [
        "-" if commit.step is None else str(commit.step),
        entry.id[:8],
        marks + printable(entry.message),
        metrics(entry.metrics),
        size(entry.stored_bytes),
        ratio(commit.raw_bytes, entry.stored_bytes),
        fidelity(entry),
    ]


def log_rows(entries: Sequence[LogEntry]) -> list[list[str]]:
    """The log as a table, with its heading."""
    return [_LOG, *(_log_row(entry, entry.tags) for entry in entries)]


def graph_rows(
    graph: Sequence[tuple[str, LogEntry | None]], names: Mapping[ObjectId, Sequence[str]]
) -> list[list[str]]:
    """The same with a graph in front, and what names the tips."""
    rows = [["", *_LOG]]
    for drawn, entry in graph:
        cells = [""] * len(_LOG) if entry is None else _log_row(entry, names.get(entry.id, ()))
        rows.append([drawn, *cells])
    return rows
