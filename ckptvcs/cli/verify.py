"""verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Exit, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, locate, open_repo
from ckptvcs.errors import CkptError, CorruptionError, InvalidInputError, UnsupportedVersionError
from ckptvcs.repo import Repo
from ckptvcs.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs import Damage, ObjectId, Repaired, VerifyReport


def verify(
    context: Context,
    subset: Annotated[
        str | None,
        Option(
            metavar="AMOUNT", help="how much to check, least recently checked first: 5%, 10G, 15m"
        ),
    ] = None,
    repair: Annotated[bool, Option("--repair", help="repair damage")] = False,
    source: Annotated[
        Path | None, Option("--from", metavar="DIR", help="repository to copy from (with --repair)")
    ] = None,
    drop: Annotated[
        bool, Option("--drop-damaged", help="drop commits that cannot be repaired (with --repair)")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check that every commit can be restored, or repair damage."""
    if (source is not None or drop) and not repair:
        raise InvalidInputError("--from and --drop-damaged require --repair")
    repaired = None
    try:
        if repair:
            repaired = Repo.repair_at(locate(context), source, drop=drop)
        repo = open_repo(context)
    except (CorruptionError, UnsupportedVersionError) as error:
        _say_unopened(locate(context), error, json=json)
        raise
    if repaired is not None:
        _show_repaired(repaired)
    with render.progress("verifying", None) as tick:
        report = repo.verify(tick, subset=subset)
    if json:
        render.as_json(_verified(report, repaired))
    else:
        _show(report, repaired)
    if report.damage and repaired is not None and not drop:
        render.talk(
            "hint: pass a good copy with --from, or drop damaged commits with --drop-damaged"
        )
    if report.damage:
        raise Exit(CorruptionError.exit_code)


def _show_repaired(repaired: Repaired) -> None:
    render.talk(_repaired(repaired))
    for ref, target in repaired.inferred.items():
        where = f"{target[:8]}" if target else "no commit"
        if target and ref == "HEAD":
            where = f"branch {render.printable(target)}"
        render.talk(f"note: {render.printable(ref)} was inferred: it is at {where} now")


def _show(report: VerifyReport, repaired: Repaired | None) -> None:
    for damage in report.damage:
        render.data(*_damage_lines(damage))
    result = f"{len(report.damage)} damaged" if report.damage else "all good"
    render.data(
        f"{report.packs} packs, {report.commits} commits, {report.tensors} tensors, "
        f"{report.files} files, {render.size(report.bytes)} read: {result}"
    )
    if report.unchecked:
        render.talk(f"note: {report.unchecked} packs and commits were not checked")
    for name in report.discarded:
        render.talk(
            f"note: cached base {render.printable(name)} was wrong and is deleted; "
            "no commit is damaged, and the next commit rebuilds it"
        )
    if report.unreachable:
        render.talk(*_unreachable(report.unreachable))
    if report.damage and repaired is None:
        render.talk(
            "hint: run 'ckpt verify --repair'; add --from DIR to copy from another repository"
        )


def _say_unopened(folder: Path, error: CkptError, *, json: bool) -> None:
    """Report a repository that cannot be opened.

    Raises:
        CorruptionError: the version number is damaged, not newer than this program.
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
    repair = {} if repaired is None else {"repaired": repaired}
    return {"ok": not report.damage} | vars(report) | repair


def _unreachable(names: Sequence[ObjectId]) -> tuple[str, str]:
    return (
        f"note: {counted(len(names), 'unreachable commit')}: {entries.ids(names)}",
        "hint: run 'ckpt branch NAME ID' to keep one; an interrupted commit can leave one",
    )


def _damage_lines(damage: Damage) -> list[str]:
    where = f"commit {damage.commit[:8]}: " if damage.commit else ""
    shown = damage.name is not None and damage.name not in damage.message
    name = f" ({render.printable(damage.name)})" if damage.name and shown else ""
    lines = [f"{damage.what}: {where}{damage.message}{name}"]
    if damage.commits and damage.commit is None:
        lines.append("  commits: " + entries.ids(damage.commits))
    if damage.tensors:
        lines.append("  tensors: " + ", ".join(map(render.printable, damage.tensors)))
    return lines


def _repaired(done: Repaired) -> str:
    counts = [
        (done.salvaged, "object", "salvaged"),
        (done.from_cache, "object", "from the cache"),
        (done.from_copy, "object", "copied"),
        (len(done.refs), "ref", "repaired"),
        (len(done.files), "file", "rebuilt"),
        (len(done.dropped), "commit", "dropped"),
        (done.packs, "damaged pack", "deleted"),
    ]
    repairs = [f"{counted(count, noun)} {what}" for count, noun, what in counts if count]
    return "repaired: " + (", ".join(repairs) or "nothing")
