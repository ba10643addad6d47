"""watch."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Exit, Option

from ckptvcs.cli import entries, removals, render
from ckptvcs.cli.context import Branch, Codec, JsonOption, Pattern, open_repo
from ckptvcs.errors import ConflictError, InvalidInputError, NotFoundError, after

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptvcs import Watcher, WatchEvent
    from ckptvcs.repo import Repo

_ONCE, _SETTLES = 10.0, 10  # --once skips a changing file after these seconds, or so many --settle


def watch(
    context: Context,
    folder: Annotated[Path, Argument(metavar="DIR", help="directory that a trainer writes to")],
    pattern: Pattern = None,
    codec: Codec = None,
    branch: Branch = None,
    keep_local: Annotated[
        int | None,
        Option("--keep-local", metavar="N", help="keep the newest N originals, delete the others"),
    ] = None,
    accept_near: Annotated[
        bool, Option("--accept-near", help="also delete if the commit is near (--keep-local)")
    ] = False,
    interval: Annotated[float, Option(metavar="SECONDS", help="seconds between scans")] = 5.0,
    settle: Annotated[
        float, Option(metavar="SECONDS", help="commit after this many seconds without a change")
    ] = 2.0,
    once: Annotated[
        bool, Option("--once", help="commit the present checkpoints, then exit")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Commit new checkpoints of a running training."""
    if accept_near and keep_local is None:
        raise InvalidInputError("--accept-near requires --keep-local")
    if not (0 < interval < math.inf and 0 <= settle < math.inf):
        raise InvalidInputError("--interval must be > 0 and --settle >= 0")
    repo = open_repo(context)
    watcher = repo.watch(
        folder,
        pattern=pattern,
        codec=codec,
        branch=branch,
        settle=settle,
        keep_local=keep_local,
        accept_near=accept_near,
    )
    if once and not folder.is_dir():
        raise NotFoundError(f"directory {folder} does not exist")
    if not once:
        later = "" if folder.is_dir() else " (does not exist yet)"
        render.talk(f"watching {render.printable(str(folder))}{later}; press Ctrl-C to stop")
    codes = [0]

    def report(event: WatchEvent) -> None:
        _report(repo, event, json=json)
        codes.append(_code(event))

    commits = _commit_present if once else _commit_forever
    commits(watcher, report, interval, settle)
    if max(codes):
        raise Exit(max(codes))


def _code(event: WatchEvent) -> int:
    """Return the exit code of --once for an event, as import exits."""
    if event.problem is not None:
        return event.problem.exit_code
    kept = event.removal is not None and event.removal.keep_reason is not None
    return ConflictError.exit_code if kept else 0


def _report(repo: Repo, event: WatchEvent, *, json: bool) -> None:
    with after(_made(event)):
        if json:
            render.as_json(_json(repo, event))
        else:
            _tell(repo, event)
        sys.stdout.flush()


def _commit_forever(
    watcher: Watcher, report: Callable[[WatchEvent], None], interval: float, _settle: float
) -> None:
    while True:
        for event in watcher.look():
            report(event)
        time.sleep(interval)


def _commit_present(
    watcher: Watcher, report: Callable[[WatchEvent], None], interval: float, settle: float
) -> None:
    """Commit the checkpoints that exist now, and wait for those that are still written.

    Raises:
        CkptError: the directory cannot be read.
    """
    waiting: frozenset[str] | None = None
    announced: set[str] = set()
    end = time.monotonic() + max(_ONCE, _SETTLES * settle)
    while True:
        for event in watcher.look():
            if event.problem is not None and event.name == watcher.name:
                raise event.problem
            report(event)
        waiting = watcher.waiting if waiting is None else waiting & watcher.waiting
        if time.monotonic() > end:
            changing = watcher.unsettled - watcher.written
            for name in sorted(waiting & changing):
                render.talk(f"skipped: {render.printable(name)} keeps changing")
            waiting -= changing
        if not waiting:
            return
        for name in sorted(waiting & watcher.written - announced):
            render.talk(f"waiting: {render.printable(name)} is open for writing")
            announced.add(name)
        time.sleep(min(settle, interval) / 2 + 0.01)


def _made(event: WatchEvent) -> str:
    new = event.id is not None and event.removal is None and event.problem is None
    return f"commit {event.id and event.id[:8]} was made" if new else ""


def _tell(repo: Repo, event: WatchEvent) -> None:
    if event.problem is not None:
        removals.tell(event.name, event)
    elif event.removal is not None:
        removals.tell_removal(event.name, event)
    elif event.id is not None:
        entry = repo.entry(event.id)
        removals.tell(event.name, event)
        step = entries.step_text(event.step)
        sizes = entries.sizes(event.raw_bytes, entry.stored_bytes)
        name, form = render.printable(event.name), entries.fidelity(entry)
        render.data(f"{event.id[:8]}  step {step}  {name}  {sizes}  {form}")


def _json(repo: Repo, event: WatchEvent) -> render.Json:
    return {
        "name": event.name,
        "step": event.step,
        "commit": None if event.id is None else entries.entry_json(repo.entry(event.id)),
    } | removals.as_json(event)
