"""log."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Count, JsonOption, open_repo, split_range, step_range
from ckptvcs.errors import InvalidInputError

DEFAULT_ENTRIES = 30


def log(
    context: typer.Context,
    revision: Annotated[
        str | None, typer.Argument(metavar="[REV]", help="newest commit to list, or A..B")
    ] = None,
    count: Count = None,
    all_branches: Annotated[bool, typer.Option("--all", help="list all branches")] = False,
    branch: Annotated[
        str | None, typer.Option(metavar="NAME", help="list the commits of this branch")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="A..B", help="only steps from A to B, both included")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="only since 2026-11-29, 3h, '2 days ago' ...")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="only until this time; a date includes it")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="TEST", help="only if it holds, such as 'loss<3' (repeatable)"),
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="KEY", help="highest first: step, time, size or a metric")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="reverse the order")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="draw all branches as a graph")] = False,
    json: JsonOption = False,
) -> None:
    """List commits, newest first."""
    chosen: dict[str, Any] = {
        "steps": None if steps is None else step_range(steps),
        "since": since,
        "until": until,
        "metrics": metric or (),
        "sort": sort,
        "reverse": reverse,
    }
    if revision is not None and ".." in revision:
        chosen["start"], chosen["stop"] = split_range(revision)
        revision = None
    if graph:
        _refuse_with_graph(chosen)
    repo = open_repo(context)
    chosen |= {"revision": revision, "branch": branch}
    if json:
        entries = repo.log(count, all_branches=all_branches or (graph and not branch), **chosen)
        render.as_json([render.entry_json(entry) for entry in entries])
        return
    limit = count or DEFAULT_ENTRIES
    shown = limit + 1  # one more, to know whether there are more
    if graph:
        rows = repo.graph(shown, revision=branch or revision)
        listed = [place for place, (_, entry) in enumerate(rows) if entry is not None]
        more = len(listed) > limit
        end = listed[-2] + 1 if more else None
        table = render.graph_rows(rows[:end], repo.labels())
    else:
        entries = repo.log(shown, all_branches=all_branches, **chosen)
        more = len(entries) > limit
        table = render.log_rows(entries[:limit])
    if len(table) == 1:
        render.talk("no commits match" if repo.log(1, all_branches=True) else "no commits yet")
        return
    render.table(table)
    if more and count is None:
        order = "first" if sort or reverse else "newest"
        render.talk(f"{limit} {order} commits; use -n N to show more")


def _refuse_with_graph(chosen: dict[str, Any]) -> None:
    """Raise InvalidInputError if commits are chosen that a graph cannot leave out or sort."""
    names = {"start": "A..B", "stop": "A..B", "metrics": "metric"}
    for name, value in chosen.items():
        if value:
            option = names.get(name, name)
            shown = option if ".." in option else f"--{option}"
            raise InvalidInputError(
                f"--graph cannot be combined with {shown}", hint="use --all to list all branches"
            )
