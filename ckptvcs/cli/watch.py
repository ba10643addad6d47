"""watch."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import InvalidInputError, NotFoundError, after

if TYPE_CHECKING:
    from ckptvcs import WatchEvent
    from ckptvcs.repo import Repo

_ONCE, _SETTLES = 10.0, 10  # seconds and times --settle, after which --once leaves what changes


def watch(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="directory that a trainer writes to")
    ],
    pattern: Annotated[
        str | None, typer.Option(metavar="GLOB", help="select names, for example 'step*.pt'")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="codec, as for commit")] = None,
    branch: Annotated[str | None, typer.Option(help="target branch (does not move HEAD)")] = None,
    keep_local: Annotated[
        int | None,
        typer.Option("--keep-local", metavar="N", help="delete originals except the newest N"),
    ] = None,
    accept_near: Annotated[
        bool,
        typer.Option(
            "--accept-near", help="also delete originals of near commits (with --keep-local)"
        ),
    ] = False,
    interval: Annotated[float, typer.Option(help="seconds between scans")] = 5.0,
    settle: Annotated[float, typer.Option(help="seconds without a change before a commit")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="commit what is there, then exit")] = False,
    json: JsonOption = False,
) -> None:
    """Commit new checkpoints of a running training."""
    if accept_near and keep_local is None:
        raise InvalidInputError("--accept-near goes with --keep-local")
    if not (0 < interval < math.inf and 0 <= settle < math.inf):
        raise InvalidInputError("--interval is above 0, --settle not below")
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
        raise NotFoundError(f"there is no folder {folder}")
    if not once:
        later = "" if folder.is_dir() else ", which is not there yet"
        render.talk(f"watching {render.printable(str(folder))}{later}; Ctrl-C ends it")
    left: frozenset[str] | None = None  # of what was there at first
    told: set[str] = set()
    end = time.monotonic() + max(_ONCE, _SETTLES * settle)
    while True:
        for event in watcher.look():
            if once and event.problem is not None and event.name == watcher.name:
                raise event.problem
            with after(_made(event)):
                _say(repo, event, json=json)
                sys.stdout.flush()
        left = watcher.waiting if left is None else left & watcher.waiting
        if once and time.monotonic() > end:
            for name in sorted(left & watcher.unsettled - watcher.written):
                render.talk(f"left: {render.printable(name)} keeps changing")
            left -= watcher.unsettled - watcher.written
        if once and not left:
            return
        for name in sorted(left & watcher.written - told) if once else ():
            render.talk(f"waiting: {render.printable(name)} is open to write")
            told.add(name)
        time.sleep(min(settle, interval) / 2 + 0.01 if once else interval)


def _made(event: WatchEvent) -> str:
    new = event.id is not None and event.gone is None and event.problem is None
    return f"commit {event.id and event.id[:8]} was made" if new else ""


def _say(repo: Repo, event: WatchEvent, *, json: bool) -> None:
    if json:
        render.as_json(_json(repo, event))
        return
    name = render.printable(event.name)
    if event.problem is not None:
        render.talk(f"error: {name}: {render.printable(event.problem.message)}")
        if event.problem.hint:
            render.talk(f"hint: {render.printable(event.problem.hint)}")
    elif event.gone is not None:
        for file in event.gone.removed:
            render.talk(f"removed: {render.printable(str(file.path))}")
        if event.gone.pinned:
            render.talk(f"pinned: {event.id and event.id[:8]}, so that it stays exact")
        if event.gone.kept is not None:
            render.talk(f"not removed: {render.printable(f'{event.name}: {event.gone.kept}')}")
    elif event.id is not None:
        entry = repo.entry(event.id)
        for note in event.notes:
            render.talk(f"note: {name}: {render.printable(note)}")
        step = "-" if event.step is None else str(event.step)
        sizes = f"{render.size(event.raw_bytes)} -> {render.size(entry.stored_bytes)}"
        ratio = render.ratio(event.raw_bytes, entry.stored_bytes)
        form = render.fidelity(entry)
        render.data(f"{event.id[:8]}  step {step}  {name}  {sizes} ({ratio})  {form}")


def _json(repo: Repo, event: WatchEvent) -> render.Json:
    gone = event.gone
    return {
        "name": event.name,
        "step": event.step,
        "commit": None if event.id is None else render.entry_json(repo.entry(event.id)),
        "problem": None if event.problem is None else event.problem.message,
        "notes": list(event.notes),
        "removed": [str(file.path) for file in gone.removed] if gone else [],
        "kept": gone.kept if gone else None,
        "pinned": gone.pinned if gone else False,
    }
