"""verify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, locate, open_repo
from ckptvcs.errors import CkptError, CorruptionError, InvalidInputError, UnsupportedVersionError
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs import Damage, ObjectId, Repaired, VerifyReport


def verify(
    context: typer.Context,
    subset: Annotated[
        str | None, typer.Option(help="amount to check, longest unchecked first: 5%, 10G, 15m")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="repair damage")] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="repository to copy missing objects from (with --repair)"),
    ] = None,
    drop: Annotated[
        bool,
        typer.Option("--drop-damaged", help="drop commits that cannot be repaired (with --repair)"),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check that every commit can be restored, or repair damage."""
    if (source is not None or drop) and not repair:
        raise InvalidInputError("--from and --drop-damaged go with --repair")
    repaired = None
    try:
        if repair:
            repaired = Repo.repair_at(locate(context), source, drop=drop)
        repo = open_repo(context)
    except (CorruptionError, UnsupportedVersionError) as error:
        _say_unopened(locate(context), error, json=json)
        raise
    if repaired is not None:
        render.talk(_repaired(repaired))
        for ref, at in repaired.told.items():
            branch = f"at branch {render.printable(at)}" if at and ref == "HEAD" else ""
            where = branch or (f"at {at[:8]}" if at else "at no commit")
            render.talk(f"note: {render.printable(ref)} is {where} now, as far as can be told")
    with render.progress("verifying", None) as tick:
        report = repo.verify(tick, subset=subset)
    if json:
        render.as_json(_verified(report, repaired))
    else:
        for damage in report.damage:
            render.data(*_damage_lines(damage))
        left = f", {report.left} packs and commits left" if report.left else ""
        render.data(
            f"{report.packs} packs, {report.commits} commits, {report.tensors} tensors, "
            f"{report.files} files, {render.size(report.bytes)} read{left}: "
            + (f"{len(report.damage)} damaged" if report.damage else "all good")
        )
        for name in report.discarded:
            render.talk(
                f"note: {render.printable(name)} held other values than the history: deleted; "
                "no commit is harmed, and the next one that needs it makes it anew"
            )
        if report.loose:
            render.talk(*_loose(report.loose))
        if report.damage and repaired is None:
            render.talk("hint: 'ckpt verify --repair' saves what can be saved, --from OTHER more")
    if report.damage:
        raise typer.Exit(CorruptionError.exit_code)


def _say_unopened(folder: Path, error: CkptError, *, json: bool) -> None:
    """All that can be said of a repository that cannot be opened.

    Raises:
        CorruptionError: it is not of a newer program, as it says, but damaged.
    """
    from ckptvcs import Damage, VerifyReport

    damage = Repo.why_unopened(folder, error)
    if damage is None:
        return
    if json:
        lost = Damage("format", damage.message, name="format")
        render.as_json(_verified(VerifyReport(damage=[lost]), None))
    if damage is not error:
        raise damage from error


def _verified(report: VerifyReport, repaired: Repaired | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ok": not report.damage,
        "packs": report.packs,
        "commits": report.commits,
        "tensors": report.tensors,
        "files": report.files,
        "bytes": report.bytes,
        "left": report.left,
        "loose": report.loose,
        "discarded": report.discarded,
        "damage": [asdict(damage) for damage in report.damage],
    }
    if repaired is not None:
        found["repaired"] = asdict(repaired)
    return found


def _loose(names: Sequence[ObjectId]) -> tuple[str, str]:
    return (
        f"note: {len(names)} commit(s) that no ref leads to, or ever did: {render.ids(names)}",
        "hint: they came to nothing, or a ref is lost; 'ckpt branch NAME ID' keeps one",
    )


def _damage_lines(damage: Damage) -> list[str]:
    where = f"commit {damage.commit[:8]}: " if damage.commit else ""
    shown = damage.name is not None and damage.name not in damage.message
    name = f" ({render.printable(damage.name)})" if damage.name and shown else ""
    lines = [f"{damage.what}: {where}{damage.message}{name}"]
    if damage.commits and damage.commit is None:
        lines.append("  commits: " + render.ids(damage.commits))
    if damage.tensors:
        lines.append("  tensors: " + ", ".join(map(render.printable, damage.tensors)))
    return lines


def _repaired(done: Repaired) -> str:
    counts = {
        "object(s) salvaged": done.salvaged,
        "object(s) remembered": done.remembered,
        "object(s) fetched": done.fetched,
        "ref(s) mended": len(done.refs),
        "file(s) mended": len(done.files),
        "commit(s) dropped": len(done.dropped),
        "damaged pack(s) deleted": done.packs,
    }
    said = [f"{count} {what}" for what, count in counts.items() if count]
    return "repaired: " + (", ".join(said) or "nothing")
