"""show."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, Revision, open_repo
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from ckptvcs import LogEntry, ObjectId


def _parts_json(entry: LogEntry) -> dict[str, Any]:
    return {
        name: {"values": part.values, "exact": part.exact, "fidelity": entry.fidelity[name]}
        for name, part in entry.commit.parts.items()
    }


def _tensors_json(repo: Repo, name: ObjectId) -> list[dict[str, Any]]:
    """The stored tensors of a commit, those that are near with their errors."""
    return [
        {
            "name": one.name,
            "part": one.part,
            "role": one.role,
            "dtype": one.dtype,
            "shape": list(one.shape),
            "evidence": one.evidence or None,
            "error": None if one.error is None else render.error_json(one.error),
        }
        for one in repo.tensors(name)
    ]


def _show_roles(repo: Repo, name: ObjectId) -> None:
    """The stored tensors of a commit, what they are taken for, and how they come back."""
    rows = [["tensor", "dtype", "shape", "part", "role", "evidence", "form"]]
    for one, form in zip(repo.tensors(name), repo.forms(name), strict=True):
        rows.append(
            [
                render.printable(one.name),
                one.dtype,
                " x ".join(map(str, one.shape)),
                one.part,
                one.role,
                one.evidence or "none",
                form,
            ]
        )
    render.table(rows)


def show(
    context: typer.Context,
    revision: Revision = "HEAD",
    roles: Annotated[bool, typer.Option("--roles", help="list tensors with their roles")] = False,
    json: JsonOption = False,
) -> None:
    """Print one commit and its files."""
    repo = open_repo(context)
    name = repo.resolve(revision)
    if roles and not json:
        _show_roles(repo, name)
        return
    entry = repo.show(name)
    made = entry.commit
    if json:
        files = [
            {"path": file.path, "bytes": file.size, "hash": file.hash, "format": file.format}
            for file in made.files
        ]
        render.as_json(
            render.entry_json(entry)
            | {
                "parts": _parts_json(entry),
                "files": files,
                "source": made.source,
                "path": made.path,
                "host": made.host,
                "user": made.user,
                "code": made.code,
                "tensors": _tensors_json(repo, name),
            }
        )
        return
    rows = [
        ("commit", entry.id),
        ("parents", " ".join(made.parents) or "none"),
        ("tags", " ".join(entry.tags)),
        ("step", "" if made.step is None else str(made.step)),
        ("time", made.time),
        ("by", f"{made.user}@{made.host}"),
        ("code", made.code or ""),
        ("message", render.printable(made.message)),
        ("metrics", render.metrics(made.metrics)),
        (
            "size",
            f"{render.size(made.raw_bytes)} -> {render.size(entry.stored_bytes)} "
            f"({render.ratio(made.raw_bytes, entry.stored_bytes)})",
        ),
        ("stored as", f"{made.codec}, {made.kind}, depth {made.depth}"),
        ("fidelity", ", ".join(f"{part} {form}" for part, form in entry.fidelity.items())),
        (
            "error",
            ""
            if entry.exact
            else ", ".join(f"{name} {value:.3g}" for name, value in asdict(made.error).items()),
        ),
    ]
    for label, value in rows:
        if value:
            render.data(f"{label:<10} {value}")
    listed = [["file", "bytes", "format"]]
    listed += [[render.printable(f.path), str(f.size), f.format] for f in made.files]
    render.data("")
    render.table(listed)
