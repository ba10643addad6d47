"""Lines: the branches that the checkpoints of a folder are committed to, and which of them are new.

A folder may hold several series of names (`step-100.pt`, `step-100-ema.pt`, `best.pt`).  The first
one goes to the branch of HEAD; another one goes there as long as its steps fit, and else to a
branch of its own.  A run that begins again from a lower step starts a branch, and HEAD follows it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptvcs.checkpoint.grouping import family
from ckptvcs.ops.commit import CommitResult
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId

_NEAR_TIP = 100  # commits of a line that are looked at for a name of the folder


class Lines:
    """The lines of one folder in one repository."""

    def __init__(self, repo: Repository, branch: str | None) -> None:
        """Commits go to `branch`, or else to HEAD's."""
        self._repo, self._wanted = repo, branch
        self._main: str | None = None  # the series of HEAD's line, or of `branch`
        self._others: dict[str, str] = {}  # the branches of other series
        self._branch: str | None = None  # the one that the main series went to last

    def learn(self, names: Iterable[str]) -> None:
        """Find out from the history which branches checkpoints with these names went to before."""
        present = {family(name) for name in names}
        lines: dict[str, str] = {}
        places = self._places()
        for branch in sorted(self._repo.refs.names("heads"), key=lambda b: self._age(b, places)):
            series = self._series(branch, present)
            if series is not None:
                lines[series] = branch  # the newest line of a series counts
        main = self._branch = self._main_branch(lines, places)
        self._main = self._series(main, present) if main else None
        self._others = {s: branch for s, branch in lines.items() if s != self._main}

    def _main_branch(self, lines: dict[str, str], places: dict[ObjectId, int]) -> str | None:
        """The branch that commits go to without more being said, or that which the newest one of
        its series is on, where a checkout has moved HEAD.
        """
        head = self._repo.head()
        here = self._wanted or (head.branch if head else None)
        if self._wanted or head is None or head.action != "checkout" or not lines:
            return here
        return max(lines.values(), key=lambda branch: self._age(branch, places))

    def _age(self, branch: str, places: dict[ObjectId, int]) -> int:
        tip = self._repo.revisions.branch(branch)
        return -1 if tip is None else places.get(tip, -1)

    def _places(self) -> dict[ObjectId, int]:
        """All commits, the older one with the lower number, whatever clocks said."""
        return {name: at for at, name in enumerate(reversed(self._repo.history.newest_first()))}

    def _series(self, branch: str, present: set[str]) -> str | None:
        """The series of the newest commit of a line whose name is like one of the folder's."""
        line = self._repo.catalog.line(self._repo.revisions.branch(branch))
        for _, (_, commit) in zip(range(_NEAR_TIP), line, strict=False):
            if family(commit.message) in present:
                return family(commit.message)
        return None

    # -- commits -----------------------------------------------------------------------------------

    def branch_for(self, name: str) -> tuple[str | None, bool]:
        """The branch that a checkpoint goes to (None: HEAD's), and whether HEAD stays where it does
        not fit there.
        """
        series = family(name)
        if series in self._others:
            return self._others[series], True
        return self._wanted, self._main not in (None, series)

    def add(self, name: str, made: CommitResult) -> None:
        """A checkpoint was committed."""
        series = family(name)
        if self._main is None:
            self._main = series
        if series == self._main:
            self._branch = made.branch
        elif series in self._others or made.branch != self._branch:  # it did not fit
            self._others[series] = made.branch

    # -- age ---------------------------------------------------------------------------------------

    def by_age(self, names: Iterable[ObjectId]) -> list[ObjectId]:
        """Some commits, the oldest one first: by their order in the history, what is on the lines
        of now behind all else.  Steps and clocks do not count: a run may begin again.
        """
        head = self._repo.head()
        main = self._branch or self._wanted or (head.branch if head else None)
        now = {
            name
            for branch in {main, *self._others.values()}
            if branch
            for name in self._repo.catalog.ids_below(self._repo.revisions.branch(branch))
        }
        places = self._places()
        return sorted(set(names), key=lambda name: (name in now, places.get(name, -1)))
