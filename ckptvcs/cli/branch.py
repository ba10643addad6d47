"""branch."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import show_names
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo

_MAX_LISTED = 6


def branch(
    context: Context,
    name: Annotated[str | None, Argument(metavar="[NAME]", help="name of a new branch")] = None,
    revision: Annotated[str, Argument(metavar="[REV]", help="commit to start at")] = "HEAD",
    delete: Annotated[bool, Option("--delete", help="delete the branch")] = False,
    json: JsonOption = False,
) -> None:
    """List, create or delete branches."""
    repo = open_repo(context)
    if delete:
        _delete(repo, name, json=json)
        return
    if name is None:
        show_names(repo.branches(), json=json)
        return
    commit = repo.branch(name, revision)
    render.answer({"name": name, "commit": commit}, f"branch {name} at {commit[:8]}", json=json)


def _delete(repo: Repo, name: str | None, *, json: bool) -> None:
    if name is None:
        raise InvalidInputError("--delete requires a branch name")
    deleted = repo.delete_branch(name)
    tip, lost = deleted.commit, deleted.unnamed
    render.answer(
        {"name": name, "commit": tip, "deleted": True, "unreachable": lost},
        f"deleted branch {name}, which was at {tip[:8]}",
        json=json,
    )
    if json or not lost:
        return
    steps = [repo.entry(commit).step for commit in lost[:_MAX_LISTED]]
    listed = ", ".join(
        commit[:8] if step is None else f"{commit[:8]} (step {step})"
        for commit, step in zip(lost, steps, strict=False)
    )
    more = f" and {len(lost) - _MAX_LISTED} more" if len(lost) > _MAX_LISTED else ""
    render.talk(f"note: on no other branch: {listed}{more}")
    render.talk(f"hint: run 'ckpt branch {name} {tip[:8]}' before the next gc to restore them")
