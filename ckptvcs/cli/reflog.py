"""reflog."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo


def reflog(
    context: typer.Context,
    ref: Annotated[
        str | None, typer.Argument(metavar="[BRANCH]", help="branch (default: the current one)")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the changes of a branch, newest first."""
    repo = open_repo(context)
    events = repo.reflog(ref)
    if json:
        render.as_json(
            [
                {
                    "time": e.time,
                    "action": e.action,
                    "commit": e.commit,
                    "step": e.step,
                    "commits": e.count,
                    "available": e.available,
                }
                for e in events
            ]
        )
        return
    rows = [["time (UTC)", "action", "id", "step", "commits"]]
    for event in events:
        mark = "" if event.available else " (swept)"
        rows.append(
            [
                event.time[:19].replace("T", " "),
                render.printable(event.action),
                (event.commit or "-")[:8] + mark,
                "-" if event.step is None else str(event.step),
                str(event.count) if event.count else "",
            ]
        )
    render.table(rows)
