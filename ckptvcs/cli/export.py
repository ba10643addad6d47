"""export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import Every, ExportFormat, Force, JsonOption, Part, Start, Stop, open_repo
from ckptvcs.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptvcs import Exported


def export(
    context: Context,
    revision: Annotated[str | None, Argument(metavar="[REV]", help="commit")] = None,
    path: Annotated[
        Path | None, Argument(metavar="[PATH]", help="output file or directory")
    ] = None,
    folder: Annotated[
        Path | None, Option("--all", metavar="DIR", help="output directory for all commits")
    ] = None,
    form: ExportFormat = None,
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
        write: Callable[..., Exported | list[Exported]] = partial(
            repo.export_line, folder, start=start, stop=stop, every=every, revision=revision
        )
    elif revision is None or path is None:
        raise InvalidInputError("no output path", hint="pass REV PATH, or --all DIR")
    else:
        entries = [repo.show(revision)]
        write = partial(repo.export, revision, path)
    with render.progress("exporting", sum(entry.commit.raw_bytes for entry in entries)) as tick:
        written = write(form=form, only=only, force=force, progress=tick)
    files = written if isinstance(written, list) else [written]
    render.answer(
        [render.attributes(file, "entry.id entry.step path exact") for file in files],
        *(render.printable(str(file.path)) for file in files),
        json=json,
    )
