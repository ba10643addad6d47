"""Times, tests of metrics, and orders of a log."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from ckptvcs import InvalidInputError
from ckptvcs.history.selection import MetricTest, parse_time

NOW = datetime(2026, 11, 29, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("3h", timedelta(hours=3)),
        ("90 min", timedelta(minutes=90)),
        ("2 days ago", timedelta(days=2)),
        ("1 week ago", timedelta(weeks=1)),
        ("45s", timedelta(seconds=45)),
        ("2D", timedelta(days=2)),
    ],
)
def test_an_age_counts_back_from_now(text: str, age: timedelta) -> None:
    assert parse_time(text, now=NOW) == NOW - age


def test_a_time_is_local_unless_it_names_a_zone() -> None:
    assert parse_time("2026-11-28T10:15+02:00") == datetime(2026, 11, 28, 8, 15, tzinfo=UTC)
    assert parse_time("2026-11-28 10:15:07Z") == datetime(2026, 11, 28, 10, 15, 7, tzinfo=UTC)
    assert parse_time("2026-11-28T10:15") == datetime(2026, 11, 28, 10, 15).astimezone()
    assert parse_time(NOW) == NOW


def test_a_date_begins_and_ends_with_its_day() -> None:
    first, last = (parse_time("2026-11-28", end=end) for end in (False, True))
    assert (first.year, first.day, first.hour) == (2026, 28, 0)
    assert timedelta(hours=22) < last - first < timedelta(hours=26)
    day = NOW.astimezone().date()
    assert parse_time("today", now=NOW).date() == day
    assert parse_time("yesterday", now=NOW, end=True).date() == day - timedelta(days=1)


@pytest.mark.parametrize(
    "text", ["", "tomorrow", "3 parsecs", "h", "-3h", "2026-13-01", "99999999999d"]
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="invalid time"):
        parse_time(text, now=NOW)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("loss<3", 2.9, True),
        ("loss<3", 3, False),
        ("loss <= 3", 3, True),
        ("loss>-1e-3", 0, True),
        ("loss>=4", 3, False),
        ("loss=3", 3, True),
        ("loss==3", 3.1, False),
        ("loss!=3", 3.1, True),
        ("loss<3", math.nan, False),
        ("loss=nan", math.nan, True),
        ("loss!=nan", 3, True),
        ("loss!=nan", math.nan, False),
        ("loss<inf", 3, True),
    ],
)
def test_a_metric_is_compared_with_a_number(text: str, value: float, expected: bool) -> None:
    assert MetricTest.parse(text).holds({"loss": value}) == expected
    assert not MetricTest.parse(text).holds({"accuracy": value})


def test_a_name_may_have_other_signs() -> None:
    assert MetricTest.parse("val/top-5 acc>0.5").holds({"val/top-5 acc": 0.6})


@pytest.mark.parametrize("text", ["loss", "<3", "loss<", "loss<three", "loss<3<4", "loss=>3"])
def test_other_tests_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="invalid test"):
        MetricTest.parse(text)
