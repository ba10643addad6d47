"""import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Exit, Option

from ckptvcs.cli import entries, import_plan, removals, render
from ckptvcs.cli.context import Branch, Codec, JsonOption, Pattern, Yes, open_repo
from ckptvcs.errors import ConflictError, InvalidInputError, after
from ckptvcs.repo import Repo
from ckptvcs.text import counted

if TYPE_CHECKING:
    from ckptvcs import Estimate, Importer, ImportItem

_LISTED = 10  # skipped entries to print; the others are counted


def import_(
    context: Context,
    folder: Annotated[Path, Argument(metavar="DIR", help="directory of checkpoints")],
    pattern: Pattern = None,
    codec: Codec = None,
    branch: Branch = None,
    delete: Annotated[
        bool, Option("--delete-originals", help="delete originals that can be restored exactly")
    ] = False,
    accept_near: Annotated[
        bool, Option("--accept-near", help="also delete originals of near commits")
    ] = False,
    archive: Annotated[
        bool, Option("--archive", help="archive all but the newest; the settings archive-* say how")
    ] = False,
    yes: Yes = False,
    dry_run: Annotated[bool, Option("--dry-run", help="show what would be done")] = False,
    json: JsonOption = False,
) -> None:
    """Commit a directory of checkpoints, oldest first."""
    if accept_near and not delete:
        raise InvalidInputError("--accept-near requires --delete-originals")
    repo = open_repo(context)
    importer = repo.import_folder(folder, pattern=pattern, branch=branch, codec=codec)
    _tell_skipped(importer)
    with render.progress("comparing", _size_bytes(importer)) as tick:
        importer.look(tick)
    estimate = None
    if dry_run:
        estimate = _estimate(importer, delete=delete, accept_near=accept_near)
    with after(lambda: _made(importer)):
        if dry_run:
            for item in importer.items:
                removals.tell(item.found.name, item)
        elif not delete or yes or _confirmed(importer, accept_near=accept_near):
            _run(importer, archive=archive, delete=delete, accept_near=accept_near)
        if json:
            render.as_json(_json(importer, estimate, dry_run=dry_run))
        else:
            render.table(_table(importer, planned=dry_run and delete))
            _sum_up(repo, importer, dry_run=dry_run, delete=delete)
            if dry_run:
                import_plan.show(importer, estimate, delete=delete, accept_near=accept_near)
                if archive:
                    render.talk("note: the estimate is that of near commits, without --archive")
        sys.stdout.flush()
    _exit(importer, kept=delete and not dry_run)


def _size_bytes(importer: Importer) -> int:
    return sum(item.found.size_bytes for item in importer.items)


def _estimate(importer: Importer, *, delete: bool, accept_near: bool) -> Estimate | None:
    """Estimate the new commits, and set why the originals of the known ones would stay."""
    for item in importer.items:
        if delete and item.action != "commit":
            item.removal.keep_reason = importer.why_kept(item, accept_near=accept_near)
    with render.progress("estimating", None) as tick:
        return importer.estimate(delete=delete, accept_near=accept_near, progress=tick)


def _confirmed(importer: Importer, *, accept_near: bool) -> bool:
    """Ask on a terminal whether to import and to remove originals, with an estimate."""
    if not render.can_ask():
        return True
    _estimate(importer, delete=True, accept_near=accept_near)
    question = import_plan.question(importer)
    if question is None or render.confirm(question):
        return True
    for item in importer.items:
        item.removal.keep_reason = "not confirmed"
    return False


def _run(importer: Importer, *, archive: bool, delete: bool, accept_near: bool) -> None:
    def tell(item: ImportItem) -> None:
        removals.tell(item.found.name, item)
        if delete and item.problem is None:
            entry = importer.entry(item)
            form = "" if entry is None else f" (kept {entries.fidelity(entry)})"
            removals.tell_removal(item.found.name, item, form)

    with render.progress("importing", _size_bytes(importer)) as tick:
        if archive:
            importer.run_archived(delete=delete, accept_near=accept_near, progress=tick, watch=tell)
        elif delete:
            importer.run_and_remove(accept_near=accept_near, progress=tick, watch=tell)
        else:
            importer.run(tick, tell)


def _made(importer: Importer) -> str:
    """Describe the finished work, for an error message."""
    items = importer.items
    commits = sum(item.action == "committed" for item in items)
    removed = sum(len(item.removal.removed) for item in items)
    parts = [f"{commits} of {len(items)} checkpoints were committed"] if commits else []
    parts += [f"{counted(removed, 'file')} removed"] if removed else []
    return ", ".join(parts)


def _tell_skipped(importer: Importer) -> None:
    for entry in importer.skipped[:_LISTED]:
        render.talk(f"skipped: {render.printable(entry.name)}: {entry.reason}")
    more = len(importer.skipped) - _LISTED
    if more > 0:
        render.talk(f"skipped: {more} more (--json lists all)")


def _table(importer: Importer, *, planned: bool) -> list[list[str]]:
    heading = ["step", "name", "size", "stored", "ratio", "fidelity", "note"]
    return [heading, *(_row(importer, item, planned=planned) for item in importer.items)]


def _row(importer: Importer, item: ImportItem, *, planned: bool) -> list[str]:
    found, entry = item.found, importer.entry(item)
    note = {"commit": "new", "committed": "", "known": "known", "failed": "failed"}[item.action]
    if item.same_as is not None:
        note = f"as {item.same_as}"
    if item.removal.removed:
        note = f"{note}, removed".removeprefix(", ")
    elif planned and item.action in ("known", "commit"):
        note += ", stays" if item.removal.keep_reason else ", would go"
    stored = ["", "", ""] if item.forecast is None else import_plan.cells(item)
    if entry is not None:
        size_bytes = entry.stored_bytes + (entry.exact_bytes if entry.exact_lasts else 0)
        ratio = entries.ratio(entry.commit.raw_bytes, size_bytes)
        stored = [render.size(size_bytes), ratio, entries.fidelity(entry)]
    step = entries.step_text(found.step)
    name = render.printable(found.name) + ("/" if found.kind == "directory" and found.top else "")
    return [step, name, render.size(found.size_bytes), *stored, render.printable(note)]


def _sum_up(repo: Repo, importer: Importer, *, dry_run: bool, delete: bool) -> None:
    items = importer.items
    count = {
        action: sum(item.action == action for item in items)
        for action in ("commit", "committed", "known", "failed")
    }
    parts = [f"{count['commit']} to be committed" if dry_run else f"{count['committed']} committed"]
    parts += [f"{count[action]} {action}" for action in ("known", "failed") if count[action]]
    raw, stored, patches = importer.totals()
    render.data(", ".join(parts) + (f": {entries.sizes(raw, stored + patches)}" if raw else ""))
    if delete and not dry_run:
        _sum_up_removed(importer)
    render.talk(*entries.faded(importer.faded))
    near = importer.near_known()
    if near:
        render.talk(
            f"hint: import into a new repository to keep {counted(near, 'known checkpoint')} exact"
        )
    if not dry_run:
        render.data(entries.on_disk(repo.stats()))


def _sum_up_removed(importer: Importer) -> None:
    files = [file for item in importer.items for file in item.removal.removed]
    freed = render.size(sum(file.freed_bytes for file in files))
    kept = [item for item in importer.items if item.removal.keep_reason is not None]
    removed, stayed = counted(len(files), "file"), counted(len(kept), "original")
    render.data(f"{removed} removed, {freed} freed, {stayed} kept")
    for entry in importer.skipped:
        path = importer.folder / entry.name
        if files and path.is_symlink() and not path.exists():
            render.talk(f"note: {render.printable(entry.name)} is a link to a removed file")
    if any(item.id and not item.problem and _is_near(importer, item) for item in kept):
        render.talk("hint: add --accept-near to delete originals of near commits")


def _is_near(importer: Importer, item: ImportItem) -> bool:
    entry = importer.entry(item)
    return entry is not None and not entry.exact


def _json(importer: Importer, estimate: Estimate | None, *, dry_run: bool) -> render.Json:
    raw, stored, _ = importer.totals()
    return {
        "dry_run": dry_run,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "freed_bytes": sum(f.freed_bytes for item in importer.items for f in item.removal.removed),
        "checkpoints": [_item_json(importer, item) for item in importer.items],
        "skipped": importer.skipped,
        "estimate": estimate,
    }


def _item_json(importer: Importer, item: ImportItem) -> dict[str, render.Json]:
    found, entry = item.found, importer.entry(item)
    return (
        render.attributes(found, "name step")
        | {"kind": found.kind if found.top else "files", "raw_bytes": found.size_bytes}
        | render.attributes(item, "action same_as branch")
        | {"commit": entry and entries.entry_json(entry), "estimate": item.forecast}
        | removals.as_json(item)
    )


def _exit(importer: Importer, *, kept: bool) -> None:
    """Exit with the highest error code, or with a conflict if an original was not deleted."""
    codes = [item.problem.exit_code for item in importer.items if item.problem is not None]
    if kept and any(
        item.removal.keep_reason is not None and not item.problem for item in importer.items
    ):
        codes.append(ConflictError.exit_code)
    if codes:
        raise Exit(max(codes))
