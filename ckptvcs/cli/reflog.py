"""reflog."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Context

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, open_repo


def reflog(
    context: Context,
    ref: Annotated[
        str | None, Argument(metavar="[BRANCH]", help="branch (default: the current one)")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the changes of a branch, newest first."""
    repo = open_repo(context)
    events = repo.reflog(ref)
    if json:
        render.as_json(
            [
                render.attributes(event, "time action commit step")
                | {"commits": event.count, "available": event.available}
                for event in events
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
                entries.step_text(event.step),
                str(event.count) if event.count else "",
            ]
        )
    render.table(rows)
