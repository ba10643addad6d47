"""status."""

from __future__ import annotations

from typer import Context

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import ahead
from ckptvcs.repo import Repo


def status(context: Context, json: JsonOption = False) -> None:
    """Print the current commit and the files that differ from it."""
    repo = open_repo(context)
    status = repo.status()
    branch, name, step, changes = status.branch, status.head, status.step, status.changes
    if json:
        render.as_json(
            {"repository": repo.folder, "branch": branch, "detached": branch is None}
            | render.attributes(status, "head step")
            | {"changes": [{"what": what, "path": path} for what, path in changes]}
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
    for what, path in changes:
        render.data(f"  {words[what]}: {render.printable(str(path))}")
    if not changes:
        render.data(_unchanged(repo))


def _unchanged(repo: Repo) -> str:
    """Say that no file differs from HEAD, or that there is none: Python commits states."""
    commit = repo.show().commit
    if commit.source == "state" and not (repo.root / commit.path).is_file():
        return "no file to compare: HEAD is a state that a Python program committed"
    return "no changes: the files match HEAD"
