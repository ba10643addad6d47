"""init, config, verify, stats, index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.config import get_setting
from ckptvcs.errors import CorruptionError, InvalidInputError
from ckptvcs.opened import FOLDER
from ckptvcs.repo import Repo


def init(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="where")] = None,
    codec: Annotated[
        str | None, typer.Option(help="how commits are stored: near (default), small, lossless")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a repository."""
    folder = directory or context.find_root().obj.repo or Path()
    if folder.name == FOLDER:
        folder = folder.parent
    known = (folder / FOLDER / "format").exists()
    repo = Repo.init(folder, codec=codec)
    if json:
        render.as_json({"repository": str(repo.folder), "created": not known})
    else:
        render.data(f"{'repository is there already' if known else 'made'}: {repo.folder}")


def config(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="read this one")] = None,
    value: Annotated[str | None, typer.Argument(metavar="[VALUE]", help="set it")] = None,
    unset: Annotated[bool, typer.Option("--unset", help="back to the default")] = False,
    json: JsonOption = False,
) -> None:
    """List the settings, read one, or set one."""
    repo = open_repo(context)
    if unset and (key is None or value is not None):
        raise InvalidInputError("--unset takes a KEY and no VALUE")
    if key is None:
        found = repo.settings()
        if json:
            render.as_json(found)
        else:
            render.table([["setting", "value"], *([k, str(v)] for k, v in found.items())])
        return
    if value is not None or unset:
        repo.configure(key, value)
    setting = get_setting(repo.config, key)
    if json:
        render.as_json({key: setting})
    else:
        render.data(str(setting))


def verify(context: typer.Context, json: JsonOption = False) -> None:
    """Prove that every commit can be restored: re-hash, decode, compare."""
    repo = open_repo(context)
    with render.progress("verifying", None) as tick:
        report = repo.verify(tick)
    if json:
        render.as_json({
            "ok": not report.damage, "packs": report.packs, "commits": report.commits,
            "tensors": report.tensors, "files": report.files, "bytes": report.bytes,
            "damage": [
                {"what": d.what, "message": d.message, "commit": d.commit, "name": d.name}
                for d in report.damage
            ],
        })  # fmt: skip
    else:
        for damage in report.damage:
            where = f"commit {damage.commit[:8]}: " if damage.commit else ""
            name = f" ({render.printable(damage.name)})" if damage.name else ""
            render.data(f"{damage.what}: {where}{damage.message}{name}")
        render.data(
            f"{report.packs} packs, {report.commits} commits, {report.tensors} tensors, "
            f"{report.files} files, {render.size(report.bytes)} read: "
            + (f"{len(report.damage)} damaged" if report.damage else "all good")
        )
    if report.damage:
        raise typer.Exit(CorruptionError.exit_code)


def stats(context: typer.Context, json: JsonOption = False) -> None:
    """Show sizes on disk."""
    found = open_repo(context).stats()
    if json:
        render.as_json({
            "commits": found.commits, "raw_bytes": found.raw_bytes,
            "stored_bytes": found.stored_bytes, "history_bytes": found.history_bytes,
            "patch_bytes": found.patch_bytes, "cache_bytes": found.cache_bytes,
            "packs": found.packs, "ratio": found.ratio,
        })  # fmt: skip
        return
    render.data(f"commits   {found.commits}")
    render.data(f"committed {render.size(found.raw_bytes)}")
    render.data(f"stored    {render.size(found.stored_bytes)} in {found.packs} packs")
    render.data(f"  history {render.size(found.history_bytes)}")
    render.data(f"  patches {render.size(found.patch_bytes)}")
    render.data(f"cache     {render.size(found.cache_bytes)} (can be deleted)")
    render.data(f"ratio     {render.ratio(found.raw_bytes, found.stored_bytes)}")


def index(
    context: typer.Context,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="make it anew")] = False,
    json: JsonOption = False,
) -> None:
    """Rebuild the index from the packs."""
    if not rebuild:
        raise InvalidInputError("nothing to do", hint="ckpt index --rebuild")
    packs = open_repo(context).catalog.store.rebuild()
    if json:
        render.as_json({"packs": packs})
    else:
        render.data(f"indexed {packs} packs")
