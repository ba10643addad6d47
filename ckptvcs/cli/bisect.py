"""bisect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo

if TYPE_CHECKING:
    from ckptvcs import LogEntry, Verdict


def bisect(
    context: typer.Context,
    good: Annotated[str, typer.Argument(metavar="GOOD", help="good commit")],
    bad: Annotated[str, typer.Argument(metavar="BAD", help="bad commit, later than GOOD")],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND ...]", help="command that tests a checkpoint; {} becomes its path"
        ),
    ] = None,
    nan: Annotated[
        bool, typer.Option("--nan", help="a commit is bad if a weight is NaN or infinite")
    ] = False,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="name of the metric to compare")
    ] = None,
    above: Annotated[
        float | None, typer.Option(metavar="X", help="a commit is bad if the metric is above X")
    ] = None,
    below: Annotated[
        float | None, typer.Option(metavar="X", help="a commit is bad if the metric is below X")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Find the first bad commit by binary search."""
    repo = open_repo(context)

    def watch(entry: LogEntry, verdict: Verdict, left: int) -> None:
        render.talk(f"{_named(entry)}: {verdict}, {left} left")

    found = repo.bisect(
        good, bad, None, watch, command=command, nan=nan, metric=metric, above=above, below=below
    )
    if json:
        first = found.first_bad
        render.as_json(
            {
                "first_bad": None if first is None else first.id,
                "last_good": found.last_good.id,
                "candidates": [render.entry_json(entry) for entry in found.candidates],
                "tested": [
                    {"id": entry.id, "step": entry.step, "result": result}
                    for entry, result in found.tested
                ],
            }
        )
        return
    if found.first_bad is None:
        render.talk("the commits between could not be tested")
        render.data("the first bad commit is one of:")
    else:
        render.data("first bad commit:")
    render.table(render.log_rows(found.candidates))


def _named(entry: LogEntry) -> str:
    return f"{entry.id[:8]}" if entry.step is None else f"step {entry.step} ({entry.id[:8]})"
