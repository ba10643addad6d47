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

PARTS = ("model", "optimizer", "rest")

JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]

Revision = Annotated[
    str, typer.Argument(metavar="REV", help="step, tag, branch, id, HEAD~2, best:loss:min ...")
]


Start = Annotated[str | None, typer.Option(metavar="REV", help="first step or revision")]
Stop = Annotated[str | None, typer.Option(metavar="REV", help="last step or revision, included")]
Every = Annotated[int | None, typer.Option(metavar="STEPS", help="select multiples of STEPS")]
Force = Annotated[bool, typer.Option("--force", help="overwrite existing files")]


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
    return Repo.locate(context.find_root().obj.repo or os.environ.get("CKPT_DIR") or None)


def open_repo(context: typer.Context) -> Repo:
    """The repository there.

    Raises:
        NotFoundError: there is none.
    """
    repo = Repo(locate(context))
    try:
        repo.settings()
    except InvalidInputError as error:  # which is an error where they are needed
        render.talk(f"warning: {error.message}")
    return repo


def check_part(only: str | None) -> None:
    """Raise InvalidInputError where `--only` names no part."""
    if only is not None and only not in PARTS:
        raise InvalidInputError(f"no part '{only}'", hint=f"parts: {', '.join(PARTS)}")
