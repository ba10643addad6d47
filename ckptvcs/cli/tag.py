"""tag."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import list_refs, warn_if_faded
from ckptvcs.errors import ConflictError, NotFoundError


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
        list_refs(repo, "tags", json=json, current=None)
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
    warn_if_faded(repo, commit)
    if json:
        render.as_json({"name": name, "commit": commit})
    else:
        render.data(f"tag {name} at {commit[:8]}")
