"""import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import ConflictError, InvalidInputError, after

if TYPE_CHECKING:
    from ckptvcs import Importer, ImportItem

# numpy is loaded by what reads tensors, so that the other commands start without it.

_LISTED = 10  # entries that are left out, one line each; then only their number


def import_(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="directory of checkpoints")],
    pattern: Annotated[
        str | None, typer.Option(metavar="GLOB", help="select names, for example 'step*.pt'")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="codec, as for commit")] = None,
    branch: Annotated[str | None, typer.Option(help="target branch (does not move HEAD)")] = None,
    delete: Annotated[
        bool,
        typer.Option("--delete-originals", help="delete originals that can be restored exactly"),
    ] = False,
    accept_near: Annotated[
        bool, typer.Option("--accept-near", help="also delete originals of near commits")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask for confirmation")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done")] = False,
    json: JsonOption = False,
) -> None:
    """Commit a directory of checkpoints, oldest first."""
    if accept_near and not delete:
        raise InvalidInputError("--accept-near goes with --delete-originals")
    importer = open_repo(context).import_folder(folder, pattern=pattern, branch=branch, codec=codec)
    _tell_left_out(importer)
    size_bytes = sum(item.found.size_bytes for item in importer.items)
    with render.progress("comparing", size_bytes) as tick:
        importer.look(tick)
    with after(lambda: _made(importer)):
        if not dry_run:
            with render.progress("importing", size_bytes) as tick:
                importer.run(tick, _tell_imported)
            if delete:
                _remove(importer, accept_near=accept_near, ask=not yes)
        elif delete:
            for item in importer.items:
                item.gone.kept = importer.why_kept(item, accept_near=accept_near)
        if dry_run:
            for item in importer.items:
                _tell_imported(item)
        if json:
            render.as_json(_json(importer, dry_run=dry_run))
        else:
            render.table(
                [
                    ["step", "name", "size", "stored", "ratio", "fidelity", "note"],
                    *(_row(importer, item, planned=dry_run and delete) for item in importer.items),
                ]
            )
            _sum_up(importer, dry_run=dry_run, delete=delete)
        sys.stdout.flush()
    _exit(importer, kept=delete and not dry_run)


def _made(importer: Importer) -> str:
    """What an import did that stays, whatever happens then."""
    made = [item for item in importer.items if item.action == "committed"]
    gone = sum(len(item.gone.removed) for item in importer.items)
    parts = [f"{len(made)} of {len(importer.items)} checkpoints were committed"] if made else []
    parts += [f"{gone} file(s) were removed"] if gone else []
    return ", ".join(parts)


def interactive() -> bool:
    """Whether there is somebody to be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _tell_left_out(importer: Importer) -> None:
    for left in importer.left_out[:_LISTED]:
        render.talk(f"left out: {render.printable(left.name)}: {left.reason}")
    more = len(importer.left_out) - _LISTED
    if more > 0:
        render.talk(f"left out: {more} more, which --json lists")


def _tell_imported(item: ImportItem) -> None:
    name = render.printable(item.found.name)
    if item.problem is not None:
        render.talk(f"error: {name}: {render.printable(item.problem.message)}")
        if item.problem.hint:
            render.talk(f"hint: {render.printable(item.problem.hint)}")
    for note in item.notes:
        render.talk(f"note: {name}: {render.printable(note)}")


def _remove(importer: Importer, *, accept_near: bool, ask: bool) -> None:
    """Remove originals; on a terminal only after a yes."""
    able = [i for i in importer.items if importer.why_kept(i, accept_near=accept_near) is None]
    size_bytes = sum(item.found.size_bytes for item in able)
    if able and ask and interactive():
        what = f"remove {len(able)} of {len(importer.items)} originals, {render.size(size_bytes)}"
        if not render.confirm(f"{what}{_how_near(importer, able)}?"):
            for item in importer.items:
                item.gone.kept = "not removed: the answer was no"
            return

    def tell(item: ImportItem) -> None:
        entry = importer.entry(item)
        form = "" if entry is None else f" (kept {render.fidelity(entry)})"
        for gone in item.gone.removed:
            names = f", has {gone.other_names} other name(s)" if gone.other_names else ""
            render.talk(f"removed: {render.printable(str(gone.path))}{form}{names}")
        if item.gone.pinned:
            render.talk(f"pinned: {item.id and item.id[:8]}, so that it stays exact")
        if item.gone.kept is not None and item.problem is None:  # that has been told
            render.talk(f"not removed: {render.printable(f'{item.found.name}: {item.gone.kept}')}")

    with render.progress("removing", size_bytes) as tick:
        importer.remove(accept_near=accept_near, progress=tick, watch=tell)


