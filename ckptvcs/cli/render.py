"""What a user sees: data on stdout, talk and progress on stderr, JSON where it is asked for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ckptvcs.history.canonical import from_number
from ckptvcs.history.commit import ERROR_NAMES, ErrorReport
from ckptvcs.history.log import LogEntry
from ckptvcs.sizes import size as size
from ckptvcs.store.object import ObjectId

Json = Any
_MAX_IDS = 12  # in a line


def is_terminal() -> bool:
    """Whether stdout is looked at by a person."""
    return sys.stdout.isatty()


def width() -> int:
    """Columns that there are for a table: of the terminal, else as many as it takes."""
    return shutil.get_terminal_size().columns if is_terminal() else sys.maxsize


def data(text: str) -> None:
    """A line of what was asked for."""
    # Half of a pair of surrogates, which no terminal takes, is written as JSON has it.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")


def talk(text: str) -> None:
    """A line about what is going on."""
    sys.stderr.write(text + "\n")


def as_json(value: Json) -> None:
    """One JSON value, in ASCII: every terminal and every encoding takes any name."""
    data(json.dumps(value, indent=None if not is_terminal() else 2))


def ratio(raw: int, stored: int) -> str:
    """How many times smaller."""
    if not stored:
        return "-"
    value = raw / stored
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x"


def printable(text: str) -> str:
    """`text` on one line, without control characters that could drive a terminal."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def error_json(error: ErrorReport) -> dict[str, Json]:
    """A report of errors with stable keys."""
    return {name: from_number(getattr(error, name)) for name in ERROR_NAMES}


def entry_json(entry: LogEntry) -> dict[str, Json]:
    """A commit with stable keys."""
    commit = entry.commit
    return {
        "id": entry.id,
        "step": commit.step,
        "message": commit.message,
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
        "metrics": {name: from_number(value) for name, value in commit.metrics.items()},
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
        marks + printable(commit.message),
        metrics(commit.metrics),
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


_RIGHT = frozenset({
    "step", "size", "stored", "ratio", "bytes", "depth", "freed", "|A|", "|B|", "|B-A|", "change",
    "per step", "cosine", "max", "changed", "not finite",
})  # fmt: skip
_FLEXIBLE = frozenset({"message", "metrics", "name", "reason", "note"})
_GAP = 2  # columns between two cells


def _fitted(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of each column, so that rows fit in `room`: flexible columns share evenly what the
    others leave.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    flexible = [column for column, name in enumerate(rows[0]) if name in _FLEXIBLE]
    left = room - _GAP * (len(widths) - 1) - sum(widths) + sum(widths[c] for c in flexible)
    for done, column in enumerate(sorted(flexible, key=lambda column: widths[column])):
        widths[column] = max(4, min(widths[column], left // (len(flexible) - done)))
        left -= widths[column]
    return widths


def table(rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns under a heading; on a terminal fitted to its width."""
    if not is_terminal():
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [
                cell.rjust(width) if name in _RIGHT else cell.ljust(width)
                for cell, width, name in zip(row, widths, rows[0], strict=True)
            ]
            data((" " * _GAP).join(cells).rstrip())
        return
    from rich.console import Console  # noqa: PLC0415  only a terminal pays for it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console()
    grid = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    widths = _fitted(rows, console.width)
    if rows[0][0] == "name":  # names of tensors differ at their ends
        rows = [
            [
                cell
                if len(cell) <= widths[0]
                else f"\N{HORIZONTAL ELLIPSIS}{cell[1 - widths[0] :]}",
                *rest,
            ]
            for cell, *rest in rows
        ]
    for name, width in zip(rows[0], widths, strict=True):
        grid.add_column(
            name, justify="right" if name in _RIGHT else "left", width=width, no_wrap=True,
            overflow="ellipsis",
        )  # fmt: skip
    for row in rows[1:]:
        grid.add_row(*map(Text, row))
    console.print(grid)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes with rate and time left on a terminal's stderr, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as bars  # noqa: PLC0415  only a terminal pays for it
    from rich.console import Console  # noqa: PLC0415

    columns = (
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(),
        bars.TransferSpeedColumn(), bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
