"""Which commits keep what: pure functions over commits.

exact forms     `ExactRule`: the newest, tags, pins and the best by a metric; others fade to near
commits, parts  `Policy`: what any of its rules keeps; the others are dropped
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from ckptvcs.errors import InvalidInputError
from ckptvcs.history.commit import PARTS, Commit
from ckptvcs.store.ids import ObjectId

_SPACING = 4  # commits of each distance that --keep-log-spaced leaves, about

EXACT, WEIGHTS, NEAR = FIDELITIES = ("exact", "weights", "near")
"""How much of a commit is kept bit for bit: all, its weights, only what needs no patch."""

PATCHED_PARTS: Mapping[str, frozenset[str]] = {
    EXACT: frozenset(PARTS),
    WEIGHTS: frozenset({"model"}),
    NEAR: frozenset(),
}
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
        named, count = text, 1
        if last.isdecimal() and last.isascii() and head:
            named, count = head, int(last[:9])
        metric, _, way = named.rpartition(":")
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
        lines: Iterable[Sequence[ObjectId]],
        tagged: Set[ObjectId],
        pinned: Set[ObjectId],
        candidates: Iterable[tuple[ObjectId, Commit]],
    ) -> dict[ObjectId, frozenset[str]]:
        """The parts that stay exact, by commit: `lines` are newest first, `candidates` those that
        the best are picked from.
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
    """A commit as the rules see it: its `place` on its branch, 0 being the newest; with those that
    were dropped counted too its `age`, and its `ordinal` from the root; the bytes it takes.
    """

    name: ObjectId
    commit: Commit
    place: int
    age: int
    ordinal: int
    stored_bytes: int


@dataclass(frozen=True)
class Policy:
    """Rules about which commits stay; what any of them keeps, stays.

    Of each branch: the newest `last`; those whose step is a multiple of `every`; those of the last
    `within` seconds; the newest that together take no more than `max_bytes`; with `log_spaced` ever
    fewer the older they are.  Of all: the `best`, and with `tagged` those with a tag.
    `optimizer_last` says for how many newest commits of each branch the optimizer part stays.
    """

    last: int | None = None
    every: int | None = None
    within: float | None = None
    best: tuple[Best, ...] = ()
    tagged: bool = False
    log_spaced: bool = False
    max_bytes: int | None = None
    optimizer_last: int | None = None

    @property
    def text(self) -> str:
        """The rules as the command line has them."""
        rules: list[tuple[str, object]] = [
            ("last", self.last),
            ("every", self.every),
            ("within", None if self.within is None else f"{self.within:.0f}s"),
            *(("best", f"{b.metric}:{b.way}:{b.count}") for b in self.best),
            ("tag", "" if self.tagged else None),
            ("log-spaced", "" if self.log_spaced else None),
            ("optimizer-last", self.optimizer_last),
        ]
        named = [(f"--keep-{name}", value) for name, value in rules]
        named.append(("--max-size", self.max_bytes))
        return " ".join(f"{name} {value}".strip() for name, value in named if value is not None)

    @property
    def drops(self) -> bool:
        """Whether there is a rule about whole commits: without one all of them stay."""
        numbers = (self.last, self.every, self.within, self.max_bytes)
        given = any(number is not None for number in numbers)
        return given or bool(self.best or self.tagged or self.log_spaced)

    def kept(
        self, lines: Iterable[Sequence[Row]], tagged: Set[ObjectId], now: datetime
    ) -> dict[ObjectId, list[str]]:
        """Why each commit that a rule keeps is kept; `lines` are branches, newest first."""
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
        # What is let go at one age is never asked for at a later one.
        if self.log_spaced and row.age < _SPACING * (row.ordinal & -row.ordinal or 1 << 62):
            yield "log-spaced"


def _ages(line: Sequence[Row], now: datetime) -> dict[ObjectId, float]:
    """Seconds since each commit of a line, newest first, was made, by clocks that may be wrong: a
    commit from the future is as old as the next newer one; none is older than those before it.
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
