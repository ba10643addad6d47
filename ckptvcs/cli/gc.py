"""gc."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NoReturn

from typer import Context, Option

from ckptvcs import Best, Policy
from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, Now, Yes, open_repo
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo
from ckptvcs.text import counted, seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs import Archived, Decision, GcPlan

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


Sweep = Annotated[
    bool, Option("--sweep/--no-sweep", help="delete data now, or only hide dropped commits")
]


def _duration(text: str | None) -> float | None:
    """Return the seconds that `text` stands for.

    Raises:
        InvalidInputError: `text` is not a valid time.
    """
    if text is None:
        return None
    if seconds(text) is None:
        raise InvalidInputError(f"invalid time '{text}'", hint="write 12h, 7d, 4w")
    return seconds(text)


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
    context: Context,
    keep_last: Annotated[
        int | None, Option(metavar="N", min=1, help="keep the newest N commits of each branch")
    ] = None,
    keep_every: Annotated[
        int | None, Option(metavar="STEPS", min=1, help="keep steps that are multiples of STEPS")
    ] = None,
    keep_within: Annotated[
        str | None, Option(metavar="TIME", help="keep commits younger than TIME: 12h, 7d")
    ] = None,
    keep_best: Annotated[
        list[str] | None,
        Option(metavar="METRIC:min|max:N", help="keep the N best commits; can be repeated"),
    ] = None,
    keep_tag: Annotated[bool, Option("--keep-tag", help="keep tagged commits")] = False,
    keep_log_spaced: Annotated[
        bool, Option("--keep-log-spaced", help="keep fewer commits the older they are")
    ] = False,
    max_size: Annotated[
        str | None, Option(metavar="SIZE", help="keep the newest commits that fit into SIZE: 50G")
    ] = None,
    keep_optimizer_last: Annotated[
        int | None, Option(metavar="N", min=1, help="keep only the newest N optimizer states")
    ] = None,
    rekey: Annotated[
        bool, Option("--rekey", help="re-encode deltas that need deleted commits")
    ] = False,
    archive: Annotated[
        bool, Option("--archive", help="archive old commits; the settings archive-* say which")
    ] = False,
    now: Now = False,
    sweep: Sweep = True,
    yes: Yes = False,
    dry_run: Annotated[bool, Option("--dry-run", help="show what would be deleted")] = False,
    json: JsonOption = False,
) -> None:
    """Drop commits that no rule keeps, and delete unreachable data."""
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
    if not sweep and (rekey or now):
        option = "--rekey" if rekey else "--now"
        raise InvalidInputError(
            f"{option} cannot be combined with --no-sweep", hint="leave out --no-sweep"
        )
    flags = _Flags(now, sweep, rekey, archive, dry_run, json)
    _run(open_repo(context), policy, flags, ask=not yes)


@dataclass(frozen=True)
class _Flags:
    now: bool
    sweep: bool
    rekey: bool
    archive: bool
    dry_run: bool
    json: bool


def _run(repo: Repo, policy: Policy, flags: _Flags, *, ask: bool) -> None:
    archive = flags.archive or None  # None: as the settings say
    archives = flags.archive or repo.setting("archive-after") != "off"
    if flags.dry_run:
        with render.progress("archiving" if archives else "planning", None) as tick:
            plan = repo.plan_gc(policy, now=flags.now, archive=archive, progress=tick)
        _tell(repo, plan, flags)
        return
    ask = ask and not flags.json and render.can_ask()
    question = _asked(repo, policy, archives=archives, now=flags.now) if ask else None
    if question is not None and not render.confirm(question):
        render.talk("nothing was changed")
        return
    doing = "archiving" if archives else "rekeying" if flags.rekey else "sweeping"
    with render.progress(doing, None) as tick:
        plan = repo.gc(
            policy,
            sweep=flags.sweep,
            now=flags.now,
            rekey=flags.rekey,
            archive=archive,
            progress=tick,
        )
    _tell(repo, plan, flags, table=archives or not ask)


def _asked(repo: Repo, policy: Policy, *, archives: bool, now: bool) -> str | None:
    """Show what gc will do, and return what to ask; None if it takes no commit.

    The archived forms are not made for that: it would take as long as the archiving itself.
    """
    policy = policy.without_drops if archives else policy
    plan = repo.plan_gc(policy, now=now, archive=False)
    _show(plan)
    question = _question(repo, plan, now=now)
    if archives and now:
        archiving = "archive commits, and delete their near form for good"
        return f"{archiving}, and {question}" if question else f"{archiving}?"
    return question


def _question(repo: Repo, plan: GcPlan, *, now: bool) -> str | None:
    """Return what to ask before a plan is carried out; None if the plan takes no commit."""
    dropped = sum(row.action != "keep" for row in plan.decisions)
    deleted = len(plan.abandoned)
    if now:
        deleted += dropped + len(repo.plan_gc(archive=False).waiting)
    texts = [f"delete the data of {counted(deleted, 'commit')} for good"] if deleted else []
    if dropped and not now:
        texts.append(f"drop {counted(dropped, 'commit')}, which undo can restore for {grace(repo)}")
    return f"{', and '.join(texts)}?" if texts else None


def _tell(repo: Repo, plan: GcPlan, flags: _Flags, *, table: bool = True) -> None:
    if flags.json:
        render.as_json(plan_json(plan, dry_run=flags.dry_run))
        return
    if table:
        _show(plan)
    render.data(describe_sizes(plan, dry_run=flags.dry_run, sweep=flags.sweep))
    tell_waiting(repo, plan)
    if not flags.dry_run:
        render.data(entries.on_disk(repo.stats()))
        render.talk(*entries.faded(plan.faded))
    if flags.rekey and flags.dry_run:
        render.talk("note: the size does not include what --rekey frees")
    chained = sum(row.chained_bytes for row in plan.decisions)
    if chained and not flags.rekey:
        render.talk(f"note: delta chains keep {render.size(chained)}; use --rekey to free them")


def grace(repo: Repo) -> str:
    """Return the setting gc-grace as text."""
    return render.printable(str(repo.setting("gc-grace")))


def tell_waiting(repo: Repo, plan: GcPlan) -> None:
    """Say what waits for the end of its grace period: dropped commits, replaced near forms."""
    what = [counted(len(plan.waiting), "dropped commit")] if plan.waiting else []
    if plan.replaced:
        what.append(f"the near form of {counted(len(plan.replaced), 'archived commit')}")
    if what:
        size = f" with {render.size(plan.waiting_bytes)}" if plan.waiting_bytes > 0 else ""
        render.data(f"waiting to be deleted: {' and '.join(what)}{size}")
        day = "" if plan.next_deletion is None else f"from {entries.local(plan.next_deletion)} on, "
        render.talk(
            f"note: gc deletes the next of them {day}or now with --now",
            "note: 'ckpt undo' brings them back until then",
        )


def plan_json(plan: GcPlan, *, dry_run: bool) -> render.Json:
    """Return a plan with stable keys."""
    return {
        "dry_run": dry_run,
        "packs": sorted(plan.packs),
        **render.attributes(
            plan,
            "stale_files freed_bytes kept_bytes unreachable abandoned waiting waiting_bytes "
            "next_deletion",
        ),
        "archived": [_archived_json(row) for row in plan.archived],
        "replaced": list(plan.replaced),
        "faded": sorted(row.id for row in plan.faded),
        "commits": [
            {"id": row.name}
            | render.attributes(row, "commit.step action reasons freed_bytes chained_bytes")
            for row in plan.decisions
        ],
    }


def _archived_json(row: Archived) -> render.Json:
    error = render.attributes(row.error, "weight_rel max_abs lag")
    return {"id": row.commit, "between": list(row.between), "error": error}


def describe_sizes(plan: GcPlan, *, dry_run: bool, sweep: bool) -> str:
    """Say how many bytes gc frees and keeps."""
    freed, kept = plan.freed_bytes, render.size(plan.kept_bytes)
    if freed < 0:
        verb = "would take" if dry_run else "takes"
        return f"nothing to free: {verb} {render.size(-freed)} more, kept {kept}"
    verb = "would free" if dry_run else "freed" if sweep else "the next sweep frees"
    return f"{verb} {render.size(freed)}, kept {kept}"


def _show(plan: GcPlan) -> None:
    if plan.decisions:
        rows = [["step", "id", "action", "freed", "in chains", "reason"]]
        rows += [_row(row) for row in sorted(plan.decisions, key=_age, reverse=True)]
        render.table(rows)
    if plan.faded:
        render.data(
            f"fade to near: {counted(len(plan.faded), 'commit')} (the exact patches expire)"
        )
    if plan.archived:
        render.data(_archived_text(plan.archived))
    if plan.packs:
        render.data(counted(len(plan.packs), "unreachable pack"))
    if plan.unreachable:
        ids = entries.ids(plan.unreachable)
        render.data(f"{counted(len(plan.unreachable), 'unreachable commit')}: {ids}")
    if plan.abandoned:
        named = entries.ids(plan.abandoned)
        left = counted(len(plan.abandoned), "commit")
        render.data(f"deletes {left} that no branch, tag or pin reaches any more: {named}")
    for name in plan.stale_files:
        render.data(f"{name}  stale file of a process that ended")


def _archived_text(rows: Sequence[Archived]) -> str:
    """Return how many commits are archived, and how far they are off."""
    anchors = sum(not row.between for row in rows)
    lags = [row.error.lag for row in rows if row.error.lag is not None]
    error = max(row.error.weight_rel for row in rows)
    mean = sum(lags) / len(lags) if lags else 0.0
    return (
        f"archive {counted(len(rows), 'commit')}: {counted(anchors, 'anchor')}, the others between "
        f"them; lag {mean:.1f} on average, {max(lags, default=0.0):.1f} at most, error {error:.2g}"
    )


def _age(row: Decision) -> tuple[int, str, str]:
    """Return a sort key: by step, then by time."""
    return row.commit.step or 0, row.commit.time, row.name


def _row(row: Decision) -> list[str]:
    freed = render.size(row.freed_bytes) if row.freed_bytes else ""
    chained = render.size(row.chained_bytes) if row.chained_bytes else ""
    step = entries.step_text(row.commit.step)
    return [step, row.name[:8], row.action, freed, chained, ", ".join(row.reasons)]
