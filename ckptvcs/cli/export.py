"""export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Every, Force, JsonOption, Start, Stop, free_target, open_repo
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.commit import PARTS
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId

_FORMATS = ("pt", "safetensors")


def export(
    context: typer.Context,
    revision: Annotated[str | None, typer.Argument(metavar="[REV]", help="a commit")] = None,
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="its file")] = None,
    folder: Annotated[
        Path | None, typer.Option("--all", metavar="DIR", help="every commit of a line, by step")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="pt|safetensors", help="else as committed")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="one part: model, optimizer or rest")
    ] = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write commits as files: one, or with --all those of a line."""
    from ckptvcs.decode.trajectory import export as write_commits
    from ckptvcs.files.targets import Targets

    if form not in (None, *_FORMATS):
        raise InvalidInputError(f"no format '{form}'", hint=f"formats: {', '.join(_FORMATS)}")
    if only is not None and only not in PARTS:
        raise InvalidInputError(f"no part '{only}'", hint=f"parts: {', '.join(PARTS)}")
    repo = open_repo(context)
    if folder is not None:
        if path is not None:
            raise InvalidInputError("--all DIR takes no PATH", hint="ckpt export [REV] --all DIR")
        names = repo.history.line(start, stop, every, revision=revision)
        targets = [folder / name for name in _file_names(repo, names, form, only)]
    elif revision is None or path is None:
        raise InvalidInputError("nothing to export to", hint="REV PATH, or --all DIR")
    else:
        names, targets = [repo.resolve(revision)], [path]
        if form and path.suffix == ".safetensors" and form != "safetensors":
            raise InvalidInputError(f"{path} is no name for --format {form}")
        if form == "safetensors" and path.suffix != ".safetensors":
            targets = [path.with_name(f"{path.name}.safetensors")]
    if not names:
        raise NotFoundError("no commit lies between these", hint="'ckpt log' lists them")
    entries = [repo.entry(name) for name in names]
    size_bytes = sum(entry.commit.raw_bytes for entry in entries)
    with Targets() as looks:
        places = [free_target(looks, target, force=force) for target in targets]
        with render.progress("exporting", size_bytes) as tick:
            write_commits(repo.catalog, names, places, only, tick, force=force)
    if json:
        render.as_json([
            {"id": entry.id, "step": entry.step, "path": str(target),
             "exact": entry.fidelity.get(only, "") == "exact" if only else entry.exact}
            for entry, target in zip(entries, targets, strict=True)
        ])  # fmt: skip
        return
    for target in targets:
        render.data(render.printable(str(target)))


def _file_names(repo: Repo, names: list[ObjectId], form: str | None, only: str | None) -> list[str]:
    """A name for each commit: its step, and its id where that alone would not tell it apart."""
    commits = [repo.catalog.commit(name) for name in names]
    steps = Counter(commit.step for commit in commits)
    found = []
    for name, commit in zip(names, commits, strict=True):
        stem = f"commit-{name[:8]}" if commit.step is None else f"step-{commit.step}"
        if commit.step is not None and steps[commit.step] > 1:
            stem += f"-{name[:8]}"
        suffix = form or "pt"
        if form is None and all(f.format == "safetensors" for f in commit.files):
            suffix = "safetensors"
        whole = form is None and only is None and commit.source == "directory"
        found.append(stem if whole else f"{stem}.{suffix}")
    return found
