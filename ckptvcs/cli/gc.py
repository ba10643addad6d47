"""gc."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ckptvcs import Best, Policy
from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import InvalidInputError

if TYPE_CHECKING:
    from ckptvcs import Decision, GcPlan

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31557600}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


Sweep = Annotated[
    bool, typer.Option("--sweep/--no-sweep", help="delete data now, or only hide dropped commits")
]


def _duration(text: str | None) -> float | None:
    """Return the seconds that `text` stands for.

    Raises:
        InvalidInputError: `text` is not a valid time.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+|[0-9]+\.)([smhdwy])", text)
    if match is None:
        raise InvalidInputError(f"invalid time '{text}'", hint="write 12h, 7d, 4w")
    return float(match[1]) * _SECONDS[match[2]]


def _size(text: str | None) -> int | None:
    """Return the bytes that `text` stands for.

    Raises:
        InvalidInputError: `text` is not a valid size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]*\.?[0-9]+|[0-9]+\.) ?([kmgt]?)b?", text.lower())
    try:
        return int(float(match[1]) * _BYTES[match[2]]) if match else _invalid_size(text)
    except OverflowError:
        return _invalid_size(text)


def _invalid_size(text: str) -> NoReturn:
    raise InvalidInputError(f"invalid size '{text}'", hint="write 500M, 50G")


def gc(
    context: typer.Context,
    keep_last: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="keep the newest N commits of each branch"),
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(metavar="STEPS", min=1, help="keep steps that are multiples of STEPS"),
    ] = None,
    keep_within: Annotated[
        str | None, typer.Option(metavar="TIME", help="keep commits younger than TIME: 12h, 7d")
    ] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC:min|max:N", help="keep the N best commits; can be repeated"),
    ] = None,
    keep_tag: Annotated[bool, typer.Option("--keep-tag", help="keep tagged commits")] = False,
    keep_log_spaced: Annotated[
        bool, typer.Option("--keep-log-spaced", help="keep fewer commits the older they are")
    ] = False,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="keep the newest commits that fit into SIZE: 50G"),
    ] = None,
    keep_optimizer_last: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="keep only the newest N optimizer states")
    ] = None,
    rekey: Annotated[
        bool, typer.Option("--rekey", help="re-encode deltas that need dropped commits")
    ] = False,
    sweep: Sweep = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be deleted")] = False,
    json: JsonOption = False,
) -> None:
    """Delete commits that no rule keeps, and unreachable data."""
    policy = Policy(
        keep_last,
        keep_every,
        _duration(keep_within),
        tuple(map(Best.parse, keep_best or ())),
        keep_tag,
        keep_log_spaced,
        _size(max_size),
        keep_optimizer_last,
    )
    if rekey and not sweep:
        raise InvalidInputError(
            "--rekey cannot be combined with --no-sweep", hint="leave out --no-sweep"
        )
    repo = open_repo(context)
    if dry_run:
        plan = repo.plan_gc(policy)
    else:
        with render.progress("rekeying" if rekey else "sweeping", None) as tick:
            plan = repo.gc(policy, sweep=sweep, rekey=rekey, progress=tick)
    if json:
        render.as_json(_json(plan, dry_run=dry_run))
        return
    _show(plan, dry_run=dry_run, sweep=sweep, rekey=rekey)


def _json(plan: GcPlan, *, dry_run: bool) -> render.Json:
    return {
        "dry_run": dry_run,
        "packs": sorted(plan.packs),
        "stale_files": list(plan.stale_files),
        "freed_bytes": plan.freed_bytes,
        "kept_bytes": plan.kept_bytes,
        "unreachable": list(plan.unreachable),
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


def describe_sizes(plan: GcPlan, *, dry_run: bool, sweep: bool) -> str:
    """Say how many bytes gc frees and keeps."""
    freed, kept = plan.freed_bytes, render.size(plan.kept_bytes)
    if freed < 0:
        verb = "would take" if dry_run else "takes"
        return f"nothing to free: {verb} {render.size(-freed)} for records, kept {kept}"
    verb = "would free" if dry_run else "freed" if sweep else "the next sweep frees"
    return f"{verb} {render.size(freed)}, kept {kept}"


def _show(plan: GcPlan, *, dry_run: bool, sweep: bool, rekey: bool) -> None:
    if plan.decisions:
        rows = [["step", "id", "action", "freed", "in chains", "reason"]]
        rows += [_row(row) for row in sorted(plan.decisions, key=_age, reverse=True)]
        render.table(rows)
    faded = {name for patch in plan.fading for name in patch.commits}
    if faded:
        render.data(f"{len(faded)} commit(s) fade to near (their exact patches expire)")
    if plan.packs:
        render.data(f"{len(plan.packs)} unreachable pack(s)")
    if plan.unreachable:
        ids = render.ids(plan.unreachable)
        render.data(f"{len(plan.unreachable)} unreachable commit(s): {ids}")
    for name in plan.stale_files:
        render.data(f"{name}  stale file of a process that ended")
    render.data(describe_sizes(plan, dry_run=dry_run, sweep=sweep))
    if rekey and dry_run:
        render.talk("note: the size does not include what --rekey frees")
    chained = sum(row.chained_bytes for row in plan.decisions)
    if chained and not rekey:
        render.talk(f"note: delta chains keep {render.size(chained)}; use --rekey to free them")


def _age(row: Decision) -> tuple[int, str, str]:
    """Return a sort key: by step, then by time."""
    return row.commit.step or 0, row.commit.time, row.name


def _row(row: Decision) -> list[str]:
    freed = render.size(row.freed_bytes) if row.freed_bytes else ""
    chained = render.size(row.chained_bytes) if row.chained_bytes else ""
    step = "-" if row.commit.step is None else str(row.commit.step)
    return [step, row.name[:8], row.action, freed, chained, ", ".join(row.reasons)]
