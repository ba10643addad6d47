"""tag."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import show_names, warn_if_faded
from ckptvcs.errors import InvalidInputError


def tag(
    context: Context,
    name: Annotated[str | None, Argument(metavar="[NAME]", help="name of a new tag")] = None,
    revision: Annotated[str, Argument(metavar="[REV]", help="commit to tag")] = "HEAD",
    delete: Annotated[bool, Option("-d", "--delete", help="delete the tag")] = False,
    json: JsonOption = False,
) -> None:
    """List, create or delete tags."""
    repo = open_repo(context)
    if delete and name is None:
        raise InvalidInputError("--delete requires a tag name", hint="see 'ckpt tag'")
    if name is None:
        show_names(repo.tags(), json=json)
        return
    if delete:
        commit = repo.delete_tag(name)
        render.answer(
            {"name": name, "commit": commit, "deleted": True},
            f"deleted tag {name}, which was at {commit[:8]}",
            json=json,
        )
        return
    commit = repo.tag(name, revision)
    warn_if_faded(repo.entry(commit))
    render.answer({"name": name, "commit": commit}, f"tag {name} at {commit[:8]}", json=json)
