"""branch, tag, pin, unpin."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import ConflictError, InvalidInputError, NotFoundError
from ckptvcs.repo import Repo
from ckptvcs.store.object import ObjectId

_MAX_LISTED = 6


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
    _warn(repo, commit)
    if json:
        render.as_json({"name": name, "commit": commit})
    else:
        render.data(f"tag {name} at {commit[:8]}")


def _warn(repo: Repo, commit: ObjectId) -> None:
    """Say what a tag or a pin cannot bring back."""
    entry = repo.entry(commit)
    if not entry.exact:
        render.talk(
            f"note: {commit[:8]} is {render.fidelity(entry)} by now; it cannot become exact again"
        )


def pin(
    context: typer.Context,
    revision: Annotated[str | None, typer.Argument(metavar="[REV]", help="pin this")] = None,
    json: JsonOption = False,
) -> None:
    """List pins, or keep a commit and its exact form whatever rules say."""
    repo = open_repo(context)
    if revision is None:
        pinned = [repo.entry(name) for name in sorted(repo.refs.targets("pins"))]
        if json:
            render.as_json([render.entry_json(entry) for entry in pinned])
        elif pinned:
            render.table(render.log_rows(pinned))
        return
    _set_pin(repo, revision, pinned=True, json=json)


def unpin(
    context: typer.Context,
    revision: Annotated[str, typer.Argument(metavar="REV", help="unpin this")],
    json: JsonOption = False,
) -> None:
    """Leave a commit to the rules again."""
    _set_pin(open_repo(context), revision, pinned=False, json=json)


def _set_pin(repo: Repo, revision: str, *, pinned: bool, json: bool) -> None:
    commit = repo.resolve(revision)
    changed = repo.pin(commit, pinned=pinned)
    if pinned:
        _warn(repo, commit)
    if json:
        render.as_json({"commit": commit, "pinned": pinned, "changed": changed})
    else:
        known = "" if changed else " already" if pinned else ", which was not pinned"
        render.data(f"{'pinned' if pinned else 'unpinned'} {commit[:8]}{known}")
