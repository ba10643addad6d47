"""init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption
from ckptvcs.repo import Repo


def init(
    context: Context,
    directory: Annotated[
        Path | None, Argument(metavar="[DIR]", help="directory (default: current)")
    ] = None,
    codec: Annotated[
        str | None, Option(metavar="NAME", help="default codec: near or lossless")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Create a repository."""
    folder = directory or context.find_root().obj.repo or Path()
    if folder.name == ".ckpt":
        folder = folder.parent
    exists = Repo.exists(folder)
    repo = Repo.init(folder, codec=codec)
    render.answer(
        {"repository": repo.folder, "created": not exists},
        f"{'repository exists' if exists else 'created repository'}: {repo.folder}",
        json=json,
    )
