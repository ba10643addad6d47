"""Show commits and their numbers, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ckptvcs.cli.render import Cell, Json, attributes
from ckptvcs.text import commit_name as named
from ckptvcs.text import printable, size

if TYPE_CHECKING:
    from ckptvcs import Faded, LogEntry, ObjectId, Stats, TensorEntry

_MAX_IDS = 12  # in a line
_ENTRY = (
    "id step message commit.raw_bytes stored_bytes commit.patch_bytes commit.kind commit.depth"
    " exact exact_lasts exact_bytes fidelity commit.error commit.codec commit.time metrics fields"
    " commit.parents branch tags"
)
"""The attributes of a commit that JSON shows."""
_MAX_FADED = 5  # lines
_MAX_METRICS = 2  # columns, if no metric has a usual name
_FAR = 0.7  # relative squared error of a step
_LEAST_RATIO = 0.05  # one digit shows it
_WHEN = 10  # columns of `59 min ago` and of a date
_WEEK = 7 * 86400  # seconds


def ratio(raw: int, stored: int) -> str:
    """Return the compression ratio: `4.2x`, or `<0.1x` if it is too small for a digit."""
    if not raw or not stored:
        return "-"
    value = raw / stored
    if value < _LEAST_RATIO:
        return "<0.1x"
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x"


def entry_json(entry: LogEntry) -> dict[str, Json]:
    """Return a commit with stable keys."""
    return attributes(entry, _ENTRY) | {"near_error": entry.near_error, "between": entry.between}


def sizes(raw: int, stored: int) -> str:
    """Return the size of a commit before and after compression."""
    return f"{size(raw)} -> {size(stored)} ({ratio(raw, stored)})"


def step_text(step: int | None) -> str:
    """Return a training step for a column of a table."""
    return "-" if step is None else str(step)


def fidelity(entry: LogEntry) -> Cell:
    """Return in what form a commit can be restored.

    `exact` lasts.  `exact for now` holds until newer commits are made.  `near` has the relative
    error of the weights, their lag, and the error of the optimizer's next step if it is large.
    """
    text, style = _form(entry)
    if entry.commit.nonfinite:
        return Cell(f"{text}, NaN", "bold red")
    return Cell(text, style)


def _form(entry: LogEntry) -> tuple[str, str]:
    if set(entry.fidelity.values()) == {"dropped"}:
        return "dropped", "dim"
    if entry.exact:
        return ("exact", "green") if entry.exact_lasts else ("exact for now", "cyan")
    if entry.fidelity.get("model") == "exact":
        return f"weights exact{' for now' if entry.exact_bytes else ''}", "yellow"
    error = entry.commit.error
    update = f", update {error.update_nmse:.2g}" if error.update_nmse > _FAR else ""
    lag = "" if error.lag is None else f", lag {error.lag:.1f}"
    if "archived" in entry.fidelity.values():
        return f"archived {error.weight_rel:.2g}{lag}", "yellow"
    return f"near {error.weight_rel:.2g}{lag}{update}", "yellow"


def tensor_form(tensor: TensorEntry) -> str:
    """Return the form of a tensor: `exact`, `exact for now`, `near` or `dropped`."""
    return "exact for now" if tensor.form == "exact" and not tensor.exact_lasts else tensor.form


def parts(entry: LogEntry) -> str:
    """Return the form of each part: `model exact for now, rest exact`."""
    passing = not entry.exact_lasts
    forms = {
        part: f"{form} for now"
        if form == "exact" and passing and entry.commit.parts[part].exact is not None
        else form
        for part, form in entry.fidelity.items()
    }
    return ", ".join(f"{part} {form}" for part, form in forms.items())


def sizes_now(entry: LogEntry, until: str = "") -> str:
    """Return `604 MB -> 8.7 MB (69x)`, and what its exact patches take now, and `until` when."""
    text = sizes(entry.commit.raw_bytes, entry.stored_bytes)
    if not entry.exact or not entry.exact_bytes:
        return text
    end = "" if entry.exact_lasts else until or " for now"
    return f"{text} + {size(entry.exact_bytes)} that keep it exact{end}"


def on_disk(stats: Stats) -> str:
    """Return the size of a repository on disk, and without exact patches and cache."""
    total = stats.stored_bytes + stats.cache_bytes
    text = f"on disk {size(total)} ({ratio(stats.raw_bytes, total)})"
    if not stats.patch_bytes:
        return text
    history = stats.history_bytes
    least = f"{size(history)} ({ratio(stats.raw_bytes, history)})"
    return f"{text}; {least} when nothing is kept exact"


def faded(rows: Sequence[Faded]) -> list[str]:
    """Return a line for each commit that became near, the first few of many."""
    lines = []
    for row in rows[:_MAX_FADED]:
        what = row.id[:8] if row.commit.step is None else f"step {row.commit.step}"
        error = f"{row.commit.error.weight_rel:.2g}"
        lines.append(f"note: {what} is near now ({error}), {size(row.freed_bytes)} freed")
    more = len(rows) - _MAX_FADED
    if more > 0:
        lines.append(f"note: {more} more commits are near now")
    if lines:
        lines[-1] += "; 'ckpt pin' keeps one exact"
    return lines


def ids(names: Sequence[str]) -> str:
    """Return the first short ids and the number of others."""
    more = f" and {len(names) - _MAX_IDS} more" if len(names) > _MAX_IDS else ""
    return ", ".join(name[:8] for name in names[:_MAX_IDS]) + more


def commit_name(entry: LogEntry) -> str:
    """Return `step 700 (7b0c4f3e)`, or the short id of a commit without a step."""
    return named(entry.step, entry.id)


def fields(values: Mapping[str, str]) -> str:
    """Return fields as text: `data=v2 host=a`."""
    return " ".join(f"{printable(key)}={printable(value)}" for key, value in values.items())


def metrics(values: Mapping[str, float]) -> str:
    """Return metrics as text: `loss=2.31 acc=0.5`."""
    return " ".join(f"{printable(name)}={value:.4g}" for name, value in values.items())


def when(time: str) -> str:
    """Return how long ago a time was, or its local date if that is a week or more."""
    then = datetime.fromisoformat(time)
    past = (datetime.now(UTC) - then).total_seconds()
    if past < 0 or past >= _WEEK:
        return then.astimezone().strftime("%Y-%m-%d")
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if past >= seconds:
            return f"{past / seconds:.0f} {unit} ago"
    return f"{past:.0f} s ago"


def local(time: str) -> str:
    """Return the local date and time: `2026-11-29 14:05`."""
    return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")


def shown_metrics(setting: str, best: str, entries: Iterable[LogEntry]) -> list[str]:
    """Return the metrics that have a column in the log.

    `setting` is that of log-columns: names of metrics with commas, or `auto` for the metric of the
    rule `best`, loss and eval_loss, or else for the first metrics that there are.
    """
    if setting != "auto":
        return [name.strip() for name in setting.split(",") if name.strip()]
    present = {name: None for entry in entries for name in entry.metrics}
    usual = [best.partition(":")[0], "loss", "eval_loss"]
    names = [name for name in dict.fromkeys(usual) if name in present]
    return names or list(present)[:_MAX_METRICS]


def _log_row(entry: LogEntry, marks: Sequence[str], metric_names: Sequence[str]) -> list[str]:
    commit = entry.commit
    head = any(mark.startswith("HEAD") for mark in marks)
    labels = f"({', '.join(map(printable, marks))}) " if marks else ""
    values = [entry.metrics.get(name) for name in metric_names]
    later = entry.stored_bytes + (entry.exact_bytes if entry.exact_lasts else 0)
    return [
        step_text(commit.step),
        Cell(entry.id[:8], "dim"),
        when(commit.time).ljust(_WHEN),
        Cell(labels + printable(entry.message), "bold" if head else ""),
        *(Cell("" if v is None else f"{v:.4g}", _metric_style(v)) for v in values),
        size(entry.stored_bytes + entry.exact_bytes),
        size(later),
        ratio(commit.raw_bytes, later),
        fidelity(entry),
    ]


def _metric_style(value: float | None) -> str:
    return "" if value is None or math.isfinite(value) else "bold red"


def log_rows(
    graph: Sequence[tuple[str, LogEntry | None]],
    marks: Mapping[ObjectId, Sequence[str]],
    metric_names: Sequence[str],
) -> list[list[str]]:
    """Return the log as a table with its heading; `graph` has the drawing before each commit."""
    names = [Cell(printable(name), "right") for name in metric_names]
    heading = ["step", "id", "when", "message", *names, "on disk", "later", "ratio", "fidelity"]
    rows = [heading]
    for _, entry in graph:
        empty = [""] * len(heading)
        rows.append(
            empty if entry is None else _log_row(entry, marks.get(entry.id, ()), metric_names)
        )
    if any(drawn for drawn, _ in graph):
        drawings = ["", *(drawn for drawn, _ in graph)]
        rows = [[drawn, *row] for drawn, row in zip(drawings, rows, strict=True)]
    return rows
