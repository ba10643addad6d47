"""log, show, status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, Revision, open_repo
from ckptvcs.errors import InvalidInputError
from ckptvcs.history.commit import ERROR_NAMES
from ckptvcs.history.log import LogEntry
from ckptvcs.repo import Repo
from ckptvcs.store.object import ObjectId

_DEFAULT_ENTRIES = 30


def log(
    context: typer.Context,
    revision: Annotated[str | None, typer.Argument(metavar="[REV]", help="start here")] = None,
    count: Annotated[int | None, typer.Option("-n", help="show at most this many")] = None,
    all_branches: Annotated[bool, typer.Option("--all", help="show every branch")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="draw every branch")] = False,
    json: JsonOption = False,
) -> None:
    """List commits, newest first."""
    repo = open_repo(context)
    if count is not None and count < 1:
        raise InvalidInputError("-n takes a number from 1")
    limit = count
    if limit is None and not json:
        limit = _DEFAULT_ENTRIES
    shown = None if limit is None else limit + 1
    if graph and not json:
        start = None if revision is None else repo.resolve(revision)
        rows = repo.history.graph(shown, start=start)
        listed = [place for place, (_, entry) in enumerate(rows) if entry is not None]
        more = limit is not None and len(listed) > limit
        end = listed[-2] + 1 if more else None
        table = render.graph_rows(rows[:end], repo.history.names())
    else:
        entries = repo.log(shown, revision=revision, all_branches=all_branches or graph)
        more = limit is not None and len(entries) > limit
        if json:
            render.as_json([render.entry_json(entry) for entry in entries[:limit]])
            return
        table = render.log_rows(entries[:limit])
    if len(table) == 1:
        render.talk("no commits yet")
        return
    render.table(table)
    if more and count is None:
        render.talk(
            f"the newest {limit}; -n shows more" if not graph else f"{limit} commits; -n shows more"
        )


def _parts_json(entry: LogEntry) -> dict[str, Any]:
    return {
        name: {"values": part.values, "exact": part.exact, "fidelity": entry.fidelity[name]}
        for name, part in entry.commit.parts.items()
    }


def _tensors_json(repo: Repo, entry: LogEntry) -> list[dict[str, Any]]:
    """The stored tensors of a commit, those that are near with their errors."""
    errors = repo.history.errors(entry.id)
    return [
        {"name": info.name, "part": info.part, "role": info.role, "dtype": info.dtype,
         "shape": list(info.shape), "evidence": info.evidence or None,
         "error": render.error_json(errors[number]) if number in errors else None}
        for number, info in enumerate(repo.catalog.schema(entry.commit.schema).tensors)
        if not info.inline
    ]  # fmt: skip


def _show_roles(repo: Repo, name: ObjectId) -> None:
    """The stored tensors of a commit, what they are taken for, and how they come back."""
    reader = repo.restorer(name)
    near, infos = reader.near(), reader.schema.tensors
    rows = [["tensor", "dtype", "shape", "part", "role", "evidence", "form"]]
    for number, info in enumerate(infos):
        if not info.inline:
            form = "near" if number in near else reader.fidelity[info.part].replace("near", "exact")
            rows.append([
                render.printable(info.name), info.dtype, " x ".join(map(str, info.shape)),
                info.part, info.role, info.evidence or "none", form,
            ])  # fmt: skip
    render.table(rows)


def show(
    context: typer.Context, revision: Revision = "HEAD",
    roles: Annotated[
        bool, typer.Option("--roles", help="List tensors with their roles and the evidence.")
    ] = False,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Show one commit and its files."""
    repo = open_repo(context)
    name = repo.resolve(revision)
    if roles and not json:
        _show_roles(repo, name)
        return
    tags, branch = repo.history.tags().get(name, ()), repo.history.branch_at(name)
    entry = repo.entry(name, branch=branch, tags=tags)
    made = entry.commit
    if json:
        files = [
            {"path": file.path, "bytes": file.size, "hash": file.hash, "format": file.format}
            for file in made.files
        ]
        render.as_json(
            render.entry_json(entry)
            | {"parts": _parts_json(entry), "files": files, "source": made.source,
               "path": made.path, "host": made.host, "user": made.user, "code": made.code,
               "tensors": _tensors_json(repo, entry)}
        )  # fmt: skip
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
        ("size", f"{render.size(made.raw_bytes)} -> {render.size(entry.stored_bytes)} "
                 f"({render.ratio(made.raw_bytes, entry.stored_bytes)})"),
        ("stored as", f"{made.codec}, {made.kind}, depth {made.depth}"),
        ("fidelity", ", ".join(f"{part} {form}" for part, form in entry.fidelity.items())),
        ("error", "" if entry.exact else ", ".join(
            f"{name} {getattr(made.error, name):.3g}" for name in ERROR_NAMES
        )),
    ]  # fmt: skip
    for label, value in rows:
        if value:
            render.data(f"{label:<10} {value}")
    listed = [["file", "bytes", "format"]]
    listed += [[render.printable(f.path), str(f.size), f.format] for f in made.files]
    render.data("")
    render.table(listed)


def status(context: typer.Context, json: JsonOption = False) -> None:
    """Show where HEAD is, and whether the checked-out files differ from it."""
    repo = open_repo(context)
    head, name = repo.head(), repo.revisions.head()
    branch = head.branch if head else None
    changes: list[tuple[str, Path]] = []
    if name is not None:
        changes = repo.worktree().changes(repo.restorer(name))
    step = repo.catalog.commit(name).step if name else None
    if json:
        render.as_json({
            "repository": str(repo.folder), "branch": branch, "detached": branch is None,
            "head": name, "step": step,
            "changes": [{"what": what, "path": str(path)} for what, path in changes],
        })  # fmt: skip
        return
    if name is None:
        render.data(f"on branch {branch}, no commits yet")
        return
    where = f"on branch {branch}" if branch else "on no branch"
    at = "" if step is None else f" (step {step})"
    render.data(f"{where}, at {name[:8]}{at}")
    words = {
        "missing": "not checked out", "changed": "differs from HEAD",
        "near": "checked out in near form",
    }  # fmt: skip
    for what, path in changes:
        render.data(f"  {words[what]}: {render.printable(str(path))}")
    if not changes:
        render.data("files are as in HEAD")
