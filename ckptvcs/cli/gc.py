"""gc."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from ckptvcs import Best, Policy
from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import InvalidInputError

if TYPE_CHECKING:
    from ckptvcs import Decision, GcPlan

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31557600}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9.]+)([smhdwy])", text)
    try:
        return float(found[1]) * _SECONDS[found[2]] if found else float("nan")
    except ValueError:
        raise _no_duration(text) from None


def _no_duration(text: str) -> InvalidInputError:
    return InvalidInputError(f"'{text}' is no time", hint="write 12h, 7d, 4w")


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+) ?([kmgt]?)b?", text.lower())
    try:
        return int(float(found[1]) * _BYTES[found[2]]) if found else -1
    except (ValueError, OverflowError):
        return -1


def _policy(
    last: int | None,
    every: int | None,
    within: str | None,
    best: list[str] | None,
    *,
    tagged: bool,
    log_spaced: bool,
    max_size: str | None,
    optimizer_last: int | None,
) -> Policy:
    for name, number in (("last", last), ("every", every), ("optimizer-last", optimizer_last)):
        if number is not None and number < 1:
            raise InvalidInputError(f"--keep-{name} takes a number from 1")
    seconds = None if within is None else _duration(within)
    if seconds is not None and not seconds >= 0:
        raise _no_duration(within or "")
    size = None if max_size is None else _size(max_size)
    if size is not None and size < 0:
        raise InvalidInputError(f"'{max_size}' is no size", hint="write 500M, 50G")
    return Policy(
        last,
        every,
        seconds,
        tuple(Best.parse(text) for text in best or ()),
        tagged,
        log_spaced,
        size,
        optimizer_last,
    )


def gc(
    context: typer.Context,
    keep_last: Annotated[
        int | None, typer.Option(metavar="N", help="keep the newest N commits of each branch")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="keep multiples of STEPS")
    ] = None,
    keep_within: Annotated[
        str | None, typer.Option(metavar="TIME", help="keep younger commits: 12h, 7d")
    ] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC:min|max:N", help="keep the N best; can be repeated"),
    ] = None,
    keep_tag: Annotated[bool, typer.Option("--keep-tag", help="keep tagged commits")] = False,
    keep_log_spaced: Annotated[
        bool, typer.Option("--keep-log-spaced", help="keep fewer commits the older they are")
    ] = False,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="keep the newest commits that fit: 50G")
    ] = None,
    keep_optimizer_last: Annotated[
        int | None, typer.Option(metavar="N", help="drop optimizer states except the newest N")
    ] = None,
    rekey: Annotated[
        bool, typer.Option("--rekey", help="merge deltas across dropped commits")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep/--no-sweep", help="delete files now, or only drop commits")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be deleted")] = False,
    json: JsonOption = False,
) -> None:
    """Delete commits that no rule keeps, and unreachable data."""
    policy = _policy(
        keep_last,
        keep_every,
        keep_within,
        keep_best,
        tagged=keep_tag,
        log_spaced=keep_log_spaced,
        max_size=max_size,
        optimizer_last=keep_optimizer_last,
    )
    if rekey and not sweep:
        raise InvalidInputError("--rekey sweeps at once", hint="leave out --no-sweep")
    repo = open_repo(context)
    if dry_run:
        plan = repo.plan_gc(policy)
    else:
        with render.progress("rekeying" if rekey else "sweeping", None) as tick:
            plan = repo.gc(policy, sweep=sweep, rekey=rekey, progress=tick)
    if json:
        render.as_json(
            {
                "dry_run": dry_run,
                "packs": sorted(plan.packs),
                "debris": list(plan.debris),
                "freed_bytes": plan.freed_bytes,
                "kept_bytes": plan.kept_bytes,
                "loose": list(plan.loose),
                "faded": sorted({name for patch in plan.fading for name in patch.commits}),
                "commits": [
                    {
                        "id": row.name,
                        "step": row.commit.step,
                        "action": row.action,
                        "reasons": list(row.reasons),
                        "freed_bytes": row.freed_bytes,
                        "chained_bytes": row.chained_bytes,
                    }
                    for row in plan.decisions
                ],
            }
        )
        return
    _show(plan)
    render.data(_sizes(plan, dry_run=dry_run, sweep=sweep))
    if rekey and dry_run:
        render.talk("note: what --rekey frees besides is not known before it is done")
    chained = sum(row.chained_bytes for row in plan.decisions)
    if chained and not rekey:
        render.talk(
            f"note: {render.size(chained)} stay since chains need them; --rekey merges them"
        )


def _sizes(plan: GcPlan, *, dry_run: bool, sweep: bool) -> str:
    freed, kept = plan.freed_bytes, render.size(plan.kept_bytes)
    if freed < 0:
        verb = "would take" if dry_run else "takes"
        return f"nothing to free: what was done {verb} {render.size(-freed)} to record, kept {kept}"
    verb = "would free" if dry_run else "freed" if sweep else "to be freed by the next sweep:"
    return f"{verb} {render.size(freed)}, kept {kept}"


def _show(plan: GcPlan) -> None:
    if plan.decisions:
        rows = [["step", "id", "action", "freed", "in chains", "reason"]]
        rows += [_row(row) for row in sorted(plan.decisions, key=_newest_first)]
        render.table(rows)
    faded = {name for patch in plan.fading for name in patch.commits}
    if faded:
        render.data(f"{len(faded)} commit(s) fade to near")
    if plan.packs:
        render.data(f"{len(plan.packs)} pack(s) reached by nothing")
    if plan.loose:
        ids = render.ids(plan.loose)
        render.data(f"{len(plan.loose)} commit(s) that no ref ever led to: {ids}")
    for name in plan.debris:
        render.data(f"{name}  left by a writer that is gone")


def _newest_first(row: Decision) -> tuple[int, str]:
    """Newest first: times are compared as text, downwards."""
    return (-(row.commit.step or 0), row.name)


def _row(row: Decision) -> list[str]:
    freed = render.size(row.freed_bytes) if row.freed_bytes else ""
    chained = render.size(row.chained_bytes) if row.chained_bytes else ""
    step = "-" if row.commit.step is None else str(row.commit.step)
    return [step, row.name[:8], row.action, freed, chained, ", ".join(row.reasons)]
