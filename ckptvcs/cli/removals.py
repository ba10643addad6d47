"""Report what became of a checkpoint and of its source files, for import and watch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptvcs.cli import render
from ckptvcs.text import counted

if TYPE_CHECKING:
    from ckptvcs import ImportItem, WatchEvent

    Outcome = ImportItem | WatchEvent


def tell(name: str, outcome: Outcome) -> None:
    """Print the error of a checkpoint with its hint, then its notes."""
    shown = render.printable(name)
    if outcome.problem is not None:
        render.complain(f"error: {shown}: {render.printable(outcome.problem.message)}")
        if outcome.problem.hint:
            render.complain(f"hint: {render.printable(outcome.problem.hint)}")
    for note in outcome.notes:
        render.talk(f"note: {shown}: {render.printable(note)}")


def tell_removal(name: str, outcome: Outcome, form: str = "") -> None:
    """Print the removed files, the pin, and the reason if files were kept."""
    removal = outcome.removal
    if removal is None:
        return
    for file in removal.removed:
        links = f", has {counted(file.other_names, 'other name')}" if file.other_names else ""
        render.talk(f"removed: {render.printable(str(file.path))}{form}{links}")
    if removal.pinned:
        render.talk(f"pinned: {outcome.id and outcome.id[:8]}, so that it stays exact")
    if removal.keep_reason is not None:
        render.complain(f"not removed: {render.printable(f'{name}: {removal.keep_reason}')}")


def as_json(outcome: Outcome) -> dict[str, render.Json]:
    """Return the fields that import and watch have in common."""
    removal = outcome.removal
    return {
        "problem": outcome.problem and outcome.problem.message,
        "notes": outcome.notes,
        "removed": [file.path for file in removal.removed] if removal else [],
        "keep_reason": removal.keep_reason if removal else None,
        "pinned": removal.pinned if removal else False,
    }
