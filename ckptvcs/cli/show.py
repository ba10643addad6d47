"""show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from ckptvcs.cli import entries, origin, render
from ckptvcs.cli.context import JsonOption, Revision, open_repo
from ckptvcs.cli.listing import until
from ckptvcs.errors import CkptError
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from ckptvcs import ErrorReport, LogEntry, ObjectId


def _parts_json(entry: LogEntry) -> dict[str, Any]:
    return {
        name: render.attributes(part, "values exact") | {"fidelity": entry.fidelity[name]}
        for name, part in entry.commit.parts.items()
    }


def _show_roles(repo: Repo, name: ObjectId) -> None:
    """Print the stored tensors of a commit with their roles and forms."""
    rows = [["name", "dtype", "shape", "part", "role", "evidence", "form"]]
    for tensor in repo.tensors(name):
        shape = " x ".join(map(str, tensor.shape))
        role = [tensor.part, tensor.role, tensor.evidence or "none"]
        rows.append(
            [render.printable(tensor.name), tensor.dtype, shape, *role, entries.tensor_form(tensor)]
        )
    render.table(rows)


def _json(repo: Repo, entry: LogEntry) -> dict[str, Any]:
    files = [
        {"path": file.path, "bytes": file.size, "hash": file.hash, "format": file.format}
        for file in entry.commit.files
    ]
    tensors = [
        render.attributes(tensor, "name part role dtype shape")
        | {"evidence": tensor.evidence or None, "error": tensor.error}
        for tensor in repo.tensors(entry.id)
    ]
    return (
        entries.entry_json(entry)
        | {"parts": _parts_json(entry), "files": files}
        | render.attributes(entry.commit, "source path host user code")
        | {"dirty": origin.is_dirty(repo, entry.id), "tensors": tensors}
    )


def _fields(repo: Repo, entry: LogEntry) -> list[tuple[str, str]]:
    """Return the labels and values to print; an empty value is left out."""
    end = until(repo, entry)
    changed = ", changed" if origin.is_dirty(repo, entry.id) else ""
    commit = entry.commit
    return [
        ("commit", entry.id),
        ("parents", " ".join(commit.parents) or "none"),
        ("tags", " ".join(entry.tags)),
        ("step", "" if commit.step is None else str(commit.step)),
        ("time", commit.time),
        ("by", f"{commit.user}@{commit.host}"),
        ("code", f"{commit.code}{changed}" if commit.code else ""),
        ("message", render.printable(entry.message)),
        ("metrics", entries.metrics(entry.metrics)),
        ("fields", entries.fields(entry.fields)),
        ("size", entries.sizes_now(entry)),
        ("stored as", f"{commit.codec}, {commit.kind}, depth {commit.depth}"),
        ("fidelity", f"{entries.fidelity(entry)}{end and ':'}{end}"),
        ("archived", _archived(repo, entry)),
        ("parts", entries.parts(entry)),
        *_errors(entry),
    ]


def _errors(entry: LogEntry) -> list[tuple[str, str]]:
    """Return a sentence for each measured error of a near commit."""
    error = entry.commit.error
    if entry.near_error is not None:
        return _archived_errors(error, entry.near_error)
    lost = f"{_percent(error.residual_nmse)} of the last change is lost, in squares"
    update = f"The next update is off by {_percent(error.update_nmse)}, in squares"
    sentences = {
        "weight_rel": f"The weights are off by {_percent(error.weight_rel)}",
        "lag": f"They are as late as {error.lag or 0:.2g} commits of a random walk",
        "residual_nmse": lost,
        "fisher_nmse": f"Weighted by sensitivity, {_percent(error.fisher_nmse)} of it is lost",
        "update_nmse": update,
        "max_abs": f"No weight is off by more than {error.max_abs:.3g}",
    }
    shown = [
        f"{sentence} ({name} {getattr(error, name):.3g})."
        for name, sentence in sentences.items()
        if getattr(error, name)
    ]
    labels = ["error", *[""] * len(shown)]
    return [] if entry.exact else list(zip(labels, shown, strict=False))


def _archived(repo: Repo, entry: LogEntry) -> str:
    """Return where an archived commit comes from."""
    if entry.near_error is None:
        return ""
    names = [_name(repo, name) for name in entry.between]
    return f"interpolated between {' and '.join(names)}" if names else "an anchor of its line"


def _name(repo: Repo, name: ObjectId) -> str:
    """Return the step and short id of a commit, or only the id if it is not here."""
    try:
        return entries.commit_name(repo.entry(name))
    except CkptError:
        return name[:8]


def _archived_errors(error: ErrorReport, near: ErrorReport) -> list[tuple[str, str]]:
    """Return sentences about the errors of an archived form and of the near form before it."""
    lag = "" if error.lag is None else f" They are about {error.lag:.2g} commits late (lag)."
    before = "" if near.lag is None else f", {near.lag:.2g} commits late"
    return [
        (
            "error",
            f"The weights are off by at most {_percent(error.weight_rel)} (weight_rel).{lag}",
        ),
        ("", f"No weight is off by more than {error.max_abs:.3g} (max_abs)."),
        ("", f"Before it was archived: off by {_percent(near.weight_rel)}{before}."),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def show(
    context: Context,
    revision: Revision = "HEAD",
    roles: Annotated[bool, Option("--roles", help="list tensors with their roles")] = False,
    provenance: Annotated[
        bool, Option("--provenance", help="print the code, packages and machine behind it")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Print one commit and its files."""
    repo = open_repo(context)
    name = repo.resolve(revision)
    if provenance:
        entry, found = repo.show(name), repo.provenance(name)
        if json:
            render.as_json(origin.as_json(entry, found))
        else:
            origin.show(entry, found)
        return
    if roles and not json:
        _show_roles(repo, name)
        return
    entry = repo.show(name)
    if json:
        render.as_json(_json(repo, entry))
        return
    for label, value in _fields(repo, entry):
        if value:
            render.data(f"{label:<10} {value}")
    listed = [["file", "bytes", "format"]]
    listed += [[render.printable(f.path), str(f.size), f.format] for f in entry.commit.files]
    render.data("")
    render.table(listed)
