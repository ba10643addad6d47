"""log."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import InvalidInputError

_DEFAULT_ENTRIES = 30


def log(
    context: typer.Context,
    revision: Annotated[
        str | None, typer.Argument(metavar="[REV]", help="newest commit to list")
    ] = None,
    count: Annotated[int | None, typer.Option("-n", help="maximum number of commits")] = None,
    all_branches: Annotated[bool, typer.Option("--all", help="list all branches")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="draw all branches as a graph")] = False,
    json: JsonOption = False,
) -> None:
    """List commits, newest first."""
    repo = open_repo(context)
    if count is not None and count < 1:
        raise InvalidInputError("-n takes a number from 1")
    limit = count
    if limit is None and not json:
        limit = _DEFAULT_ENTRIES
    shown = None if limit is None else limit + 1
    if graph and not json:
        rows = repo.graph(shown, revision=revision)
        listed = [place for place, (_, entry) in enumerate(rows) if entry is not None]
        more = limit is not None and len(listed) > limit
        end = listed[-2] + 1 if more else None
        table = render.graph_rows(rows[:end], repo.labels())
    else:
        entries = repo.log(shown, revision=revision, all_branches=all_branches or graph)
        more = limit is not None and len(entries) > limit
        if json:
            render.as_json([render.entry_json(entry) for entry in entries[:limit]])
            return
        table = render.log_rows(entries[:limit])
    if len(table) == 1:
        render.talk("no commits yet")
        return
    render.table(table)
    if more and count is None:
        render.talk(
            f"the newest {limit}; -n shows more" if not graph else f"{limit} commits; -n shows more"
        )
