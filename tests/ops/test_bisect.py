"""Searches: whatever the line, and whatever cannot be judged, the first bad commit is found."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import InvalidInputError, LogEntry, Repo
from ckptvcs.ops.bisect import Verdict, finite_judge, line, metric_judge, narrow
from ckptvcs.ops.history_reader import handle

pytestmark = pytest.mark.any_backend


@st.composite
def lines(draw: st.DrawFn) -> tuple[int, int, set[int]]:
    """A number of commits, the first bad one, and those that cannot be judged."""
    count = draw(st.integers(2, 200))
    first = draw(st.integers(1, count - 1))
    return count, first, draw(st.sets(st.integers(1, max(1, count - 2))))


@given(lines())
def test_the_first_bad_one_is_found(given_: tuple[int, int, set[int]]) -> None:
    count, first, skipped = given_
    asked: list[int] = []

    def judge(number: int) -> Verdict:
        assert 0 < number < count - 1
        asked.append(number)
        if number in skipped:
            return Verdict.SKIP
        return Verdict.BAD if number >= first else Verdict.GOOD

    good, bad = narrow(count, judge)
    assert good < first <= bad
    assert all(number in skipped for number in range(good + 1, bad))
    assert len(asked) == len(set(asked))
    if not skipped:
        assert len(asked) <= math.ceil(math.log2(count))


def commits(repo: Repo, losses: list[float | None]) -> list[LogEntry]:
    return [
        repo.commit({"x": step}, step=step, metrics={} if loss is None else {"loss": loss})
        for step, loss in enumerate(losses)
    ]


def test_bisect_finds_the_first_commit_beyond_a_metric(repo: Repo) -> None:
    made = commits(repo, [3, 2, None, 1, None, 5, math.nan, 9])
    told: list[tuple[int | None, str, int]] = []
    found = repo.bisect(
        0,
        7,
        metric_judge("loss", above=4, below=None),
        lambda entry, verdict, left: told.append((entry.step, verdict, left)),
    )
    assert found.first_bad is None
    assert [entry.step for entry in found.candidates] == [4, 5]
    assert found.last_good.id == made[3].id
    assert told[:2] == [(0, "good", 7), (7, "bad", 7)]
    assert [(entry.step, verdict) for entry, verdict in found.tested] == [t[:2] for t in told]
    below = repo.bisect(0, 3, metric_judge("loss", above=None, below=2.5))
    assert below.first_bad is not None
    assert below.first_bad.id == made[1].id
    nan = repo.bisect(3, 6, metric_judge("loss", above=100, below=None)).candidates
    assert [entry.step for entry in nan] == [6]


def test_ends_that_are_not_what_they_are_said_to_be(repo: Repo) -> None:
    commits(repo, [1, 2, None, 3])
    judge = metric_judge("loss", above=2.5, below=None)
    for good, bad, text in [
        (0, 1, "given as bad, but is good"),
        (0, 2, "was skipped"),
        (2, 3, "given as good, but was skipped"),
        (1, 1, "both"),
    ]:
        with pytest.raises(InvalidInputError, match=text):
            repo.bisect(good, bad, judge)
    with pytest.raises(InvalidInputError, match="given as good, but is bad"):
        repo.bisect(0, 3, metric_judge("loss", above=0.5, below=None))


def test_the_line_between(repo: Repo) -> None:
    made = commits(repo, [1, 2, 3, 4])
    other = repo.commit({"x": "y"}, step=2)  # starts a branch at step 1
    names = [entry.id for entry in made]
    assert line(handle(repo).catalog, names[1], names[3]) == names[1:]
    assert line(handle(repo).catalog, names[0], other.id) == [*names[:2], other.id]
    with pytest.raises(InvalidInputError, match="not an ancestor") as caught:
        line(handle(repo).catalog, names[2], other.id)
    assert "graph" in (caught.value.hint or "")
    with pytest.raises(InvalidInputError) as caught:
        line(handle(repo).catalog, names[3], names[0])
    assert "first" in (caught.value.hint or "")


def test_weights_that_are_not_finite(repo: Repo) -> None:
    import torch

    torch.manual_seed(0)
    weights = {"w": torch.randn(400), "frozen": torch.randn(500), "mask": torch.zeros(3)}
    for step in range(12):
        weights = {**weights, "w": weights["w"] + 1}
        if step >= 7:
            weights["w"][step] = math.inf
        repo.commit({"model": weights}, step=step)
    found = repo.bisect(0, 11, finite_judge(handle(repo).catalog, handle(repo).restorer))
    assert found.first_bad is not None
    assert found.first_bad.step == 7
