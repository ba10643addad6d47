"""fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import BundleFile, JsonOption, open_repo
from ckptvcs.repo import Repo
from ckptvcs.text import counted

if TYPE_CHECKING:
    from ckptvcs import Fetched


def fetch(
    context: Context,
    file: BundleFile,
    branch: Annotated[
        str | None,
        Option(metavar="NAME", help="branch for the commits (default: that in the file)"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Add the commits of a bundle file."""
    repo = open_repo(context)
    with render.progress("fetching", None) as tick:
        done = repo.fetch(file, branch=branch, progress=tick)
    if json:
        render.as_json(
            {
                "added": list(done.added),
                "restored": list(done.restored),
                "exact_again": list(done.exact_again),
                "known": list(done.known),
                "notes": done.notes,
                "refs": dict(done.refs),
                "kept_tags": list(done.kept),
                "bytes": done.size_bytes,
            }
        )
        return
    _tell(repo, done)


def _tell(repo: Repo, done: Fetched) -> None:
    parts = [counted(len(done.added), "commit")]
    parts += [f"{len(done.known)} known"] if done.known else []
    parts += [counted(done.notes, "note")] if done.notes else []
    render.data(f"fetched {', '.join(parts)}, {render.size(done.size_bytes)}")
    if done.restored:
        render.data(f"restored: {entries.ids(done.restored)}")
    if done.exact_again:
        render.data(f"exact again: {entries.ids(done.exact_again)}")
    for ref, name in done.refs.items():
        space, _, short = ref.partition("/")
        if space == "pins":
            render.data(f"pinned: {name[:8]}, so that it stays exact")
            continue
        kind = "branch" if space == "heads" else "tag"
        render.data(f"{kind} {short}: {entries.commit_name(repo.entry(name))}")
    for tag in done.kept:
        render.talk(f"note: tag '{tag}' names another commit here; it stays")
    if any(f"pins/{name}" not in done.refs for name in done.exact_again):
        render.talk(
            "note: a later commit or gc makes them near again; 'ckpt pin REV' keeps one exact"
        )
