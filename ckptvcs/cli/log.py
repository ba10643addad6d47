"""log."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Count, JsonOption, open_repo

DEFAULT_ENTRIES = 30


def log(
    context: typer.Context,
    revision: Annotated[
        str | None, typer.Argument(metavar="[REV]", help="newest commit to list")
    ] = None,
    count: Count = None,
    all_branches: Annotated[bool, typer.Option("--all", help="list all branches")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="draw all branches as a graph")] = False,
    json: JsonOption = False,
) -> None:
    """List commits, newest first."""
    repo = open_repo(context)
    if json:
        entries = repo.log(count, revision=revision, all_branches=all_branches or graph)
        render.as_json([render.entry_json(entry) for entry in entries])
        return
    limit = count or DEFAULT_ENTRIES
    shown = limit + 1  # one more, to know whether there are more
    if graph:
        rows = repo.graph(shown, revision=revision)
        listed = [place for place, (_, entry) in enumerate(rows) if entry is not None]
        more = len(listed) > limit
        end = listed[-2] + 1 if more else None
        table = render.graph_rows(rows[:end], repo.labels())
    else:
        entries = repo.log(shown, revision=revision, all_branches=all_branches)
        more = len(entries) > limit
        table = render.log_rows(entries[:limit])
    if len(table) == 1:
        render.talk("no commits yet")
        return
    render.table(table)
    if more and count is None:
        render.talk(f"{limit} newest commits; use -n N to show more")
