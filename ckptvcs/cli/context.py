"""What every command needs: the repository it works on, and its options."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo

JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]

Revision = Annotated[
    str, typer.Argument(metavar="REV", help="a step, tag, branch, id, HEAD~2, best:loss:min ...")
]


@dataclass(frozen=True)
class Globals:
    """The options before the command."""

    repo: Path | None


def locate(context: typer.Context) -> Path:
    """The folder of the repository named by --repo or CKPT_DIR, else of that found upward from the
    working directory.

    Raises:
        NotFoundError: there is none.
    """
    named = context.find_root().obj.repo or os.environ.get("CKPT_DIR")
    return Repo.locate(named) if named else Repo.locate_above(Path.cwd())


def open_repo(context: typer.Context) -> Repo:
    """The repository there.

    Raises:
        NotFoundError: there is none.
    """
    repo = Repo(locate(context))
    try:
        _ = repo.config
    except InvalidInputError as error:  # which is an error where they are needed
        render.talk(f"warning: {error.message}")
    return repo
