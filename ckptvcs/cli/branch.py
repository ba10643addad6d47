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
    revision: Annotated[str | None, Argument(metavar="[REV]", help="commit to start at")] = None,
    delete: Annotated[bool, Option("-d", "--delete", help="delete the branch")] = False,
    rename: Annotated[
        bool, Option("-m", "--rename", help="rename: [OLD] NEW (default: the current branch)")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List, create, rename or delete branches."""
    repo = open_repo(context)
    if rename:
        _rename(repo, name, revision, delete=delete, json=json)
        return
    if delete:
        _delete(repo, name, json=json)
        return
    if name is None:
        show_names(repo.branches(), json=json)
        return
    commit = repo.branch(name, revision or "HEAD")
    render.answer({"name": name, "commit": commit}, f"branch {name} at {commit[:8]}", json=json)


def _rename(repo: Repo, old: str | None, new: str | None, *, delete: bool, json: bool) -> None:
    if old is None or delete:
        raise InvalidInputError(
            "--rename cannot be combined with --delete" if delete else "--rename requires a name",
            hint="run 'ckpt branch --rename OLD NEW'",
        )
    target = old if new is None else new
    name = repo.rename_branch(target, None if new is None else old)
    render.answer({"name": target, "renamed": name}, f"branch {name} is now {target}", json=json)


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
