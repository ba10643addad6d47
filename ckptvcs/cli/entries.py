"""Show commits and their numbers, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptvcs.cli.render import Json, attributes
from ckptvcs.text import printable, size

if TYPE_CHECKING:
    from ckptvcs import LogEntry, ObjectId

_MAX_IDS = 12  # in a line
_ENTRY = (
    "id step message commit.raw_bytes stored_bytes commit.patch_bytes commit.kind commit.depth"
    " exact fidelity commit.error commit.codec commit.time metrics fields commit.parents branch"
    " tags"
)
"""The attributes of a commit that JSON shows."""


def ratio(raw: int, stored: int) -> str:
    """Return the compression ratio: `4.2x`."""
    if not stored:
        return "-"
    value = raw / stored
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x"


def entry_json(entry: LogEntry) -> dict[str, Json]:
    """Return a commit with stable keys."""
    return attributes(entry, _ENTRY)


def sizes(raw: int, stored: int) -> str:
    """Return the size of a commit before and after compression."""
    return f"{size(raw)} -> {size(stored)} ({ratio(raw, stored)})"


def step_text(step: int | None) -> str:
    """Return a training step for a column of a table."""
    return "-" if step is None else str(step)


def fidelity(entry: LogEntry) -> str:
    """Return `exact`, `weights exact`, or the errors of near weights and of a far next step."""
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
    """Return the first short ids and the number of others."""
    more = f" and {len(names) - _MAX_IDS} more" if len(names) > _MAX_IDS else ""
    return ", ".join(name[:8] for name in names[:_MAX_IDS]) + more


def commit_name(entry: LogEntry) -> str:
    """Return `step 700 (7b0c4f3e)`, or the id of a commit without a step."""
    return entry.id[:8] if entry.step is None else f"step {entry.step} ({entry.id[:8]})"


def fields(values: Mapping[str, str]) -> str:
    """Return fields as text: `data=v2 host=a`."""
    return " ".join(f"{printable(key)}={printable(value)}" for key, value in values.items())


def metrics(values: Mapping[str, float]) -> str:
    """Return metrics as text: `loss=2.31 acc=0.5`."""
    return " ".join(f"{printable(name)}={value:.4g}" for name, value in values.items())


_FAR = 0.7  # relative squared error of a step
_LOG = ["step", "id", "message", "metrics", "size", "ratio", "fidelity"]


def _log_row(entry: LogEntry, names: Sequence[str]) -> list[str]:
    commit = entry.commit
    marks = f"({', '.join(names)}) " if names else ""
    return [
        step_text(commit.step),
        entry.id[:8],
        marks + printable(entry.message),
        metrics(entry.metrics),
        size(entry.stored_bytes),
        ratio(commit.raw_bytes, entry.stored_bytes),
        fidelity(entry),
    ]


def log_rows(entries: Sequence[LogEntry]) -> list[list[str]]:
    """Return the log as a table with a heading."""
    return [_LOG, *(_log_row(entry, entry.tags) for entry in entries)]


def graph_rows(
    graph: Sequence[tuple[str, LogEntry | None]], names: Mapping[ObjectId, Sequence[str]]
) -> list[list[str]]:
    """Return the log as a table with a graph in front, and with the names of the tips."""
    rows = [["", *_LOG]]
    for drawn, entry in graph:
        cells = [""] * len(_LOG) if entry is None else _log_row(entry, names.get(entry.id, ()))
        rows.append([drawn, *cells])
    return rows
