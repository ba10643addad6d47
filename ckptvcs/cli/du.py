"""du."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo

if TYPE_CHECKING:
    from ckptvcs import UsageRow

_MOST_KINDS = 2  # in a line


def du(
    context: Context,
    revisions: Annotated[
        list[str] | None, Argument(metavar="[REV]...", help="only the bytes of these commits")
    ] = None,
    by: Annotated[
        Literal["kind", "commit", "part", "layer", "tensor"],
        Option(metavar="GROUP", help="kind, commit, part, layer or tensor"),
    ] = "kind",
    json: JsonOption = False,
) -> None:
    """Print what takes the space on disk."""
    found = open_repo(context).disk_usage(revisions or (), by=by)
    if json:
        rows = [
            {
                "name": row.name,
                "commit": row.commit,
                "step": row.step,
                "bytes": row.size_bytes,
                "kinds": dict(row.kinds),
            }
            for row in found.rows
        ]
        render.as_json({"by": found.by, "bytes": found.size_bytes, "rows": rows})
        return
    total = max(1, found.size_bytes)
    table = [["name", "size", "share", "note"]]
    table += [[*_head(row, total), _note(row)] for row in found.rows]
    table.append(["total", render.size(found.size_bytes), "100.0%", ""])
    render.table(table)


_NOTES = {
    "keyframe": "weights without a base",
    "delta": "changes of weights since the commit before",
    "patch": "keep commits exact, until rules let them go",
    "other tensors": "buffers, random state, whatever is not lossy",
    "structure": "commits, names, file templates, hashes",
    "unused": "the next gc can delete it",
    "refs": "branches, tags, settings",
    "cache": "can be deleted at any time",
}


def _head(row: UsageRow, total: int) -> list[str]:
    name = render.printable(row.name)
    if row.commit is not None:
        name = row.commit[:8] + ("" if row.step is None else f" step {row.step}")
    return [name, render.size(row.size_bytes), f"{100 * row.size_bytes / total:.1f}%"]


def _note(row: UsageRow) -> str:
    """Explain a kind, or name the kinds of a group, the largest first."""
    if [*row.kinds] == [row.name]:
        return _NOTES.get(row.name, "optimizer moments")
    parts = [f"{kind} {render.size(count)}" for kind, count in row.kinds.items() if count]
    more = ", ..." if len(parts) > _MOST_KINDS else ""
    return ", ".join(parts[:_MOST_KINDS]) + more
