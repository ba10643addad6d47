"""Draw a graph of branching commits as text.

    *      main           one row for each commit, children above their parent;
    *                     a commit has the column of its main child,
    | *    main-2         its other children are one column to the right,
    | *                   and `|/` connects the lowest commit of their branch with it
    |/
    *

A commit has at most one parent.  So its child branches are drawn one after another, and no two
lines cross.  An empty row separates trees with different roots.  The main child leads to HEAD, or
needs the most columns: so n commits need at most 2 + log2(n) columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T", bound=str | int)


def draw_graph(
    parents: Mapping[T, T | None], straight: Collection[T] = ()
) -> Iterator[tuple[str, T | None]]:
    """Yield the rows of a graph, newest first: the drawing, and the commit or None.

    `parents` maps each commit to its parent, newest first; parents that are not keys are ignored.
    `straight` are the commits whose line stays in the first column.
    """
    children: dict[T, list[T]] = {name: [] for name in parents}
    roots: list[T] = []
    for name, parent in parents.items():
        (roots if parent is None or parent not in children else children[parent]).append(name)
    order = _upwards(roots, children)
    _straighten(order, children, set(straight))
    first = True
    for root in roots:
        if not first:
            yield "", None
        first = False
        for name, column in _downwards(root, children):
            yield "| " * column + "*", name
            parent = parents[name]
            if name != root and parent is not None and children[parent][0] != name:
                yield "| " * (column - 1) + "|/", None


def _upwards(roots: list[T], children: Mapping[T, list[T]]) -> list[T]:
    """Return all commits, parents before their children."""
    order = list(roots)
    for name in order:
        order += children[name]
    return order


def _straighten(order: list[T], children: dict[T, list[T]], straight: Collection[T]) -> None:
    """Put the main child of each commit first."""
    columns: dict[T, int] = {}
    for name in reversed(order):
        above = children[name]
        if not above:
            columns[name] = 1
            continue
        main = max(above, key=lambda child: (child in straight, columns[child]))
        above.remove(main)
        above.insert(0, main)
        columns[name] = max([columns[main], *(1 + columns[child] for child in above[1:])])


def _downwards(root: T, children: Mapping[T, list[T]]) -> list[tuple[T, int]]:
    """Return the commits of one tree with their columns, each after all of its children."""
    rows: list[tuple[T, int]] = []
    stack = [(root, 0)]
    while stack:
        name, column = stack.pop()
        rows.append((name, column))
        # The stack visits the last child first; reversed, the first child is on top.
        stack += [(child, column + bool(place)) for place, child in enumerate(children[name])]
    return rows[::-1]
