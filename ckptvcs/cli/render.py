"""The only door to the terminal: data to stdout, talk and progress to stderr.

Whatever goes through is made plain: a repository may be somebody else's, and so may be every text
in it, each name, error and time.  Line breaks, colors and bars are made here and nowhere else.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, cast

import typer

from ckptvcs.cli.entries import Json as Json
from ckptvcs.cli.entries import commit_name as commit_name
from ckptvcs.cli.entries import entry_json as entry_json
from ckptvcs.cli.entries import error_json as error_json
from ckptvcs.cli.entries import fidelity as fidelity
from ckptvcs.cli.entries import fields as fields
from ckptvcs.cli.entries import graph_rows as graph_rows
from ckptvcs.cli.entries import ids as ids
from ckptvcs.cli.entries import log_rows as log_rows
from ckptvcs.cli.entries import metrics as metrics
from ckptvcs.cli.entries import ratio as ratio
from ckptvcs.text import plain, plain_lines
from ckptvcs.text import printable as printable
from ckptvcs.text import size as size

# typer does not export this class; every error of wrong arguments is an instance.
_USAGE_ERROR: type[BaseException] = typer.BadParameter.__mro__[1]
_UNEXPECTED = 1

DISTANCES = ["|A|", "|B|", "|B-A|", "change", "per step", "cosine", "max", "changed", "not finite"]
"""The columns of `diff` behind the name of a tensor."""

_RIGHT = frozenset(["step", "size", "stored", "ratio", "bytes", "depth", "freed"]).union(DISTANCES)
_FLEXIBLE = frozenset({"message", "metrics", "name", "reason", "note"})
_GAP = 2  # columns between two cells


def is_terminal() -> bool:
    """Whether stdout is looked at by a person."""
    return sys.stdout.isatty()


def width() -> int:
    """Columns that there are for a table: of the terminal, else as many as it takes."""
    return shutil.get_terminal_size().columns if is_terminal() else sys.maxsize


def _write(stream: TextIO, lines: Sequence[str]) -> None:
    stream.write("".join(f"{plain(line)}\n" for line in lines))


def data(*lines: str) -> None:
    """Lines of what was asked for."""
    _write(sys.stdout, lines)


def talk(*lines: str) -> None:
    """Lines about what is going on."""
    _write(sys.stderr, lines)


def as_json(value: Json) -> None:
    """One JSON value, in printable ASCII: every terminal and every encoding takes any name."""
    text = json.dumps(value, indent=None if not is_terminal() else 2, ensure_ascii=True)
    data(*text.replace("\x7f", "\\u007f").split("\n"))


def can_ask() -> bool:
    """Return whether a user can answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str) -> bool:
    """Ask on stderr; Enter, or the end of the input, is no."""
    try:
        return typer.confirm(plain(question), err=True)
    except typer.Abort as error:  # of a KeyboardInterrupt or an EOFError
        talk("")
        if isinstance(error.__context__, EOFError):
            return False
        raise KeyboardInterrupt from None


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
    rows = [list(map(plain, row)) for row in rows]
    if not is_terminal():
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [
                cell.rjust(width) if name in _RIGHT else cell.ljust(width)
                for cell, width, name in zip(row, widths, rows[0], strict=True)
            ]
            data((" " * _GAP).join(cells).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    grid = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    widths = _fitted(rows, console.width)
    if rows[0][0] == "name":  # names of tensors differ at their ends
        rows = [
            [cell if len(cell) <= widths[0] else f"\u2026{cell[1 - widths[0] :]}", *rest]
            for cell, *rest in rows
        ]
    for name, width in zip(rows[0], widths, strict=True):
        grid.add_column(
            name,
            justify="right" if name in _RIGHT else "left",
            width=width,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows[1:]:
        grid.add_row(*map(Text, row))
    console.print(grid)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes with rate and time left on a terminal's stderr, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plain(label), total=total)
        yield lambda count: bar.advance(task, count)


def run(app: typer.Typer) -> int:
    """Run a command line to its end: its exit code.  What it was called with wrongly is made plain
    like everything else.
    """
    try:
        code = app(standalone_mode=False)
    except _USAGE_ERROR as error:
        usage = cast("typer.BadParameter", error)
        talk(*plain_lines(f"error: {usage.format_message()}"))
        command = "ckpt" if usage.ctx is None else usage.ctx.command_path
        talk(f"hint: run '{command} --help'")
        code = usage.exit_code
    return code if isinstance(code, int) else 0


def bug() -> int:
    """Show the traceback of the error that is handled, which is a bug: the exit code."""
    talk(*plain_lines(traceback.format_exc().rstrip("\n")))
    return _UNEXPECTED