def _how_near(importer: Importer, items: list[ImportItem]) -> str:
    """How far those of some items are off that are kept near only."""
    entries = [entry for item in items if (entry := importer.entry(item)) and not entry.exact]
    if not entries:
        return ""
    worst = max(entry.commit.error.weight_rel for entry in entries)
    return f", {len(entries)} of them kept near (weights off by up to {worst:.2g})"


def _row(importer: Importer, item: ImportItem, *, planned: bool) -> list[str]:
    found, entry = item.found, importer.entry(item)
    note = {"commit": "new", "committed": "", "known": "known", "failed": "failed"}[item.action]
    if item.same_as is not None:
        note = f"as {item.same_as}"
    if item.gone.removed:
        note = f"{note}, removed".removeprefix(", ")
    elif planned and item.action == "known":
        note += ", stays" if item.gone.kept else ", would go"
    stored = ["", "", ""]
    if entry is not None:
        raw = entry.commit.raw_bytes
        stored = [
            render.size(entry.stored_bytes),
            render.ratio(raw, entry.stored_bytes),
            render.fidelity(entry),
        ]
    step = "-" if found.step is None else str(found.step)
    name = render.printable(found.name) + ("/" if found.kind == "directory" and found.top else "")
    return [step, name, render.size(found.size_bytes), *stored, render.printable(note)]


def _sum_up(importer: Importer, *, dry_run: bool, delete: bool) -> None:
    items = importer.items
    count = {
        action: sum(item.action == action for item in items)
        for action in ("commit", "committed", "known", "failed")
    }
    parts = [f"{count['commit']} to be committed" if dry_run else f"{count['committed']} committed"]
    parts += [f"{count[action]} {action}" for action in ("known", "failed") if count[action]]
    raw, stored = importer.totals()
    sizes = f": {render.size(raw)} -> {render.size(stored)} ({render.ratio(raw, stored)})"
    render.data(", ".join(parts) + (sizes if raw else ""))
    if delete and not dry_run:
        gone = [file for item in items for file in item.gone.removed]
        freed = render.size(sum(file.freed_bytes for file in gone))
        kept = sum(item.gone.kept is not None for item in items)
        render.data(f"{len(gone)} file(s) removed, {freed} freed, {kept} original(s) kept")
        if any(
            item.id and not item.problem and item.gone.kept and _is_near(importer, item)
            for item in items
        ):
            render.talk("hint: --accept-near removes what is kept near; 'ckpt log' shows errors")


def _is_near(importer: Importer, item: ImportItem) -> bool:
    entry = importer.entry(item)
    return entry is not None and not entry.exact


def _json(importer: Importer, *, dry_run: bool) -> render.Json:
    raw, stored = importer.totals()
    return {
        "dry_run": dry_run,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "freed_bytes": sum(f.freed_bytes for item in importer.items for f in item.gone.removed),
        "checkpoints": [_item_json(importer, item) for item in importer.items],
        "left_out": [{"name": e.name, "reason": e.reason} for e in importer.left_out],
    }


def _item_json(importer: Importer, item: ImportItem) -> dict[str, render.Json]:
    found, entry = item.found, importer.entry(item)
    return {
        "name": found.name,
        "step": found.step,
        "kind": found.kind if found.top else "files",
        "raw_bytes": found.size_bytes,
        "action": item.action,
        "same_as": item.same_as,
        "branch": item.branch,
        "commit": None if entry is None else render.entry_json(entry),
        "problem": None if item.problem is None else item.problem.message,
        "notes": list(item.notes),
        "removed": [str(gone.path) for gone in item.gone.removed],
        "kept": item.gone.kept,
        "pinned": item.gone.pinned,
    }


def _exit(importer: Importer, *, kept: bool) -> None:
    """End with the worst of what went wrong; else with a conflict, where originals stay that were
    to be removed.
    """
    codes = [item.problem.exit_code for item in importer.items if item.problem is not None]
    if kept and any(item.gone.kept is not None and not item.problem for item in importer.items):
        codes.append(ConflictError.exit_code)
    if codes:
        raise typer.Exit(max(codes))
