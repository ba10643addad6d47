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
    rows = [["name", "dtype", "shape", "part", "role", "evidence", "form"]]
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


def _json(repo: Repo, entry: LogEntry) -> dict[str, Any]:
    commit = entry.commit
    files = [
        {"path": file.path, "bytes": file.size, "hash": file.hash, "format": file.format}
        for file in commit.files
    ]
    return render.entry_json(entry) | {
        "parts": _parts_json(entry),
        "files": files,
        "source": commit.source,
        "path": commit.path,
        "host": commit.host,
        "user": commit.user,
        "code": commit.code,
        "tensors": _tensors_json(repo, entry.id),
    }


def _fields(entry: LogEntry) -> list[tuple[str, str]]:
    """Return the labels and values to print; an empty value is left out."""
    commit = entry.commit
    raw, stored = commit.raw_bytes, entry.stored_bytes
    measured = {} if entry.exact else asdict(commit.error)
    errors = [f"{name} {value:.3g}" for name, value in measured.items()]
    return [
        ("commit", entry.id),
        ("parents", " ".join(commit.parents) or "none"),
        ("tags", " ".join(entry.tags)),
        ("step", "" if commit.step is None else str(commit.step)),
        ("time", commit.time),
        ("by", f"{commit.user}@{commit.host}"),
        ("code", commit.code or ""),
        ("message", render.printable(entry.message)),
        ("metrics", render.metrics(entry.metrics)),
        ("fields", render.fields(entry.fields)),
        ("size", f"{render.size(raw)} -> {render.size(stored)} ({render.ratio(raw, stored)})"),
        ("stored as", f"{commit.codec}, {commit.kind}, depth {commit.depth}"),
        ("fidelity", ", ".join(f"{part} {form}" for part, form in entry.fidelity.items())),
        ("error", ", ".join(errors[:3])),
        ("", ", ".join(errors[3:])),
    ]


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
    if json:
        render.as_json(_json(repo, entry))
        return
    for label, value in _fields(entry):
        if value:
            render.data(f"{label:<10} {value}")
    listed = [["file", "bytes", "format"]]
    listed += [[render.printable(f.path), str(f.size), f.format] for f in entry.commit.files]
    render.data("")
    render.table(listed)
