"""Report what became of a checkpoint and of its source files, for import and watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptvcs.cli import render

if TYPE_CHECKING:
    from ckptvcs.errors import CkptError
    from ckptvcs.ops.originals import Removal


def tell(name: str, problem: CkptError | None, notes: Sequence[str]) -> None:
    """Print the error of a checkpoint with its hint, then its notes."""
    shown = render.printable(name)
    if problem is not None:
        render.talk(f"error: {shown}: {render.printable(problem.message)}")
        if problem.hint:
            render.talk(f"hint: {render.printable(problem.hint)}")
    for note in notes:
        render.talk(f"note: {shown}: {render.printable(note)}")


def tell_removal(name: str, commit: str | None, removal: Removal, form: str = "") -> None:
    """Print the removed files, the pin, and the reason if files were kept."""
    for file in removal.removed:
        links = f", has {file.other_names} other name(s)" if file.other_names else ""
        render.talk(f"removed: {render.printable(str(file.path))}{form}{links}")
    if removal.pinned:
        render.talk(f"pinned: {commit and commit[:8]}, so that it stays exact")
    if removal.kept is not None:
        render.talk(f"not removed: {render.printable(f'{name}: {removal.kept}')}")


def as_json(
    problem: CkptError | None, notes: Sequence[str], removal: Removal | None
) -> dict[str, render.Json]:
    """Return the fields that import and watch have in common."""
    return {
        "problem": None if problem is None else problem.message,
        "notes": list(notes),
        "removed": [str(file.path) for file in removal.removed] if removal else [],
        "keep_reason": removal.kept if removal else None,
        "pinned": removal.pinned if removal else False,
    }
