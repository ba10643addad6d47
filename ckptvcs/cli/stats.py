"""stats."""

from __future__ import annotations

from typer import Context

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.text import counted


def stats(context: Context, json: JsonOption = False) -> None:
    """Print sizes on disk."""
    sizes = open_repo(context).stats()
    dropped = counted(sizes.waiting, "dropped commit")
    waiting = [f"waiting   {dropped}; 'ckpt gc --dry-run' shows their size"]
    render.answer(
        vars(sizes) | {"ratio": sizes.ratio},
        f"commits   {sizes.commits}",
        f"committed {render.size(sizes.raw_bytes)}",
        f"stored    {render.size(sizes.stored_bytes)} in {sizes.packs} packs",
        f"  history {render.size(sizes.history_bytes)}",
        f"  patches {render.size(sizes.patch_bytes)}",
        f"cache     {render.size(sizes.cache_bytes)} (can be deleted)",
        *(waiting if sizes.waiting else []),
        entries.on_disk(sizes),
        json=json,
    )
