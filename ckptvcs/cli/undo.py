"""undo."""

from __future__ import annotations

from typer import Context

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo


def undo(context: Context, json: JsonOption = False) -> None:
    """Undo the last move or drop of the current branch."""
    repo = open_repo(context)
    done = repo.undo()
    at = f", now at {done.commit[:8]}" if done.commit else ", now without commits"
    render.answer(
        {
            "undone": done.what,
            "branch": done.branch,
            "commit": done.commit,
            "abandoned": done.abandoned,
        },
        f"undone: {done.what}; branch {done.branch}{at}",
        json=json,
    )
    if done.abandoned:
        render.talk(
            f"note: the next gc deletes {done.abandoned[:8]}; "
            f"'ckpt branch NAME {done.abandoned[:8]}' keeps it"
        )
