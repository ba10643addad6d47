"""checkout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, Revision, check_part, open_repo
from ckptvcs.errors import InvalidInputError, after

if TYPE_CHECKING:
    from ckptvcs import Commit


def checkout(
    context: typer.Context,
    revision: Revision,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="PATH", help="output path (does not move HEAD)"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite uncommitted files")] = False,
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="part: model, optimizer or rest")
    ] = None,
    require: Annotated[str | None, typer.Option(metavar="exact", help="required fidelity")] = None,
    json: JsonOption = False,
) -> None:
    """Restore the files of a commit."""
    if output == "-":
        raise InvalidInputError(
            "checkpoints are not written to stdout", hint="name a file: -o model.pt"
        )
    if require not in (None, "exact"):
        raise InvalidInputError(f"--require takes 'exact', not '{require}'")
    check_part(only)
    repo = open_repo(context)
    name = repo.resolve(revision)
    entry = repo.entry(name)
    target, exactly = Path(output) if output else None, require is not None
    where = None
    if only:
        done = repo.checkout_part(
            name,
            only,
            target,
            force=force,
            exact=exactly,
            announce=_ignore if target else _announce_part,
        )
    else:
        with render.progress("checking out", entry.commit.raw_bytes) as tick:
            done = repo.checkout_files(
                name,
                target,
                force=force,
                exact=exactly,
                progress=tick,
                announce=_ignore if target else partial(_announce, entry.commit),
            )
        with after("" if target else "the files were written"):
            where = None if target else repo.move_head(revision)
    paths, forms = list(done.paths), done.fidelity  # an exact form may have faded by now
    exact = all(form == "exact" for form in forms.values())
    if json:
        render.as_json(
            {
                "id": name,
                "step": entry.commit.step,
                "paths": [str(path) for path in paths],
                "fidelity": forms,
                "exact": exact,
                "branch": where,
            }
        )
        return
    form = render.fidelity(replace(entry, fidelity=forms))
    shown = render.printable(str(paths[0])) if len(paths) == 1 else f"{len(paths)} files"
    step = "" if entry.commit.step is None else f" step {entry.commit.step},"
    render.data(f"{shown}:{step} {name[:8]}, {form}")
    if target is None and not only and where is None:
        render.talk("note: HEAD is at an older commit; the next commit starts a branch")


def _ignore(_: Path) -> None:
    """The user has named the place."""


def _announce(commit: Commit, place: Path) -> None:
    """Say where the files of a commit are about to go, which the commit says."""
    count = sum(file.skeleton is not None for file in commit.files)
    files = f"{count} file{'s' if count != 1 else ''} to "
    render.talk(f"writing {files if commit.source == 'directory' else ''}{place}")


def _announce_part(place: Path) -> None:
    render.talk(f"writing {place}")
