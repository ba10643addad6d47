"""stats."""

from __future__ import annotations

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo


def stats(context: typer.Context, json: JsonOption = False) -> None:
    """Print sizes on disk."""
    found = open_repo(context).stats()
    if json:
        render.as_json(
            {
                "commits": found.commits,
                "raw_bytes": found.raw_bytes,
                "stored_bytes": found.stored_bytes,
                "history_bytes": found.history_bytes,
                "patch_bytes": found.patch_bytes,
                "cache_bytes": found.cache_bytes,
                "packs": found.packs,
                "ratio": found.ratio,
            }
        )
        return
    render.data(f"commits   {found.commits}")
    render.data(f"committed {render.size(found.raw_bytes)}")
    render.data(f"stored    {render.size(found.stored_bytes)} in {found.packs} packs")
    render.data(f"  history {render.size(found.history_bytes)}")
    render.data(f"  patches {render.size(found.patch_bytes)}")
    render.data(f"cache     {render.size(found.cache_bytes)} (can be deleted)")
    render.data(f"ratio     {render.ratio(found.raw_bytes, found.stored_bytes)}")
