"""The only access to the terminal: data to stdout, messages and progress to stderr.

All text is made plain, because every name, error and time may come from a hostile repository.  No
other module prints line breaks, colors or bars.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Self, TextIO

import typer

from ckptvcs.cli.shortening import shorten
from ckptvcs.errors import CkptError
from ckptvcs.text import from_number, plain, plain_lines
from ckptvcs.text import printable as printable
from ckptvcs.text import size as size

Json = Any

# typer does not export this class; every error of wrong arguments is an instance.
UsageError: type[BaseException] = typer.BadParameter.__mro__[1]

DISTANCES = ["|A|", "|B|", "|B-A|", "change", "per step", "cosine", "max", "changed", "not finite"]
"""The columns of `diff` after the name of a tensor."""

_RIGHT = frozenset(
    ["step", "size", "share", "stored", "ratio", "bytes", "depth", "freed", "on disk", "later"]
).union(DISTANCES)
_FLEXIBLE = frozenset({"message", "metrics", "name", "reason", "note"})
_LEAST = 16  # columns that a flexible cell gets before optional columns are left out
_GAP = 2  # columns between two cells


class Cell(str):
    """A cell of a table with a style of rich, such as `green`."""

    style: str

    def __new__(cls, text: str, style: str = "") -> Self:
        """Return `text` with a style."""
        cell = super().__new__(cls, text)
        cell.style = style
        return cell


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout.isatty()


def width() -> int:
    """Return the number of columns of the terminal; very many if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if is_terminal() else sys.maxsize


def _write(stream: TextIO, lines: Sequence[str]) -> None:
    stream.write("".join(f"{plain(line)}\n" for line in lines))


def data(*lines: str) -> None:
    """Print lines of the result."""
    _write(sys.stdout, lines)


class _Quiet:
    """Whether --quiet was passed."""

    on = False


def be_quiet(on: bool) -> None:
    """Begin or end to discard notes, hints and progress; errors are always printed."""
    _Quiet.on = on


def is_quiet() -> bool:
    """Return whether only data and errors are printed."""
    return _Quiet.on


def talk(*lines: str) -> None:
    """Print lines about the work, except with --quiet."""
    if not _Quiet.on:
        _write(sys.stderr, lines)


def complain(*lines: str) -> None:
    """Print lines about a failure."""
    _write(sys.stderr, lines)


def failure(error: CkptError, *, json: bool) -> None:
    """Print an error and its hint: as two lines, or as one JSON object on a line of stderr."""
    if json:
        _write(
            sys.stderr,
            [
                _ascii(
                    {
                        "error": error.message,
                        "hint": error.hint,
                        "kind": error.kind,
                        "exit_code": error.exit_code,
                    }
                )
            ],
        )
        return
    complain(f"error: {printable(error.message)}")
    if error.hint:
        complain(f"hint: {printable(error.hint)}")


def as_json(value: Json) -> None:
    """Print one JSON value, in printable ASCII: every terminal and every encoding takes any name.

    It may hold results of the API; NaN and infinities become strings.
    """
    data(*_ascii(value, indent=2 if is_terminal() else None).split("\n"))


def _ascii(value: Json, indent: int | None = None) -> str:
    """Return a value as JSON text, in printable ASCII."""
    dump = partial(json.dumps, indent=indent, default=_plain, allow_nan=False)
    try:
        text = dump(value)
    except ValueError:  # NaN or an infinity
        text = dump(_finite(value))
    return text.replace("\x7f", "\\u007f")


