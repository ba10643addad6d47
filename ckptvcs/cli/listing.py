"""Lists of branches and tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptvcs.cli import entries, render

if TYPE_CHECKING:
    from ckptvcs import LogEntry, NamedCommit


def show_names(names: Sequence[NamedCommit], *, json: bool) -> None:
    """Print branches or tags with their commits; the current one is marked."""
    if json:
        render.as_json(names)
        return
    width = max((len(row.name) for row in names), default=0)
    for row in names:
        mark = "* " if row.current else "  "
        step = "" if row.step is None else f"  step {row.step}"
        render.data(f"{mark}{row.name:<{width}}  {row.commit[:8]}{step}")


def warn_if_faded(entry: LogEntry) -> None:
    """Warn that a tag or a pin does not make a commit exact again."""
    if not entry.exact:
        form = entries.fidelity(entry)
        render.talk(f"note: {entry.id[:8]} is {form} now; a tag or pin cannot make it exact again")
