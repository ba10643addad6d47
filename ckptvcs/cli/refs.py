"""branch, tag."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import ConflictError, NotFoundError
from ckptvcs.repo import Repo


def _list(repo: Repo, space: str, *, json: bool, current: str | None) -> None:
    names = repo.refs.names(space)
    read = repo.revisions.tag if space == "tags" else repo.revisions.branch
    found = [(name, commit) for name in names if (commit := read(name)) is not None]
    if json:
        render.as_json([
            {"name": name, "commit": commit, "step": repo.catalog.commit(commit).step,
             "current": name == current}
            for name, commit in found
        ])  # fmt: skip
        return
    for name, commit in found:
        step = repo.catalog.commit(commit).step
        mark = "* " if name == current else "  "
        render.data(f"{mark}{name}  {commit[:8]}" + ("" if step is None else f"  step {step}"))


def branch(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="make this branch")] = None,
    revision: Annotated[str, typer.Argument(metavar="[REV]", help="start here")] = "HEAD",
    json: JsonOption = False,
) -> None:
    """List branches, or make one."""
    repo = open_repo(context)
    head = repo.head()
    if name is None:
        _list(repo, "heads", json=json, current=head.branch if head else None)
        return
    if repo.revisions.branch(name) is not None:
        raise ConflictError(f"branch '{name}' exists")
    commit = repo.resolve(revision)
    repo.set_ref("heads", name, commit, "branch")
    if json:
        render.as_json({"name": name, "commit": commit})
    else:
        render.data(f"branch {name} at {commit[:8]}")


def tag(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="make this tag")] = None,
    revision: Annotated[str, typer.Argument(metavar="[REV]", help="tag this")] = "HEAD",
    delete: Annotated[bool, typer.Option("--delete", help="delete the tag")] = False,
    json: JsonOption = False,
) -> None:
    """List tags, make one, or delete one."""
    repo = open_repo(context)
    if name is None:
        _list(repo, "tags", json=json, current=None)
        return
    known = repo.revisions.tag(name)
    if delete:
        if known is None:
            raise NotFoundError(f"no tag '{name}'")
        repo.set_ref("tags", name, None, "delete")
        render.talk(f"deleted tag {name}, which was at {known[:8]}")
        return
    if known is not None:
        raise ConflictError(f"tag '{name}' exists", hint=f"ckpt tag --delete {name}")
    commit = repo.resolve(revision)
    repo.set_ref("tags", name, commit, "tag")
    if json:
        render.as_json({"name": name, "commit": commit})
    else:
        render.data(f"tag {name} at {commit[:8]}")
