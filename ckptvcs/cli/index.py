"""index."""

from __future__ import annotations

from typing import Annotated

from typer import Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import InvalidInputError


def index(
    context: Context,
    rebuild: Annotated[bool, Option("--rebuild", help="rebuild the index")] = False,
    json: JsonOption = False,
) -> None:
    """Rebuild the index from the packs."""
    if not rebuild:
        raise InvalidInputError("nothing to do", hint="run 'ckpt index --rebuild'")
    packs = open_repo(context).rebuild_index()
    render.answer({"packs": packs}, f"indexed {packs} packs", json=json)
