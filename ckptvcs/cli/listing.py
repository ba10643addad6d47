"""Lists of commits, branches and tags."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptvcs.cli import entries, render
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo
from ckptvcs.text import counted

if TYPE_CHECKING:
    from ckptvcs import LogEntry, NamedCommit

_MAX_AHEAD = 3  # branches in a line


def until(repo: Repo, entry: LogEntry) -> str:
    """Return until when a commit of HEAD's line stays exact, as ` until 2 later commits`."""
    if not entry.exact or entry.exact_lasts:
        return ""
    with contextlib.suppress(InvalidInputError):  # unreadable settings were reported before
        newest = int(repo.setting("keep-exact"))
        names = [newer.id for newer in repo.log(newest)]
        if entry.id in names:
            count = newest - names.index(entry.id)
            return f" until {counted(count, 'later commit')}"
    return ""


def show_log(repo: Repo, graph: Sequence[tuple[str, LogEntry | None]]) -> None:
    """Print commits as a table; `graph` has the drawing before each commit."""
    commits = [entry for _, entry in graph if entry is not None]
    columns, best = "auto", ""
    with contextlib.suppress(InvalidInputError):  # unreadable settings were reported before
        columns, best = str(repo.setting("log-columns")), str(repo.setting("keep-best"))
    names = entries.shown_metrics(columns, best, commits)
    render.table(entries.log_rows(graph, repo.labels(), names), ("ratio", "when", "later"))


def ahead(repo: Repo) -> str:
    """Return how far branches are ahead of HEAD, as `main is 3 commits ahead`."""
    rows = [(branch, count) for branch, count in repo.newer().items() if count]
    texts = [
        f"{render.printable(branch)} is {counted(count, 'commit')} ahead"
        for branch, count in rows[:_MAX_AHEAD]
    ]
    more = len(rows) - _MAX_AHEAD
    return ", ".join([*texts, *([f"{more} more branches too"] if more > 0 else [])])


def tell_detached(repo: Repo) -> None:
    """Say that HEAD is detached, and which branches have newer commits."""
    head = repo.head()
    if head is not None and head.branch is None:
        text = ahead(repo)
        render.talk(f"note: HEAD is detached{text and f'; {text}'}")


def show_names(names: Sequence[NamedCommit], *, json: bool) -> None:
    """Print branches or tags with their commits; the current one is marked."""
    if json:
        render.as_json(names)
        return
    width = max((len(row.name) for row in names), default=0)
    for row in names:
        mark = "* " if row.current else "  "
        step = "" if row.step is None else f"  step {row.step}"
        render.data(f"{mark}{row.name:<{width}}  {row.commit[:8]}{step}")


def warn_if_faded(entry: LogEntry) -> None:
    """Warn that a tag or a pin does not make a commit exact again."""
    if not entry.exact:
        form = entries.fidelity(entry)
        render.talk(f"note: {entry.id[:8]} is {form} now; a tag or pin cannot make it exact again")
