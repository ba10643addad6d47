"""pin, unpin."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Context

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.cli.listing import show_log, warn_if_faded
from ckptvcs.repo import Repo


def pin(
    context: Context,
    revision: Annotated[str | None, Argument(metavar="[REV]", help="commit to pin")] = None,
    json: JsonOption = False,
) -> None:
    """Keep a commit exact under every rule, or list pins."""
    repo = open_repo(context)
    if revision is None:
        pinned = repo.pins()
        if json:
            render.as_json([entries.entry_json(entry) for entry in pinned])
        elif pinned:
            show_log(repo, [("", entry) for entry in pinned])
        return
    _set_pin(repo, revision, pinned=True, json=json)


def unpin(
    context: Context,
    revision: Annotated[str, Argument(metavar="REV", help="pinned commit")],
    json: JsonOption = False,
) -> None:
    """Remove a pin."""
    _set_pin(open_repo(context), revision, pinned=False, json=json)


def _set_pin(repo: Repo, revision: str, *, pinned: bool, json: bool) -> None:
    commit = repo.resolve(revision)
    changed = repo.pin(commit, pinned=pinned)
    if pinned:
        warn_if_faded(repo.entry(commit))
    action, state = ("pinned", "already pinned") if pinned else ("unpinned", "not pinned")
    render.answer(
        {"commit": commit, "pinned": pinned, "changed": changed},
        f"{action} {commit[:8]}" if changed else f"{commit[:8]} is {state}",
        json=json,
    )
