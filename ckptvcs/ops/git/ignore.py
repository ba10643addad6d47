"""The rules of .gitignore files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from ckptvcs.ops.git.objects import UnreadableError, read_file

_MAX_BYTES = 1 << 16
_MAX_RULES = 2000  # of one file
_MAX_PARTS = 32  # of one rule
_ANY_FOLDERS = None  # stands for `**`


@dataclass(frozen=True)
class Rule:
    """One line of a .gitignore file.

    Attributes:
        parts: A pattern for each part of the path; None is `**`.
        anchored: Whether the rule counts from the folder of its file, not only for the last part.
        folders_only: Whether it matches folders only.
        ignores: False for a rule that begins with `!`.
    """

    parts: tuple[re.Pattern[str] | None, ...]
    anchored: bool
    folders_only: bool
    ignores: bool

    def matches(self, parts: Sequence[str], *, is_folder: bool) -> bool:
        """Return whether the rule matches a path below the folder of its file."""
        if self.folders_only and not is_folder:
            return False
        if not self.anchored:
            return _matches(self.parts[0], parts[-1])
        return _match_all(self.parts, parts)


def _matches(pattern: re.Pattern[str] | None, part: str) -> bool:
    return pattern is None or pattern.match(part) is not None


def _match_all(patterns: Sequence[re.Pattern[str] | None], parts: Sequence[str]) -> bool:
    """Match all parts; after a failure, the last `**` takes one part more."""
    row = at = 0
    back: tuple[int, int] | None = None
    while at < len(parts):
        if row < len(patterns) and patterns[row] is _ANY_FOLDERS:
            back = row, at
            row += 1
            if row == len(patterns):
                return True  # at the end, `**` matches everything inside
        elif row < len(patterns) and _matches(patterns[row], parts[at]):
            row, at = row + 1, at + 1
        elif back is not None:
            row, at = back[0] + 1, back[1] + 1
            back = back[0], at
        else:
            return False
    return row == len(patterns)


def read_rules(path: Path) -> list[Rule]:
    """Return the rules of a file in its order; none if it cannot be read."""
    try:
        text = read_file(path, _MAX_BYTES).decode("utf-8", "surrogateescape")
    except UnreadableError:
        return []
    return [rule for line in text.split("\n")[:_MAX_RULES] if (rule := _rule(line)) is not None]


def _rule(line: str) -> Rule | None:
    line = re.sub(r"(?<!\\) +$", "", line.removesuffix("\r"))
    ignores = not line.startswith("!")
    line = line if ignores else line[1:]
    if not line or (ignores and line.startswith("#")):
        return None
    body = line.rstrip("/")
    parts = body.lstrip("/").split("/")
    if not body.strip("/") or len(parts) > _MAX_PARTS:
        return None
    try:
        patterns = tuple(_ANY_FOLDERS if part == "**" else _pattern(part) for part in parts)
    except re.error:
        return None
    anchored = len(parts) > 1 or body.startswith("/")
    return Rule(patterns, anchored, line.endswith("/"), ignores)


def _pattern(part: str) -> re.Pattern[str]:
    """Compile a pattern; `translate` makes one that takes no time to answer that explodes."""
    part = re.sub(r"\\(.)", r"[\1]", part, flags=re.DOTALL).replace("[^", "[!")
    return re.compile(translate(part))


class Ignored:
    """The rules that hold in a folder: its own and those of the folders above."""

    def __init__(self, rules: Sequence[tuple[int, Rule]] = ()) -> None:
        """`rules` begin with the weakest; the number is the depth of the folder of each."""
        self._rules = rules

    def below(self, path: Path, depth: int) -> Ignored:
        """Return the rules with those of a file in a folder of this depth."""
        new = [(depth, rule) for rule in read_rules(path)]
        return Ignored([*self._rules, *new]) if new else self

    def covers(self, parts: Sequence[str], *, is_folder: bool) -> bool:
        """Return whether a path is ignored; the folders above it are not."""
        for depth, rule in reversed(self._rules):
            if rule.matches(parts[depth:], is_folder=is_folder):
                return rule.ignores
        return False
