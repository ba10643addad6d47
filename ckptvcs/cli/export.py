"""export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Every, Force, JsonOption, Part, Start, Stop, open_repo
from ckptvcs.errors import InvalidInputError

Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="pt|safetensors", help="output format (default: as committed)"
    ),
]


def export(
    context: typer.Context,
    revision: Annotated[str | None, typer.Argument(metavar="[REV]", help="commit")] = None,
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="output file or directory")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--all", metavar="DIR", help="output directory for all commits")
    ] = None,
    form: Format = None,
    only: Part = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write one commit, or many with --all, as files."""
    repo = open_repo(context)
    if folder is not None:
        if path is not None:
            raise InvalidInputError(
                "--all DIR cannot be combined with PATH", hint="use 'ckpt export [REV] --all DIR'"
            )
        entries = repo.line(start, stop, every, revision=revision)
    elif revision is None or path is None:
        raise InvalidInputError("no output path", hint="pass REV PATH, or --all DIR")
    else:
        entries = [repo.show(revision)]
    with render.progress("exporting", sum(entry.commit.raw_bytes for entry in entries)) as tick:
        if folder is not None:
            written = repo.export_line(
                folder,
                start=start,
                stop=stop,
                every=every,
                revision=revision,
                form=form,
                only=only,
                force=force,
                progress=tick,
            )
        elif revision is not None and path is not None:
            written = [
                repo.export(revision, path, form=form, only=only, force=force, progress=tick)
            ]
    if json:
        render.as_json(
            [
                {"id": e.entry.id, "step": e.entry.step, "path": str(e.path), "exact": e.exact}
                for e in written
            ]
        )
        return
    for file in written:
        render.data(render.printable(str(file.path)))
