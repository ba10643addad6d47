"""status."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import ahead
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from ckptvcs import Status

_MOST_LISTED = 10


def status(
    context: Context,
    verify: Annotated[
        bool, Option("--verify", help="read all files, do not trust their size and time")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Print the current commit and the files that differ from it."""
    repo = open_repo(context)
    status = repo.status(verify=verify)
    branch, name, step = status.branch, status.head, status.step
    if json:
        render.as_json(
            {"repository": repo.folder, "branch": branch, "detached": branch is None}
            | render.attributes(status, "head step")
            | {"changes": [{"what": what, "path": path} for what, path in status.changes]}
            | render.attributes(status, "uncommitted")
        )
        return
    if name is None:
        render.data(f"on branch {branch}, no commits yet")
        return
    where = f"on branch {branch}" if branch else "detached HEAD"
    at = "" if step is None else f" (step {step})"
    render.data(f"{where}, at {name[:8]}{at}")
    newer = "" if branch else ahead(repo)
    if newer:
        render.data(f"  {newer}")
    words = {"missing": "missing", "changed": "changed", "near": "near form of the commit"}
    for what, path in status.changes:
        render.data(f"  {words[what]}: {_shown(path)}")
    if not status.changes:
        render.data(_unchanged(repo))
    _show_uncommitted(status)


def _show_uncommitted(status: Status) -> None:
    found = status.uncommitted
    if found:
        render.data("not committed:")
        render.data(*(f"  {_shown(path)}" for path in found[:_MOST_LISTED]))
        if len(found) > _MOST_LISTED:
            render.data(f"  and {len(found) - _MOST_LISTED} more")
        folder = _shown(found[0].parent)
        sys.stdout.flush()
        render.talk(f"hint: 'ckpt commit PATH' commits one, 'ckpt import {folder}' all of them")


def _shown(path: Path) -> str:
    """Return a path, relative to the working directory if it is below it."""
    here = Path.cwd()
    return render.printable(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _unchanged(repo: Repo) -> str:
    """Say that no file differs from HEAD, or that there is none: Python commits states."""
    commit = repo.show().commit
    if commit.source == "state" and not (repo.root / commit.path).is_file():
        return "no file to compare: HEAD is a state that a Python program committed"
    return "no changes: the files match HEAD"
