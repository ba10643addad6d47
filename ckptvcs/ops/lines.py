"""Lines: the branches to which the checkpoints of a folder are committed.

A folder may contain several series of names (`step-100.pt`, `step-100-ema.pt`, `best.pt`).  The
first series goes to the branch of HEAD.  Another series goes to the same branch while its steps
increase, otherwise to its own branch.  A run that restarts from a lower step starts a branch, and
HEAD follows it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptvcs.checkpoint.grouping import family
from ckptvcs.ops.commit import CommitResult
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId

_NEAR_TIP = 100  # newest commits of a branch that are searched for a name of the folder


class Lines:
    """The branches of one folder in one repository."""

    def __init__(self, repo: Repository, branch: str | None) -> None:
        """Commit to `branch`; None commits to the branch of HEAD."""
        self._repo, self._requested = repo, branch
        self._main: str | None = None  # the series on `branch` or on the branch of HEAD
        self._others: dict[str, str] = {}  # the branches of other series
        self._branch: str | None = None  # the branch of the last commit of the main series

    def learn(self, names: Iterable[str]) -> None:
        """Find the branches to which checkpoints with these names were committed before."""
        present = {family(name) for name in names}
        branches: dict[str, str] = {}
        ranks = self._ranks()
        for branch in sorted(self._repo.refs.names("heads"), key=lambda b: self._rank(b, ranks)):
            series = self._series(branch, present)
            if series is not None:
                branches[series] = branch  # the newest branch of a series wins
        main = self._branch = self._main_branch(branches, ranks)
        self._main = self._series(main, present) if main else None
        self._others = {s: branch for s, branch in branches.items() if s != self._main}

    def _main_branch(self, branches: dict[str, str], ranks: dict[ObjectId, int]) -> str | None:
        """Return the requested branch or that of HEAD.

        If a checkout has moved HEAD, return the branch with the newest commit of any series.
        """
        head = self._repo.head()
        default = self._requested or (head.branch if head else None)
        if self._requested or head is None or head.action != "checkout" or not branches:
            return default
        return max(branches.values(), key=lambda branch: self._rank(branch, ranks))

    def _rank(self, branch: str, ranks: dict[ObjectId, int]) -> int:
        tip = self._repo.revisions.branch(branch)
        return -1 if tip is None else ranks.get(tip, -1)

    def _ranks(self) -> dict[ObjectId, int]:
        """Number all commits in the order of the history, oldest first; clocks do not matter."""
        return {name: at for at, name in enumerate(reversed(self._repo.history.newest_first()))}

    def _series(self, branch: str, present: set[str]) -> str | None:
        """Return the series of the newest commit of a branch that belongs to one in `present`."""
        line = self._repo.catalog.line(self._repo.revisions.branch(branch))
        for _, (_, commit) in zip(range(_NEAR_TIP), line, strict=False):
            if family(commit.message) in present:
                return family(commit.message)
        return None

    def branch_for(self, name: str) -> tuple[str | None, bool]:
        """Return the branch for a checkpoint (None: that of HEAD), and the value of `head_stays`.

        `head_stays` is passed to `commit_path`, for the case that the step does not fit there.
        """
        series = family(name)
        if series in self._others:
            return self._others[series], True
        return self._requested, self._main not in (None, series)

    def add(self, name: str, result: CommitResult) -> None:
        """Record the branch of a committed checkpoint."""
        series = family(name)
        if self._main is None:
            self._main = series
        if series == self._main:
            self._branch = result.branch
        elif series in self._others or result.branch != self._branch:  # the step did not fit
            self._others[series] = result.branch

    def by_age(self, names: Iterable[ObjectId]) -> list[ObjectId]:
        """Sort commits by their order in the history, oldest first.

        Commits of the current branches come last.  Steps and clocks do not matter, since a run may
        restart.
        """
        head = self._repo.head()
        main = self._branch or self._requested or (head.branch if head else None)
        current = {
            name
            for branch in {main, *self._others.values()}
            if branch
            for name in self._repo.catalog.ids_below(self._repo.revisions.branch(branch))
        }
        ranks = self._ranks()
        return sorted(set(names), key=lambda name: (name in current, ranks.get(name, -1)))
