"""Lists of branches and tags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ckptvcs.cli import render

if TYPE_CHECKING:
    from ckptvcs import LogEntry, NamedCommit


def show_names(names: Sequence[NamedCommit], *, json: bool) -> None:
    """Print branches or tags with their commits; the current one is marked."""
    if json:
        render.as_json([asdict(one) for one in names])
        return
    width = max((len(one.name) for one in names), default=0)
    for one in names:
        mark = "* " if one.current else "  "
        step = "" if one.step is None else f"  step {one.step}"
        render.data(f"{mark}{one.name:<{width}}  {one.commit[:8]}{step}")


def warn_if_faded(entry: LogEntry) -> None:
    """Warn that a tag or a pin does not make a commit exact again."""
    if not entry.exact:
        form = render.fidelity(entry)
        render.talk(f"note: {entry.id[:8]} is {form} now; a tag or pin cannot make it exact again")
