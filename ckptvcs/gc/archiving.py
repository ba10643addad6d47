"""Archiving: choose the commits that become points of a piecewise-linear trajectory.

    path      commits that follow one another without a fork: start, rows, and perhaps an end
    start     a commit that stays as it is; the first anchor
    rows      the commits to archive, oldest first: some become anchors, some lie between two
    end       a kept commit right after the rows, which can serve as the last anchor

`encode/archive.py` stores the paths, and chooses the anchors by their error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass

from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import ArchivedState
from ckptvcs.history.revision import Revisions
from ckptvcs.store.ids import ObjectId


@dataclass(frozen=True)
class ArchiveRule:
    """Which commits gc archives, and how.

    Attributes:
        after: Archive commits that are not among the newest `after` of any branch.
        every: Make every so many commits an anchor.
        lag: The largest lag of an archived commit; None stands for twice `every`.
    """

    after: int
    every: int = 4
    lag: float | None = None

    @property
    def lag_bound(self) -> float:
        """The largest lag of an archived commit."""
        return 2.0 * self.every if self.lag is None else self.lag

    @property
    def text(self) -> str:
        """The rule as settings."""
        lag = "" if self.lag is None else f" archive-lag {self.lag:g}"
        return f"archive-after {self.after} archive-every {self.every}{lag}"


@dataclass(frozen=True)
class Path:
    """Commits to archive one after another.

    `is_whole` says whether the last row must become an anchor even if fewer than `every` commits
    follow the anchor before: other lines start there.
    """

    start: ObjectId
    rows: tuple[ObjectId, ...]
    end: ObjectId | None = None
    is_whole: bool = False


class Pathfinder:
    """Finds the paths of one repository."""

    def __init__(
        self, catalog: Catalog, revisions: Revisions, kept: Set[ObjectId], rule: ArchiveRule
    ) -> None:
        """`kept` commits stay as they are."""
        self._catalog, self._rule = catalog, rule
        self._commits = revisions.visible()
        self._parents = {name: self._above(name) for name in self._commits}
        self._children: defaultdict[ObjectId, list[ObjectId]] = defaultdict(list)
        for name, parent in self._parents.items():
            if parent is not None:
                self._children[parent].append(name)
        self._kept, self._young = kept, self._newest(revisions)

    def _above(self, name: ObjectId) -> ObjectId | None:
        """Return the nearest ancestor that is not dropped."""
        below = self._catalog.ancestors(self._commits[name].parent)
        return next((above for above, _ in below if above in self._commits), None)

    def _newest(self, revisions: Revisions) -> set[ObjectId]:
        """Return the newest commits of each branch."""
        young: set[ObjectId] = set()
        for ref, tip in revisions.tips().items():
            name: ObjectId | None = tip if ref.startswith("heads/") else None
            for _ in range(self._rule.after):
                if name is None or name not in self._commits:
                    break
                young.add(name)
                name = self._parents[name]
        return young

    def paths(self) -> Iterator[Path]:
        """Yield the paths, ancestors first."""
        starts = [name for name, parent in self._parents.items() if parent is None]
        while starts:
            name = starts.pop()
            children = self._children[name]
            for child in children:
                line = [child]
                while len(self._children[line[-1]]) == 1:
                    line += self._children[line[-1]]
                yield from self._cut(name, line)
                starts.append(line[-1])

    def _cut(self, start: ObjectId, line: list[ObjectId]) -> Iterator[Path]:
        """Yield the paths of a line of commits, which ends at a fork or a tip."""
        rows: list[ObjectId] = []
        for name in line:
            if self._can_follow(start, name):
                rows.append(name)
                continue
            if rows:
                can_end = name not in self._young and self._is_near(start, name)
                yield Path(start, tuple(rows), name if can_end else None)
            start, rows = name, []
        if rows:
            yield Path(start, tuple(rows), is_whole=bool(self._children[rows[-1]]))

    def _can_follow(self, start: ObjectId, name: ObjectId) -> bool:
        """Return whether a commit can be archived after `start`."""
        if name in self._kept or name in self._young or not self._is_near(start, name):
            return False
        states = self._commits[name].parts.values()
        return any(state.exact for state in states) and not any(
            isinstance(state, ArchivedState) for state in states
        )

    def _is_near(self, start: ObjectId, name: ObjectId) -> bool:
        """Return whether two commits have the same tensors, without values that are not finite.

        Nothing starts or ends at an interpolated commit.
        """
        one, other = self._commits[start], self._commits[name]
        if one.schema != other.schema or one.nonfinite or other.nonfinite:
            return False
        form = self._catalog.archived().get(start)
        is_between = form is not None and bool(form.between)
        return not is_between and self._parts(start) == self._parts(name)

    def _parts(self, name: ObjectId) -> Set[str]:
        """Return the parts of a commit that are not dropped."""
        return self._commits[name].parts.keys() - self._catalog.dropped().parts.get(name, set())
