"""The provenance of a commit on the terminal and in JSON."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptvcs.cli import render
from ckptvcs.errors import CorruptionError

if TYPE_CHECKING:
    from ckptvcs import CodeState, LogEntry, ObjectId, Provenance
    from ckptvcs.repo import Repo


_WIDTH = 66  # columns for words behind a label


def is_dirty(repo: Repo, name: ObjectId) -> bool | None:
    """Whether the code had changes that git had not committed; None if that is not known."""
    try:
        found = repo.provenance(name)
    except CorruptionError:  # verify reports it
        return None
    return None if found is None or found.code is None else found.code.dirty


def as_json(entry: LogEntry, found: Provenance | None) -> dict[str, Any]:
    """The commit, who made it, and its provenance."""
    commit = entry.commit
    return {
        "id": entry.id,
        "step": commit.step,
        "host": commit.host,
        "user": commit.user,
        "code": commit.code,
        "provenance": None if found is None else found.as_json(),
    }


def show(entry: LogEntry, found: Provenance | None) -> None:
    """Print the provenance, and the diff behind it."""
    commit = entry.commit
    rows = [("commit", entry.id), ("by", f"{commit.user}@{commit.host}")]
    rows += [("code", commit.code or "")] if found is None else _fields(found)
    for label, value in rows:
        if value:
            render.data(f"{label:<10} {render.printable(value)}")
    if found is None:
        render.talk("this commit has no recorded provenance")
    elif found.code is not None and found.code.diff:
        lines = found.code.diff.removesuffix("\n").split("\n")
        render.data("", *(line.expandtabs() for line in lines))


def _fields(found: Provenance) -> list[tuple[str, str]]:
    gpus = Counter(found.gpus)
    return [
        ("folder", found.folder),
        *([] if found.code is None else _code(found.code)),
        ("python", found.python),
        ("platform", found.platform),
        *_lines("packages", [f"{name} {version}" for name, version in found.packages.items()]),
        ("gpu", ", ".join(name if n == 1 else f"{n} x {name}" for name, n in gpus.items())),
        ("runs", ", ".join(f"{name} {run}" for name, run in found.runs.items())),
        ("argv", shlex.join(found.argv or ())),
    ]


def _code(code: CodeState) -> list[tuple[str, str]]:
    changes = {True: "changed", False: "unchanged", None: "changes not known"}[code.dirty]
    branch = f" ({code.branch})" if code.branch else ""
    return [
        ("code", f"{code.commit}{branch}, {changes}"),
        *_lines("changed", code.changed),
        *_lines("untracked", code.untracked),
        ("", "" if code.complete else "the lists and the diff are not complete"),
    ]


def _lines(label: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """Rows of words, as many in a row as fit into a line of the terminal."""
    rows = [""]
    for word in words:
        if rows[-1] and len(rows[-1]) + len(word) > _WIDTH:
            rows.append("")
        rows[-1] += f"{word}, "
    rows[-1] = rows[-1].removesuffix(", ")
    return [*zip([label, *[""] * (len(rows) - 1)], rows, strict=True)]
