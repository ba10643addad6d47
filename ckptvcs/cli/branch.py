"""branch."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import list_refs
from ckptvcs.errors import ConflictError, InvalidInputError, NotFoundError
from ckptvcs.repo import Repo

_MAX_LISTED = 6


def _delete_branch(repo: Repo, name: str | None, *, json: bool) -> None:
    if name is None:
        raise InvalidInputError("--delete takes the name of a branch")
    tip, head = repo.revisions.branch(name), repo.head()
    if tip is None:
        raise NotFoundError(f"no branch '{name}'", hint="see 'ckpt branch'")
    if head is not None and head.branch == name:
        raise ConflictError(f"HEAD is on branch '{name}'", hint="check out another one first")
    repo.set_ref("heads", name, None, "delete")
    lost = repo.history.unnamed(tip)
    if json:
        render.as_json({"name": name, "commit": tip, "deleted": True, "on_no_branch": lost})
        return
    render.data(f"deleted branch {name}, which was at {tip[:8]}")
    if not lost:
        return
    steps = [repo.catalog.commit(commit).step for commit in lost[:_MAX_LISTED]]
    listed = ", ".join(
        commit[:8] if step is None else f"{commit[:8]} (step {step})"
        for commit, step in zip(lost, steps, strict=False)
    )
    more = f" and {len(lost) - _MAX_LISTED} more" if len(lost) > _MAX_LISTED else ""
    render.talk(f"note: on no branch any more: {listed}{more}")
    render.talk(f"note: until the next gc, ckpt branch {name} {tip[:8]} brings them back")


def branch(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="make this branch")] = None,
    revision: Annotated[str, typer.Argument(metavar="[REV]", help="start here")] = "HEAD",
    delete: Annotated[bool, typer.Option("--delete", help="delete the branch")] = False,
    json: JsonOption = False,
) -> None:
    """List branches, make one, or delete one."""
    repo = open_repo(context)
    head = repo.head()
    if delete:
        _delete_branch(repo, name, json=json)
        return
    if name is None:
        list_refs(repo, "heads", json=json, current=head.branch if head else None)
        return
    if repo.revisions.branch(name) is not None:
        raise ConflictError(f"branch '{name}' exists")
    commit = repo.resolve(revision)
    repo.set_ref("heads", name, commit, "branch")
    if json:
        render.as_json({"name": name, "commit": commit})
    else:
        render.data(f"branch {name} at {commit[:8]}")
