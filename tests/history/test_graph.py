"""Graphs: every commit once, every edge to a parent drawn, and nothing else."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.history.graph import draw_graph

Forest = dict[int, int | None]


def edges(rows: list[tuple[str, int | None]]) -> dict[int, int | None]:
    """The parent of every commit, as a reader follows the lines downwards; None where they end."""
    found: dict[int, int | None] = {}
    for start, (drawn, name) in enumerate(rows):
        if name is None:
            continue
        at = drawn.index("*")
        parent: int | None = None
        for below, other in rows[start + 1 :]:
            row = below.ljust(at + 1)
            if at and row[at - 1] == "/":
                at -= 2  # the line goes over into the one on its left
                assert row[at] == "|"
            elif row[at] == "*":
                parent = other
                break
            elif row[at] != "|":
                break
        found[name] = parent
    return found


@st.composite
def forests(draw: st.DrawFn) -> tuple[Forest, set[int]]:
    """Commits 0, 1, ... with parents of lower numbers, newest first; and one line of them."""
    count = draw(st.integers(0, 40))
    parents: Forest = {}
    for name in range(count):
        recent = st.integers(max(0, name - 3), name - 1) if name else st.none()
        parents[name] = draw(st.none() | recent | recent | st.integers(0, max(0, name - 1)))
        if name == 0:
            parents[name] = None
    line: set[int] = set()
    at = draw(st.sampled_from(range(count))) if count else None
    while at is not None:
        line.add(at)
        at = parents[at]
    return dict(sorted(parents.items(), reverse=True)), line


@given(forests())
def test_a_reader_finds_every_parent(given_: tuple[Forest, set[int]]) -> None:
    parents, line = given_
    rows = list(draw_graph(parents, line))
    assert sorted(name for _, name in rows if name is not None) == sorted(parents)
    assert edges(rows) == parents
    place = {name: number for number, (_, name) in enumerate(rows) if name is not None}
    assert all(place[name] < place[up] for name, up in parents.items() if up is not None)
    for drawn, name in rows:
        assert drawn.count("*") == (name is not None)
        assert name not in line or drawn == "*"
        columns = len(drawn) // 2 + 1
        assert columns <= 2 + math.log2(max(1, len(parents)))


def test_it_looks_like_this() -> None:
    parents = {
        "m4": "m3",
        "y2": "x1",
        "x2": "x1",
        "m3": "m2",
        "x1": "m2",
        "m2": "m1",
        "m1": None,
        "other": None,
    }
    rows = list(draw_graph(parents, {"m4", "m3", "m2", "m1"}))
    assert [f"{drawn} {name or ''}".rstrip() for drawn, name in rows] == [
        "* m4",
        "* m3",
        "| * y2",
        "| | * x2",
        "| |/",
        "| * x1",
        "|/",
        "* m2",
        "* m1",
        "",
        "* other",
    ]


def test_what_is_not_there_has_no_line() -> None:
    assert list(draw_graph({3: 2, 2: 1})) == [("*", 3), ("*", 2)]
    assert list(draw_graph({})) == []


def test_a_fork_at_every_commit_takes_one_more_column() -> None:
    spine = {f"s{n}": f"s{n - 1}" if n else None for n in range(500)}
    leaves: dict[str, str | None] = {f"leaf{n}": f"s{n}" for n in range(499)}
    rows = list(draw_graph(leaves | dict(reversed(spine.items()))))
    assert {drawn for drawn, _ in rows} == {"*", "| *", "|/"}
    assert len(rows) == 500 + 2 * 499


def test_thousands_of_commits_and_forks() -> None:
    count = 10_000
    parents: Forest = {n: n - 1 if n % 3 else max(0, n - 5) for n in range(count - 1, 0, -1)}
    parents[0] = None
    rows = list(draw_graph(parents))
    assert sum(name is not None for _, name in rows) == count
    assert len(rows) < 2 * count
