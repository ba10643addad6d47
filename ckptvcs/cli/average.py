"""average."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Every, Force, JsonOption, free_target, open_repo
from ckptvcs.errors import NotFoundError
from ckptvcs.history.revision import split_range


def average(
    context: typer.Context,
    revisions: Annotated[str, typer.Argument(metavar="REV..REV", help="both ends included")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PATH", help="the checkpoint to write")
    ],
    every: Every = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write the mean of the weights of several commits."""
    from ckptvcs.average import write_average
    from ckptvcs.files.targets import Targets

    start, stop = split_range(revisions)
    repo = open_repo(context)
    names = repo.history.line(start, stop, every)
    if not names:
        raise NotFoundError("no commit lies between these", hint="'ckpt log' lists them")
    commits = [repo.catalog.commit(name) for name in names]
    size_bytes = sum(commit.raw_bytes for commit in commits)
    with Targets() as looks:
        place = free_target(looks, output, force=force)
        with render.progress("averaging", size_bytes) as tick:
            write_average(repo.catalog, names, place, tick, force=force)
    if json:
        render.as_json({
            "path": str(output), "commits": names, "steps": [commit.step for commit in commits],
        })  # fmt: skip
        return
    shown = render.printable(str(output))
    render.data(f"{shown}: the mean of {len(names)} commits, all else from {names[-1][:8]}")
