"""clone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from ckptvcs.cli import render
from ckptvcs.cli.context import BundleFile, JsonOption
from ckptvcs.repo import Repo
from ckptvcs.text import counted


def clone(
    file: BundleFile,
    directory: Annotated[
        Path | None,
        Argument(metavar="[DIR]", help="directory for the repository (default: name of FILE)"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a repository from a bundle file."""
    with render.progress("cloning", None) as tick:
        repo = Repo.clone(file, directory, progress=tick)
    entries = repo.log(all_branches=True)
    whole = [entry for entry in entries if set(entry.fidelity.values()) != {"dropped"}]
    head = repo.head()
    branch = head.branch if head is not None else None
    if json:
        render.as_json(
            {
                "path": str(repo.root),
                "branch": branch,
                "commits": [entry.id for entry in whole],
                "left_out": len(entries) - len(whole),
            }
        )
        return
    count = counted(len(whole), "commit")
    where = render.printable(str(directory or file.stem))
    render.data(f"cloned into {where}: {count}, branch {branch}")
    if len(whole) < len(entries):
        others = counted(len(entries) - len(whole), "other commit")
        render.talk(f"note: the log lists {others} that the file does not contain")
