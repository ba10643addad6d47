"""Graph: where lines of commits part, drawn in text.

    *      main           one row for each commit, children above their parent;
    *                     a commit stands in the column of the child that goes on straight up,
    | *    main-2         its other children stand one column to the right of it,
    | *                   and `|/` leads from the lowest of these back to it
    |/
    *

Commits have one parent at most, so the lines of a commit are drawn one after another, each closed
before the next: columns nest, no two lines cross.  An empty row parts what has no common root.
The line that needs most columns goes straight up, unless HEAD's does: n commits need no more than
2 + log2(n) columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T", bound=str | int)


def draw_graph(
    parents: Mapping[T, T | None], straight: Collection[T] = ()
) -> Iterator[tuple[str, T | None]]:
    """The rows of a graph, the newest first: what is drawn, and the commit that stands there; None
    for a row that only draws lines.

    `parents` names the parent of every commit, newest first; a parent that is not among them is
    none.  `straight` are commits whose line stays in the first column.
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
    """Every commit, parents before their children."""
    order = list(roots)
    for name in order:
        order += children[name]
    return order


def _straighten(order: list[T], children: dict[T, list[T]], straight: Collection[T]) -> None:
    """Put the child first that goes straight up."""
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
    """The commits of one tree with their columns, each after all of its children."""
    found: list[tuple[T, int]] = []
    stack = [(root, 0)]
    while stack:
        name, column = stack.pop()
        found.append((name, column))
        # Taken from the end and turned round as a whole: the first child comes out on top.
        stack += [(c, column + bool(place)) for place, c in enumerate(children[name])]
    return found[::-1]
