"""config."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import InvalidInputError


def config(
    context: Context,
    key: Annotated[str | None, Argument(metavar="[KEY]", help="setting")] = None,
    value: Annotated[str | None, Argument(metavar="[VALUE]", help="new value")] = None,
    unset: Annotated[bool, Option("--unset", help="restore the default")] = False,
    json: JsonOption = False,
) -> None:
    """List, read or change settings."""
    repo = open_repo(context)
    if unset and (key is None or value is not None):
        raise InvalidInputError("--unset requires KEY and no VALUE")
    if key is None:
        settings = repo.settings()
        if json:
            render.as_json(settings)
        else:
            render.table([["setting", "value"], *([k, str(v)] for k, v in settings.items())])
        return
    if value is not None or unset:
        repo.configure(key, value)
    setting = repo.setting(key)
    render.answer({key: setting}, str(setting), json=json)
