"""Retention rules: pure functions over commits.

`ExactRule`  keeps exact patches of the newest commits, tags, pins and the best by a metric
`Policy`     keeps commits and parts that any of its rules keeps; the others are dropped
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from ckptvcs.errors import InvalidInputError
from ckptvcs.history.commit import PARTS, Commit
from ckptvcs.store.ids import ObjectId

BY_NAME = "by name"
REKEY = "--rekey"
"""Drop records with the rule BY_NAME, or a rule that ends with REKEY, ask for a rekey."""

_SPACING = 4  # commits of each distance that --keep-log-spaced leaves, about

EXACT, WEIGHTS, NEAR = FIDELITIES = ("exact", "weights", "near")
"""What stays exact: all parts, only the weights, or only parts that need no patch."""

PATCHED_PARTS: Mapping[str, frozenset[str]] = {
    EXACT: frozenset(PARTS),
    WEIGHTS: frozenset({"model"}),
    NEAR: frozenset(),
}
"""The parts whose exact patches each fidelity keeps."""


@dataclass(frozen=True)
class Best:
    """The best commits by a metric; of two equal commits, the older one is better.

    Attributes:
        metric: The name of the metric.
        way: `min` or `max`.
        count: The number of commits.
    """

    metric: str
    way: str
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Best:
        """Parse METRIC:min[:N] or METRIC:max[:N]; the metric may contain colons.

        Raises:
            InvalidInputError: the text has another form.
        """
        head, _, last = text.rpartition(":")
        named, count = text, 1
        if last.isdecimal() and last.isascii() and head:
            named, count = head, int(last[:9])
        metric, _, way = named.rpartition(":")
        if not metric or way not in ("min", "max") or not count:
            raise InvalidInputError(
                f"invalid rule '{text}', expected METRIC:min[:N] or METRIC:max[:N]"
            )
        return cls(metric, way, count)

    def pick(self, commits: Iterable[tuple[ObjectId, Commit]]) -> list[ObjectId]:
        """Return the best of some commits, ignoring missing and non-finite metrics."""
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
    """Which exact patches are kept: those of the `newest` commits of HEAD's branch, and those that
    the fidelities name of the best, of tagged and of pinned commits.
    """

    newest: int = 2
    best: Best | None = None
    best_fidelity: str = EXACT
    tag_fidelity: str = EXACT
    pin_fidelity: str = EXACT

    def wants_patch(self, metrics: Mapping[str, float]) -> bool:
        """Return whether a new commit with these metrics may keep its patch."""
        good = self.best is not None and self.best.metric in metrics
        return self.newest > 0 or (good and self.best_fidelity != NEAR)

    def kept_parts(
        self,
        lines: Iterable[Sequence[ObjectId]],
        tagged: Set[ObjectId],
        pinned: Set[ObjectId],
        candidates: Iterable[tuple[ObjectId, Commit]],
    ) -> dict[ObjectId, frozenset[str]]:
        """Return the parts that stay exact, by commit.

        `lines` are newest first; the best are picked from `candidates`.
        """
        rows = [(name, EXACT) for line in lines for name in line[: self.newest]]
        rows += [(name, self.tag_fidelity) for name in tagged]
        rows += [(name, self.pin_fidelity) for name in pinned]
        if self.best is not None:
            rows += [(name, self.best_fidelity) for name in self.best.pick(candidates)]
        kept: dict[ObjectId, frozenset[str]] = {}
        for name, fidelity in rows:
            kept[name] = kept.get(name, frozenset()) | PATCHED_PARTS[fidelity]
        return kept


@dataclass(frozen=True)
class Row:
    """A commit for the rules.

    `place` counts the newer commits of its branch that were not dropped.  `age` counts all newer
    commits, `ordinal` all older ones.
    """

    name: ObjectId
    commit: Commit
    place: int
    age: int
    ordinal: int
    stored_bytes: int


@dataclass(frozen=True)
class Policy:
    """Retention rules; a commit is dropped only if no rule keeps it.

    The rules `last`, `every`, `within`, `log_spaced` and `max_bytes` apply to each branch.

    Attributes:
        last: Keep this many newest commits.
        every: Keep commits whose step is a multiple of this number.
        within: Keep commits of the last so many seconds.
        best: Keep the best commits by these metrics.
        tagged: Keep commits that have a tag.
        log_spaced: Keep fewer commits the older they are.
        max_bytes: Keep the newest commits that together have at most this size in bytes.
        optimizer_last: Keep the optimizer part of this many newest commits of each branch.
        named: Drop these commits, and keep all others.
        rekey: Re-encode the deltas that need the dropped commits when their data is deleted.
    """

    last: int | None = None
    every: int | None = None
    within: float | None = None
    best: tuple[Best, ...] = ()
    tagged: bool = False
    log_spaced: bool = False
    max_bytes: int | None = None
    optimizer_last: int | None = None
    named: frozenset[ObjectId] = frozenset()
    rekey: bool = False

    @property
    def text(self) -> str:
        """The rules as options of the command line."""
        rules: list[tuple[str, object]] = [
            ("last", self.last),
            ("every", self.every),
            ("within", None if self.within is None else f"{self.within:.0f}s"),
            *(("best", f"{b.metric}:{b.way}:{b.count}") for b in self.best),
            ("tag", "" if self.tagged else None),
            ("log-spaced", "" if self.log_spaced else None),
            ("optimizer-last", self.optimizer_last),
        ]
        options = [(f"--keep-{name}", value) for name, value in rules]
        options.append(("--max-size", self.max_bytes))
        options.insert(0, (self.why_dropped, "" if self.named else None))
        options.append((REKEY, "" if self.rekey else None))
        return " ".join(f"{name} {value}".strip() for name, value in options if value is not None)

    @property
    def asks_rekey(self) -> bool:
        """Whether the deltas that need deleted commits are re-encoded."""
        return self.rekey or bool(self.named)

    @property
    def without_drops(self) -> Policy:
        """The rules that apply beside archiving, which takes the place of drops."""
        return Policy(optimizer_last=self.optimizer_last, rekey=self.rekey)

    @property
    def why_dropped(self) -> str:
        """The reason of a drop."""
        return BY_NAME if self.named else "no rule keeps it"

    @property
    def drops(self) -> bool:
        """Whether any rule drops whole commits; otherwise all commits are kept."""
        numbers = (self.last, self.every, self.within, self.max_bytes)
        given = any(number is not None for number in numbers)
        return given or bool(self.best or self.tagged or self.log_spaced or self.named)

    def kept(
        self, lines: Iterable[Sequence[Row]], tagged: Set[ObjectId], now: datetime
    ) -> dict[ObjectId, list[str]]:
        """Return the reasons for each kept commit; `lines` are branches, newest first."""
        reasons: dict[ObjectId, list[str]] = {}
        known: dict[ObjectId, Commit] = {}
        for line in lines:
            stored, ages = 0, _ages(line, now)
            for row in line:
                stored += row.stored_bytes
                known[row.name] = row.commit
                for reason in self._reasons(row, stored, ages[row.name]):
                    found = reasons.setdefault(row.name, [])
                    if reason not in found:
                        found.append(reason)
        for best in self.best:
            for name in best.pick(known.items()):
                reasons.setdefault(name, []).append(f"best {best.metric}")
        for name in tagged & known.keys() if self.tagged else ():
            reasons.setdefault(name, []).append("tag")
        return reasons

    def _reasons(self, row: Row, stored: int, age: float) -> Iterator[str]:
        if self.last is not None and row.place < self.last:
            yield f"last {self.last}"
        step = row.commit.step
        if self.every is not None and step is not None and step % self.every == 0:
            yield f"every {self.every}"
        if self.within is not None and age <= self.within:
            yield "recent"
        if self.max_bytes is not None and stored <= self.max_bytes:
            yield "size"
        # A commit that is dropped at one age would not be kept at a later one.
        if self.named and row.name not in self.named:
            yield "not named"
        if self.log_spaced and row.age < _SPACING * (row.ordinal & -row.ordinal or 1 << 62):
            yield "log-spaced"


def _ages(line: Sequence[Row], now: datetime) -> dict[ObjectId, float]:
    """Return the age of each commit of a line in seconds; `line` is newest first.

    Clocks can be wrong.  A commit from the future is as old as the next
    newer one; no commit is older than its parent.
    """
    made: list[datetime] = []
    for row in line:
        time = datetime.fromisoformat(row.commit.time)
        made.append(time if time <= now else made[-1] if made else now)
    ages: dict[ObjectId, float] = {}
    newest = 0.0
    for row, time in zip(reversed(line), reversed(made), strict=True):
        age = (now - time).total_seconds()
        newest = min(newest, age) if ages else age
        ages[row.name] = newest
    return ages
