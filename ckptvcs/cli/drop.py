"""drop."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Context

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, Now, Yes, open_repo
from ckptvcs.cli.gc import describe_sizes, grace, plan_json, tell_waiting
from ckptvcs.text import commit_name, counted


def drop(
    context: Context,
    revisions: Annotated[
        list[str], Argument(metavar="REV...", help="commits or ranges A..B to drop")
    ],
    now: Now = False,
    yes: Yes = False,
    json: JsonOption = False,
) -> None:
    """Drop single commits; undo can restore them for some days."""
    repo = open_repo(context)
    commits = [repo.entry(name) for name in repo.select(revisions)]
    if not yes and not json and render.can_ask():
        later = "" if now else f" 'ckpt undo' can revert that for {grace(repo)}"
        what = "delete the data of" if now else "drop"
        named = ", ".join(entries.commit_name(entry) for entry in commits)
        if not render.confirm(f"{what} {counted(len(commits), 'commit')}: {named}?{later}"):
            render.talk("nothing was changed")
            return
    before = {branch.name: branch.commit for branch in repo.branches()}
    with render.progress("rekeying", None) as tick:
        plan = repo.drop(*revisions, now=now, progress=tick)
    if json:
        render.as_json(plan_json(plan, dry_run=False))
        return
    for entry in commits:
        render.data(f"dropped {entries.commit_name(entry)}")
    for branch in repo.branches():
        if before.get(branch.name) != branch.commit:
            at = commit_name(branch.step, branch.commit)
            render.talk(f"note: branch {render.printable(branch.name)} is at {at} now")
    if now:
        render.data(describe_sizes(plan, dry_run=False, sweep=True))
    tell_waiting(repo, plan)
