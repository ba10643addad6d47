"""average."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import Every, Force, JsonOption, open_repo, split_range
from ckptvcs.errors import InvalidInputError
from ckptvcs.text import counted


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidInputError(
            f"invalid weights '{text}'", hint="write --weights 1,2,3"
        ) from error


def average(
    context: Context,
    output: Annotated[Path, Option("-o", "--output", metavar="PATH", help="output checkpoint")],
    revisions: Annotated[
        str | None, Argument(metavar="[REV..REV]", help="first and last commit, both included")
    ] = None,
    every: Every = None,
    last: Annotated[
        int | None, Option("--last", metavar="N", min=1, help="only the newest N commits")
    ] = None,
    best: Annotated[
        str | None, Option("--best", metavar="METRIC[:max]:N", help="only the best N by a metric")
    ] = None,
    weights: Annotated[
        str | None, Option("--weights", metavar="A,B,C", help="weights, oldest commit first")
    ] = None,
    like: Annotated[
        str | None,
        Option("--like", metavar="DECAY", help="emulate a decay: linear, cosine, inverse-sqrt"),
    ] = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write the mean weights of several commits."""
    if revisions is None and last is None and best is None:
        raise InvalidInputError("no commits are named", hint="give REV..REV, --last or --best")
    start, stop = (None, None) if revisions is None else split_range(revisions)
    numbers = None if weights is None else _numbers(weights)
    repo = open_repo(context)
    with render.progress("averaging", None) as tick:
        names = repo.average(
            start,
            stop,
            output,
            every=every,
            best=best,
            last=last,
            weights=numbers,
            like=like,
            force=force,
            progress=tick,
        )
    entries = [repo.show(name) for name in names]
    shown = render.printable(str(output))
    kind = f"mean weights, like a {like} decay," if like else "mean weights"
    render.answer(
        {"path": output, "commits": names, "steps": [entry.step for entry in entries]},
        f"{shown}: {kind} of {counted(len(names), 'commit')}; other values from {names[-1][:8]}",
        json=json,
    )
