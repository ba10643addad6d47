"""Which commits a log lists, and in which order."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from typing import TYPE_CHECKING

from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.commit import Commit

if TYPE_CHECKING:
    from ckptvcs.history.log import LogEntry

Time = str | datetime
"""A time: ISO 8601 (local unless it names a zone), or an age such as `3h` or `2 days ago`."""

_SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
    **dict.fromkeys(("w", "week", "weeks"), 7 * 86400),
}
_AGE = re.compile(r"(\d{1,6})\s*([a-z]+)(?:\s+ago)?\Z")
_TEST = re.compile(r"([^<>=]+?)\s*(<=|>=|!=|==|<|>|=)\s*([^<>=!]+)\Z")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}
SORT_KEYS = ("step", "time", "size")
_MOST_LISTED = 6


def parse_time(given: Time, *, now: datetime | None = None, end: bool = False) -> datetime:
    """Return a point in time, with its zone.

    A date alone means its first moment, or with `end` its last one.

    Raises:
        InvalidInputError: the text is not a time.
    """
    if isinstance(given, datetime):
        return given.astimezone()
    now, text = now or datetime.now(UTC), given.strip().lower()
    age = _AGE.match(text)
    if age is not None and age[2] in _SECONDS:
        return now - timedelta(seconds=int(age[1]) * _SECONDS[age[2]])
    try:
        days = {"today": 0, "yesterday": 1}
        if text in days:
            day = (now.astimezone() - timedelta(days=days[text])).date()
        else:
            day = date.fromisoformat(text)
        return datetime.combine(day, time.max if end else time.min).astimezone()
    except (ValueError, OverflowError):
        pass
    try:
        return datetime.fromisoformat(given.strip()).astimezone()
    except (ValueError, OverflowError):
        raise InvalidInputError(
            f"invalid time '{given}'", hint="write 2026-11-29, 2026-11-29T14:30, 3h or '2 days ago'"
        ) from None


@dataclass(frozen=True)
class MetricTest:
    """A comparison of a metric with a number, such as `loss<3`."""

    name: str
    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> MetricTest:
        """Return the test that a text describes.  Raises InvalidInputError."""
        match = _TEST.match(text.strip())
        if match is not None:
            try:
                return cls(match[1].strip(), match[2], float(match[3]))
            except ValueError:
                pass
        raise InvalidInputError(f"invalid test of a metric '{text}'", hint="write 'loss<3'")

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Return whether a commit has the metric, and its value passes."""
        if self.name not in metrics:
            return False
        value = metrics[self.name]
        if math.isnan(self.value) and self.operator in ("=", "==", "!="):
            return math.isnan(value) == (self.operator != "!=")
        return _COMPARE[self.operator](value, self.value)


@dataclass(frozen=True)
class Selection:
    """Which commits a log lists, and in which order.

    Attributes:
        names: Only these commits; None for all.
        since: Only commits of this time or later.
        until: Only commits of this time or earlier.
        low: Only commits of this step or a later one.
        high: Only commits of this step or an earlier one.
        tests: Only commits whose metrics pass.
        sort: The sort key, `step`, `time`, `size` or a metric, highest first; None for the order
            of the history.
        reverse: Whether the order is reversed.
    """

    names: frozenset[str] | None = None
    since: datetime | None = None
    until: datetime | None = None
    low: int | None = None
    high: int | None = None
    tests: tuple[MetricTest, ...] = ()
    sort: str | None = None
    reverse: bool = False

    @property
    def needs_all(self) -> bool:
        """Whether the first commits are not known before all commits are read."""
        return self != ALL

    def wants(self, name: str, commit: Commit) -> bool:
        """Return whether a commit is listed, if its metrics pass."""
        if self.names is not None and name not in self.names:
            return False
        if (self.low, self.high) != (None, None) and (
            commit.step is None
            or (self.low is not None and commit.step < self.low)
            or (self.high is not None and commit.step > self.high)
        ):
            return False
        if self.since is None and self.until is None:
            return True
        made = datetime.fromisoformat(commit.time)
        return (self.since is None or made >= self.since) and (
            self.until is None or made <= self.until
        )

    def pick(self, entries: Iterable[LogEntry], limit: int | None) -> list[LogEntry]:
        """Return the first `limit` commits that pass, in order.

        Raises:
            NotFoundError: no commit has a metric that is tested or sorted by.
        """
        if not self.tests and self.sort is None and not self.reverse:
            return list(islice(entries, limit))
        candidates = list(entries)
        asked = [test.name for test in self.tests]
        if self.sort is not None and self.sort not in SORT_KEYS:
            asked.append(self.sort)
        for name in asked:
            _require(name, candidates)
        selected = [
            entry for entry in candidates if all(t.holds(entry.metrics) for t in self.tests)
        ]
        if self.sort is not None:
            selected = self._sorted(selected, self.sort)
        elif self.reverse:
            selected.reverse()
        return selected[:limit]

    def _sorted(self, entries: list[LogEntry], key: str) -> list[LogEntry]:
        """Sort commits; those without a value come last."""

        def value(entry: LogEntry) -> float | None:
            if key == "step":
                return entry.step
            if key == "time":
                return datetime.fromisoformat(entry.commit.time).timestamp()
            if key == "size":
                return entry.stored_bytes + entry.exact_bytes
            return entry.metrics.get(key)

        valued = [(entry, value(entry)) for entry in entries]
        sortable = [(entry, v) for entry, v in valued if v is not None and not math.isnan(v)]
        sortable.sort(key=lambda pair: pair[1], reverse=not self.reverse)
        rest = [entry for entry, v in valued if v is None or math.isnan(v)]
        return [entry for entry, _ in sortable] + rest


ALL = Selection()
"""All commits, newest first."""


def _require(name: str, entries: list[LogEntry]) -> None:
    """Raise NotFoundError if no commit has a metric."""
    if entries and not any(name in entry.metrics for entry in entries):
        metrics = sorted({metric for entry in entries for metric in entry.metrics})
        listed = ", ".join(metrics[:_MOST_LISTED]) + (
            ", ..." if len(metrics) > _MOST_LISTED else ""
        )
        raise NotFoundError(
            f"no commit has the metric '{name}'", hint=f"use one of {listed}" if metrics else None
        )
