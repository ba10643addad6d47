"""commit, checkout, log, show, status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.history.commit import ERROR_NAMES, PARTS
from ckptvcs.repo import LogEntry, Repo
from ckptvcs.store.object import ObjectId

_DEFAULT_ENTRIES = 30

Revision = Annotated[
    str, typer.Argument(metavar="REV", help="a step, tag, branch, id, HEAD~2, best:loss:min ...")
]


def _metric(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        equals = ""
    if not name or not equals:
        raise InvalidInputError(f"'{text}' is no metric", hint="write --metric loss=2.31")
    return name, number


def _size_of(path: Path) -> int | None:
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size
    except OSError:
        return None


def commit(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a checkpoint file or directory")],
    message: Annotated[str, typer.Option("-m", "--message", help="what to remember it by")] = "",
    step: Annotated[int | None, typer.Option(help="training step; else found")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="a metric; may be repeated")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="near, small, lossless, excp; near:step=1.5 for more")
    ] = None,
    branch: Annotated[
        str | None, typer.Option(help="commit to this branch, leaving HEAD where it is")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="store bytes, look for no structure")] = False,
    json: JsonOption = False,
) -> None:
    """Store a checkpoint as the next commit."""
    repo = open_repo(context)
    metrics = dict(_metric(text) for text in metric or [])
    with render.progress("committing", _size_of(path)) as tick:
        result = repo.commit_path(
            path, message=message, step=step, metrics=metrics, codec=codec, branch=branch,
            raw=raw, progress=tick,
        )  # fmt: skip
    for note in result.notes:
        render.talk(f"note: {note}")
    entry = repo.entry(result.id, branch=result.branch)
    if json:
        render.as_json(render.entry_json(entry))
        return
    made = entry.commit
    where = f"{result.branch} {entry.id[:8]}"
    title = "" if made.step is None else f" step {made.step}"
    render.data(f"[{where}]{title} {render.printable(made.message)}".rstrip())
    render.data(
        f"  {render.size(made.raw_bytes)} -> {render.size(entry.stored_bytes)}"
        f" ({render.ratio(made.raw_bytes, entry.stored_bytes)}), {made.kind},"
        f" depth {made.depth}, {render.fidelity(entry)}"
    )


def log(
    context: typer.Context,
    revision: Annotated[str | None, typer.Argument(metavar="[REV]", help="start here")] = None,
    count: Annotated[int | None, typer.Option("-n", help="show at most this many")] = None,
    all_branches: Annotated[bool, typer.Option("--all", help="show every branch")] = False,
    json: JsonOption = False,
) -> None:
    """List commits, newest first."""
    repo = open_repo(context)
    if count is not None and count < 1:
        raise InvalidInputError("-n takes a number from 1")
    limit = count
    if limit is None and not json and render.is_terminal():
        limit = _DEFAULT_ENTRIES
    shown = None if limit is None else limit + 1
    entries = repo.log(shown, revision=revision, all_branches=all_branches)
    more = limit is not None and len(entries) > limit
    entries = entries[:limit]
    if json:
        render.as_json([render.entry_json(entry) for entry in entries])
    elif not entries:
        render.talk("no commits yet")
    else:
        render.table(render.log_rows(entries))
        if more and count is None:
            render.talk(f"the newest {limit}; -n shows more")


def _parts_json(entry: LogEntry) -> dict[str, Any]:
    return {
        name: {"values": part.values, "exact": part.exact, "fidelity": entry.fidelity[name]}
        for name, part in entry.commit.parts.items()
    }


def _tensors_json(repo: Repo, entry: LogEntry) -> list[dict[str, Any]]:
    """The stored tensors of a commit, those that are near with their errors."""
    errors = repo.tensor_errors(entry.id)
    return [
        {"name": info.name, "part": info.part, "role": info.role, "dtype": info.dtype,
         "shape": list(info.shape),
         "error": render.error_json(errors[number]) if number in errors else None}
        for number, info in enumerate(repo.catalog.schema(entry.commit.schema).tensors)
        if not info.inline
    ]  # fmt: skip


def show(context: typer.Context, revision: Revision = "HEAD", json: JsonOption = False) -> None:
    """Show one commit and its files."""
    repo = open_repo(context)
    name = repo.resolve(revision)
    entry = repo.entry(name, tags=repo.tags().get(name, ()))
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


def checkout(
    context: typer.Context,
    revision: Revision,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH", help="write here; HEAD stays")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite uncommitted files")] = False,
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="one part: model, optimizer or rest")
    ] = None,
    require: Annotated[
        str | None, typer.Option(metavar="exact", help="refuse anything but this fidelity")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write the files of a commit as they were."""
    if output == "-":
        raise InvalidInputError(
            "checkpoints are not written to stdout", hint="name a file: -o model.pt"
        )
    if require not in (None, "exact"):
        raise InvalidInputError(f"--require takes 'exact', not '{require}'")
    if only is not None and only not in PARTS:
        raise InvalidInputError(f"no part '{only}'", hint=f"parts: {', '.join(PARTS)}")
    repo = open_repo(context)
    name = repo.resolve(revision)
    entry = repo.entry(name)
    wanted = {only: entry.fidelity.get(only, "")} if only else dict(entry.fidelity)
    if require and any(form == "near" for form in wanted.values()):
        raise ConflictError(
            f"commit {name[:8]} can only be restored in near form ({render.fidelity(entry)})",
            hint="leave out --require exact to take it as it is",
        )
    target = Path(output) if output else None
    if only:
        paths, where = [_checkout_part(repo, name, only, target, force=force)], None
    else:
        with render.progress("checking out", entry.commit.raw_bytes) as tick:
            done = repo.checkout_files(name, target, force=force, progress=tick)
        paths = list(done.paths)
        where = None if target else repo.move_head(name, revision)
    exact = all(form == "exact" for form in wanted.values())
    if json:
        render.as_json({
            "id": name, "step": entry.commit.step, "paths": [str(path) for path in paths],
            "fidelity": wanted, "exact": exact, "branch": where,
        })  # fmt: skip
        return
    form = "exact" if exact else render.fidelity(entry)
    shown = render.printable(str(paths[0])) if len(paths) == 1 else f"{len(paths)} files"
    step = "" if entry.commit.step is None else f" step {entry.commit.step},"
    render.data(f"{shown}:{step} {name[:8]}, {form}")
    if target is None and not only and where is None:
        render.talk("note: HEAD is at an older commit; the next commit starts a branch")


def _checkout_part(
    repo: Repo, name: ObjectId, part: str, target: Path | None, *, force: bool
) -> Path:
    made = repo.catalog.commit(name)
    if target is None:
        home = repo.worktree().home(made.path, inside=made.inside)
        stem = home.stem if made.source != "directory" else home.name or "checkpoint"
        target = home.with_name(f"{stem}.{part}.pt")
    if target.is_dir():
        raise InvalidInputError(f"{target} is a directory", hint="name the file to write")
    if target.exists() and not force:
        raise ConflictError(f"{target} exists", hint="overwrite it with --force")
    repo.save_part(name, part, target)
    return target
