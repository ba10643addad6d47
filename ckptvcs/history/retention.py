"""Which commits keep what: pure functions over commits.

exact forms   `ExactRule`: the newest, tags, pins and the best by a metric; the others fade to near
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from ckptvcs.errors import InvalidInputError
from ckptvcs.history.commit import PARTS, Commit
from ckptvcs.store.object import ObjectId

EXACT, WEIGHTS, NEAR = FIDELITIES = ("exact", "weights", "near")
"""How much of a commit is kept bit for bit: all, its weights, only what needs no patch."""

PATCHED_PARTS: Mapping[str, frozenset[str]] = {
    EXACT: frozenset(PARTS), WEIGHTS: frozenset({"model"}), NEAR: frozenset(),
}  # fmt: skip
"""The parts whose exact patches each fidelity keeps."""


@dataclass(frozen=True)
class Best:
    """The `count` best commits by a metric; of equals the older one counts as better."""

    metric: str
    way: str
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Best:
        """Read METRIC:min, METRIC:max or METRIC:min:N; metrics may hold colons.

        Raises:
            InvalidInputError: it is none of these.
        """
        head, _, last = text.rpartition(":")
        count = 1
        if last.isdigit() and head:
            text, count = head, int(last[:9])
        metric, _, way = text.rpartition(":")
        if not metric or way not in ("min", "max") or not count:
            raise InvalidInputError(f"'{text}' is no METRIC:min or METRIC:max, with :N or without")
        return cls(metric, way, count)

    def pick(self, commits: Iterable[tuple[ObjectId, Commit]]) -> list[ObjectId]:
        """The best of some commits; those whose metric is missing or not finite do not count."""
        found = [
            (commit.metrics[self.metric], commit.time, name)
            for name, commit in commits
            if math.isfinite(commit.metrics.get(self.metric, math.nan))
        ]
        sign = 1 if self.way == "min" else -1
        found.sort(key=lambda row: (sign * row[0], row[1], row[2]))
        return [name for *_, name in found[: self.count]]


@dataclass(frozen=True)
class ExactRule:
    """Whose exact patches stay: those of the `newest` commits of HEAD's branch, and as much as the
    fidelities say of the best, of tags, of pins.
    """

    newest: int = 2
    best: Best | None = None
    best_fidelity: str = EXACT
    tag_fidelity: str = EXACT
    pin_fidelity: str = EXACT

    def wants_patch(self, metrics: Mapping[str, float]) -> bool:
        """Whether a commit with these metrics may keep a patch when it is new."""
        good = self.best is not None and self.best.metric in metrics
        return self.newest > 0 or (good and self.best_fidelity != NEAR)

    def kept_parts(
        self,
        newest: Iterable[ObjectId],
        tagged: Set[ObjectId],
        pinned: Set[ObjectId],
        candidates: Iterable[tuple[ObjectId, Commit]],
    ) -> dict[ObjectId, frozenset[str]]:
        """The parts that stay exact, by commit: `newest` first comes, `candidates` are those that
        the best are picked from.
        """
        rows = [(name, EXACT) for name, _ in zip(newest, range(self.newest), strict=False)]
        rows += [(name, self.tag_fidelity) for name in tagged]
        rows += [(name, self.pin_fidelity) for name in pinned]
        if self.best is not None:
            rows += [(name, self.best_fidelity) for name in self.best.pick(candidates)]
        kept: dict[ObjectId, frozenset[str]] = {}
        for name, fidelity in rows:
            kept[name] = kept.get(name, frozenset()) | PATCHED_PARTS[fidelity]
        return kept
