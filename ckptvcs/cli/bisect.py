"""bisect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import show_log

if TYPE_CHECKING:
    from ckptvcs import LogEntry, Verdict


def bisect(
    context: Context,
    good: Annotated[str, Argument(metavar="GOOD", help="good commit")],
    bad: Annotated[str, Argument(metavar="BAD", help="bad commit, later than GOOD")],
    command: Annotated[
        list[str] | None,
        Argument(
            metavar="[-- COMMAND ...]", help="command that tests a checkpoint; {} becomes its path"
        ),
    ] = None,
    nan: Annotated[
        bool, Option("--nan", help="a commit is bad if a weight is NaN or infinite")
    ] = False,
    metric: Annotated[
        str | None, Option(metavar="NAME", help="name of the metric to compare")
    ] = None,
    above: Annotated[
        float | None, Option(metavar="X", help="a commit is bad if the metric is above X")
    ] = None,
    below: Annotated[
        float | None, Option(metavar="X", help="a commit is bad if the metric is below X")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Find the first bad commit by binary search."""
    repo = open_repo(context)

    def watch(entry: LogEntry, verdict: Verdict, remaining: int) -> None:
        render.talk(f"{entries.commit_name(entry)}: {verdict}, {remaining} left")

    result = repo.bisect(
        good, bad, None, watch, command=command, nan=nan, metric=metric, above=above, below=below
    )
    if json:
        render.as_json(
            {
                "first_bad": result.first_bad and result.first_bad.id,
                "last_good": result.last_good.id,
                "candidates": [entries.entry_json(entry) for entry in result.candidates],
                "tested": [
                    render.attributes(entry, "id step") | {"result": verdict}
                    for entry, verdict in result.tested
                ],
            }
        )
        return
    if result.first_bad is None:
        render.talk("the commits between could not be tested")
        render.data("the first bad commit is one of:")
    else:
        render.data("first bad commit:")
    show_log(repo, [("", entry) for entry in result.candidates])
