"""average."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import Every, Force, JsonOption, open_repo, split_range
from ckptvcs.text import counted


def average(
    context: Context,
    revisions: Annotated[
        str, Argument(metavar="REV..REV", help="first and last commit, both included")
    ],
    output: Annotated[Path, Option("-o", "--output", metavar="PATH", help="output checkpoint")],
    every: Every = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write the mean weights of several commits."""
    start, stop = split_range(revisions)
    repo = open_repo(context)
    entries = repo.line(start, stop, every)
    with render.progress("averaging", sum(entry.commit.raw_bytes for entry in entries)) as tick:
        names = repo.average(start, stop, output, every=every, force=force, progress=tick)
    shown = render.printable(str(output))
    render.answer(
        {"path": output, "commits": names, "steps": [entry.step for entry in entries]},
        f"{shown}: mean weights of {counted(len(names), 'commit')}; "
        f"other values from {names[-1][:8]}",
        json=json,
    )
