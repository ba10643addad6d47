"""commit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import (
    Branch,
    Codec,
    JsonOption,
    Metrics,
    open_repo,
    parse_metrics,
    size_of,
)
from ckptvcs.cli.listing import until
from ckptvcs.errors import after
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from ckptvcs import CommitResult, LogEntry


def commit(
    context: Context,
    path: Annotated[Path, Argument(metavar="PATH", help="checkpoint file or directory")],
    message: Annotated[str, Option("-m", "--message", metavar="TEXT", help="commit message")] = "",
    step: Annotated[
        int | None, Option(metavar="STEP", help="training step (default: read from the checkpoint)")
    ] = None,
    metric: Metrics = None,
    codec: Codec = None,
    branch: Branch = None,
    raw: Annotated[bool, Option("--raw", help="store plain bytes, do not parse the file")] = False,
    json: JsonOption = False,
) -> None:
    """Store a checkpoint as the next commit."""
    repo = open_repo(context)
    metrics = parse_metrics(metric)
    with render.progress("committing", size_of(path)) as tick:
        result = repo.commit_path(
            path,
            message=message,
            step=step,
            metrics=metrics,
            codec=codec,
            branch=branch,
            raw=raw,
            progress=tick,
        )
    with after(f"commit {result.id[:8]} was made"):
        _tell(repo, result, json=json)


def _tell(repo: Repo, result: CommitResult, *, json: bool) -> None:
    for note in result.notes:
        render.talk(f"note: {render.printable(note)}")
    entry = repo.entry(result.id, branch=result.branch)
    if render.is_quiet() and not json:
        render.data(entry.id)
        return
    commit = entry.commit
    kept = entry.exact and entry.exact_bytes
    form = "" if kept else f", {entries.fidelity(entry)}"
    step = "" if commit.step is None else f" step {commit.step}"
    message = render.printable(commit.message)
    render.answer(
        entries.entry_json(entry),
        f"[{result.branch} {entry.id[:8]}]{step} {message}".rstrip(),
        f"  {entries.sizes_now(entry, until(repo, entry))}{form}",
        json=json,
    )
    sys.stdout.flush()
    render.talk(*entries.faded(result.faded), *_introduction(repo, entry))


def _introduction(repo: Repo, entry: LogEntry) -> list[str]:
    """Explain fading with the first commit of a repository, if the commit will fade."""
    if entry.exact_lasts or entry.commit.parents or len(repo.log(2, all_branches=True)) > 1:
        return []
    newest = repo.setting("keep-exact")
    return [
        f"note: the newest {newest} commits are exact; older ones become near: a small error",
        "note: 'ckpt pin' and 'ckpt tag' keep a commit exact, 'ckpt config keep-exact N' more",
    ]
