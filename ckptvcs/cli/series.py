"""series."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import Every, JsonOption, Start, Stop, open_repo, split_range
from ckptvcs.cli.shortening import shorten
from ckptvcs.errors import InvalidInputError

if TYPE_CHECKING:
    from ckptvcs import LogEntry

_NARROWEST = 16  # characters of a column
_FIRST = 16  # characters of the columns step and id

Row = tuple["LogEntry", Mapping[str, Mapping[str, float | None]]]
Column = tuple[str, str]
"""A tensor and a statistic."""


def series(
    context: Context,
    tensor: Annotated[
        str, Argument(metavar="TENSOR", help="name of a tensor (full or its end), or a glob")
    ],
    within: Annotated[
        str | None, Argument(metavar="[A..B]", help="only commits from A to B, both included")
    ] = None,
    stat: Annotated[
        list[str] | None,
        Option(metavar="STAT", help="norm (default), mean, std, min, max, absmax, rms, zeros ..."),
    ] = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    as_csv: Annotated[bool, Option("--csv", help="print CSV")] = False,
    json: JsonOption = False,
) -> None:
    """Print statistics of tensors over the steps."""
    start, stop = _bounds(within, start, stop)
    if as_csv and json:
        raise InvalidInputError("--csv cannot be combined with --json", hint="use one of them")
    repo = open_repo(context)
    stats = stat or ["norm"]
    total = sum(entry.commit.raw_bytes for entry in repo.line(start, stop, every))
    rows: list[Row] = []
    with render.progress("reading", total) as tick:
        for row in repo.statistics(tensor, stats, start=start, stop=stop, every=every):
            rows.append(row)
            tick(row[0].commit.raw_bytes)
    if json:
        render.as_json([_json(*row) for row in rows])
        return
    names = dict.fromkeys(name for _, values in rows for name in values)
    columns = [(name, stat) for name in names for stat in stats]
    if as_csv:
        _print_csv(rows, columns)
    else:
        _print_table(rows, columns)


def _bounds(
    within: str | None, start: str | None, stop: str | None
) -> tuple[str | None, str | None]:
    """Return the first and the last commit, given `A..B` or both."""
    if within is None:
        return start, stop
    if start is not None or stop is not None:
        raise InvalidInputError(
            f"'{within}' cannot be combined with --start and --stop", hint="use one of them"
        )
    return split_range(within)


def _json(entry: LogEntry, values: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    found = {name: dict(one) for name, one in values.items()}
    return {"id": entry.id, "step": entry.step, "statistics": found}


def _label(column: Column, columns: Sequence[Column]) -> str:
    """Name a column by its tensor, its statistic or both, whatever tells it from the others."""
    name, stat = column
    if len({stat for _, stat in columns}) == 1:
        return name
    return stat if len({name for name, _ in columns}) == 1 else f"{name} {stat}"


def _value(row: Row, column: Column) -> float | None:
    return row[1].get(column[0], {}).get(column[1])


def _print_csv(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    labels = [render.printable(_label(column, columns)) for column in columns]
    writer.writerow(["step", "commit", *labels])
    for row in rows:
        values = [_value(row, column) for column in columns]
        step = "" if row[0].step is None else row[0].step
        writer.writerow([step, row[0].id, *("" if v is None else repr(v) for v in values)])
    render.data(*out.getvalue().splitlines())


def _print_table(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    room = render.width() - _FIRST
    shown = columns[: max(1, room // (_NARROWEST + 2))]
    widest = max(_NARROWEST, room // len(shown) - 2)
    labels = shorten([render.printable(_label(column, columns)) for column in shown], widest)
    if labels != [columns[0][0]] and len({name for name, _ in columns}) == 1:
        render.data(render.printable(columns[0][0]))
    table = [["step", "id", *labels]]
    for row in rows:
        values = [_value(row, column) for column in shown]
        step = "-" if row[0].step is None else str(row[0].step)
        cells = ["-" if value is None else f"{value:.6g}" for value in values]
        table.append([step, row[0].id[:8], *cells])
    render.table(table)
    if len(shown) < len(columns):
        render.talk(f"{len(shown)} of {len(columns)} columns; use --csv to print all")
