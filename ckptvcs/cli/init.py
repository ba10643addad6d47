"""init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption
from ckptvcs.repo import Repo


def init(
    context: typer.Context,
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="directory (default: current)")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="NAME", help="default codec: near, small or lossless")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Create a repository."""
    folder = directory or context.find_root().obj.repo or Path()
    if folder.name == ".ckpt":
        folder = folder.parent
    known = Repo.exists(folder)
    repo = Repo.init(folder, codec=codec)
    if json:
        render.as_json({"repository": str(repo.folder), "created": not known})
    else:
        render.data(f"{'repository exists' if known else 'created repository'}: {repo.folder}")
