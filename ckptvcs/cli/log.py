"""log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import Count, JsonOption, open_repo, split_range, step_range
from ckptvcs.cli.listing import show_log, tell_detached
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from ckptvcs import LogEntry

DEFAULT_ENTRIES = 30

_Newest = Annotated[str | None, Argument(metavar="[REV]", help="newest commit to list, or A..B")]
_Branch = Annotated[
    str | None, Option("--branch", metavar="NAME", help="list the commits of this branch")
]
_Steps = Annotated[str | None, Option(metavar="A..B", help="only steps from A to B, both included")]
_Since = Annotated[
    str | None, Option(metavar="TIME", help="only since 2026-11-29, 3h, '2 days ago' ...")
]
_Until = Annotated[
    str | None, Option(metavar="TIME", help="only until this time; a date includes it")
]
_Metric = Annotated[
    list[str] | None, Option(metavar="TEST", help="only if it holds, such as 'loss<3' (repeatable)")
]
_Sort = Annotated[
    str | None, Option(metavar="KEY", help="highest first: step, time, size or a metric")
]


def log(
    context: Context,
    revision: _Newest = None,
    count: Count = None,
    all_branches: Annotated[bool, Option("--all", help="list all branches")] = False,
    branch: _Branch = None,
    steps: _Steps = None,
    since: _Since = None,
    until: _Until = None,
    metric: _Metric = None,
    sort: _Sort = None,
    reverse: Annotated[bool, Option("--reverse", help="reverse the order")] = False,
    graph: Annotated[bool, Option("--graph", help="draw all branches as a graph")] = False,
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
    if ".." in (revision or ""):
        chosen["start"], chosen["stop"] = split_range(str(revision))
        revision = None
    if graph:
        _refuse_with_graph(chosen)
        all_branches = branch is None
    chosen |= {"revision": revision, "branch": branch, "all_branches": all_branches}
    repo = open_repo(context)
    if json:
        render.as_json([entries.entry_json(entry) for entry in repo.log(count, **chosen)])
        return
    limit = count or DEFAULT_ENTRIES
    rows, more = _rows(repo, limit, chosen, graph=graph)
    if not rows:
        render.talk("no commits match" if repo.log(1, all_branches=True) else "no commits yet")
        return
    show_log(repo, rows)
    _tell_place(repo, chosen)
    if more and count is None:
        render.talk(f"{limit} {_order(chosen)} commits; use -n N to show more")


def _tell_place(repo: Repo, chosen: dict[str, Any]) -> None:
    """Say that HEAD is detached, unless the user has chosen what to list."""
    if not any(value for name, value in chosen.items() if name != "all_branches"):
        tell_detached(repo)


def _order(chosen: dict[str, Any]) -> str:
    return "first" if chosen["sort"] or chosen["reverse"] else "newest"


def _rows(
    repo: Repo, limit: int, chosen: dict[str, Any], *, graph: bool
) -> tuple[list[tuple[str, LogEntry | None]], bool]:
    """Return the rows of at most `limit` commits, and whether there are more commits."""
    if not graph:
        commits = repo.log(limit + 1, **chosen)
        return [("", entry) for entry in commits[:limit]], len(commits) > limit
    rows = repo.graph(limit + 1, revision=chosen["branch"] or chosen["revision"])
    listed = [place for place, (_, entry) in enumerate(rows) if entry is not None]
    more = len(listed) > limit
    return rows[: listed[-2] + 1 if more else None], more


def _refuse_with_graph(chosen: dict[str, Any]) -> None:
    """Raise InvalidInputError if commits are chosen that a graph cannot leave out or sort."""
    for name, value in chosen.items():
        if value:
            option = "A..B" if name in ("start", "stop") else f"--{name.removesuffix('s')}"
            option = "--steps" if name == "steps" else option
            raise InvalidInputError(
                f"--graph cannot be combined with {option}", hint="use --all to list all branches"
            )