def can_ask() -> bool:
    """Return whether a user can answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def answer(document: Json, *lines: str, json: bool) -> None:
    """Print the result of a command: the JSON document or the lines."""
    if json:
        as_json(document)
    else:
        data(*lines)


def attributes(value: object, names: str) -> dict[str, Json]:
    """Return attributes by name; a name with dots leads to an attribute of an attribute."""
    return {name.rpartition(".")[2]: attrgetter(name)(value) for name in names.split()}


def _plain(value: Any) -> Json:
    """Return an object that JSON lacks as one that it has."""
    if isinstance(value, complex):
        return [value.real, value.imag]
    if is_dataclass(value):
        return vars(value)
    return dict(value) if isinstance(value, Mapping) else str(value)


def _finite(value: Any) -> Json:
    """Return a JSON value with strings in place of NaN and infinities."""
    if isinstance(value, float):
        return from_number(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if value is None or isinstance(value, str | int) else _finite(_plain(value))


def confirm(question: str) -> bool:
    """Ask on stderr; Enter and the end of the input mean no."""
    try:
        return typer.confirm(plain(question), err=True)
    except typer.Abort as error:  # from a KeyboardInterrupt or an EOFError
        talk("")
        if isinstance(error.__context__, EOFError):
            return False
        raise KeyboardInterrupt from None


def _fitted(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Return the width of each column, so that rows fit in `room`.

    Flexible columns share evenly what the others leave.
    """
    widths = _widths(rows)
    flexible = [column for column, name in enumerate(rows[0]) if name in _FLEXIBLE]
    free = room - _GAP * (len(widths) - 1) - sum(widths) + sum(widths[c] for c in flexible)
    for done, column in enumerate(sorted(flexible, key=lambda column: widths[column])):
        widths[column] = max(4, min(widths[column], free // (len(flexible) - done)))
        free -= widths[column]
    return widths


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]


def _without(rows: Sequence[Sequence[str]], optional: Sequence[str], room: int) -> list[list[str]]:
    """Return rows without the first of the optional columns, as many as it takes to fit."""
    table = [list(row) for row in rows]
    for name in optional:
        widths = zip(table[0], _widths(table), strict=True)
        least = sum(min(w, _LEAST) if n in _FLEXIBLE else w for n, w in widths)
        if least + _GAP * (len(table[0]) - 1) <= room:
            break
        if name in table[0]:
            column = table[0].index(name)
            for row in table:
                del row[column]
    return table


def table(rows: Sequence[Sequence[str]], optional: Sequence[str] = ()) -> None:
    """Print aligned columns under a heading; on a terminal fitted to its width.

    A narrow terminal does not show the `optional` columns, the first one first.
    """
    rows = [[Cell(plain(cell), getattr(cell, "style", "")) for cell in row] for row in rows]
    if not is_terminal():
        for row in rows:
            cells = [
                cell.rjust(width) if _is_right(name) else cell.ljust(width)
                for cell, width, name in zip(row, _widths(rows), rows[0], strict=True)
            ]
            data((" " * _GAP).join(cells).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    grid = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    rows = _without(rows, optional, console.width)
    widths = _fitted(rows, console.width)
    if rows[0][0] == "name":
        names = shorten([name for name, *_ in rows], widths[0])
        rows = [[name, *rest] for name, (_, *rest) in zip(names, rows, strict=True)]
    for name, width in zip(rows[0], widths, strict=True):
        grid.add_column(
            Text(name),
            justify="right" if _is_right(name) else "left",
            width=width,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows[1:]:
        grid.add_row(*(Text(cell, getattr(cell, "style", "")) for cell in row))
    console.print(grid)


def _is_right(heading: str) -> bool:
    """Return whether a column is aligned to the right: a column of numbers."""
    return heading in _RIGHT or getattr(heading, "style", "") == "right"


class _Bar:
    """A bar of bytes; `reading` counts a first pass, which doubles the total."""

    def __init__(self, bars: Any, label: str, total: int | None) -> None:
        self._bars, self._label, self._total = bars, plain(label), total
        self._task = bars.add_task(self._label, total=total)
        self._is_reading = False

    def __call__(self, count: int) -> None:
        if self._is_reading and count:
            self._is_reading = False
            self._bars.update(self._task, description=f"{self._label}: encoding")
        self._bars.advance(self._task, count)

    def reading(self, count: int) -> None:
        if not self._is_reading:
            self._is_reading = True
            total = None if self._total is None else 2 * self._total
            self._bars.update(self._task, description=f"{self._label}: reading", total=total)
        self._bars.advance(self._task, count)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes with rate and remaining time if stderr is a terminal."""
    if _Quiet.on or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns: list[Any] = [bars.TextColumn("{task.description}", markup=False), bars.BarColumn()]
    if total is None:
        columns += [bars.FileSizeColumn(), bars.TransferSpeedColumn()]
    else:
        columns += [bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn()]
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, label, total)


def bug() -> None:
    """Show the traceback of the current exception, which is a bug."""
    complain(*plain_lines(traceback.format_exc().rstrip("\n")))
