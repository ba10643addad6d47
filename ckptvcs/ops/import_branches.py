"""The branches that an import commits to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from ckptvcs.checkpoint.survey import Found
from ckptvcs.ops.placement import free_name, stem
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId

AFTER_ALL = 1 << 62
"""A number above every step."""


@dataclass
class Branch:
    """A branch to commit to; `step` is the step of its `tip`, `loose` accepts items without one."""

    name: str | None
    tip: ObjectId | None
    step: int
    loose: bool

    def takes(self, step: int | None) -> bool:
        """Return whether a checkpoint of this step goes on top."""
        return self.loose if step is None else step > self.step

    def advance(self, step: int | None) -> None:
        """Put a checkpoint of this step on top."""
        self.step = self.step if step is None else step


def new_branch(name: str, step: int | None) -> Branch:
    """Return a branch that begins with a checkpoint of this step, which is not on it yet."""
    return Branch(name, None, AFTER_ALL if step is None else -1, step is None)


def placed(steps: Iterable[int | None], branches: list[Branch]) -> Iterator[Branch]:
    """Yield the branch of each checkpoint; new branches are added to `branches`."""
    for step in steps:
        branch = next((one for one in branches if one.takes(step)), None)
        if branch is None:
            branch = new_branch("", step)
            branches.append(branch)
        branch.advance(step)
        yield branch


class Item(Protocol):
    """A checkpoint of the folder, the action of the import on it, and its commit."""

    found: Found
    action: str
    id: ObjectId | None


class Branching:
    """Chooses the branch of each checkpoint of one folder."""

    def __init__(self, repo: Repository, items: Sequence[Item], wanted: str | None) -> None:
        """`wanted` is the branch that the user named."""
        self._repo, self._items, self._wanted = repo, items, wanted

    def will_fade(self, item: Item, branch: Branch, branches: list[Branch]) -> bool:
        """Return whether later checkpoints make the exact patch of an item on `branch` expire."""
        at = next(at for at, one in enumerate(branches) if one is branch)
        ends = [replace(one) for one in branches]
        ends[at].advance(item.found.step)
        later = islice(
            self._items, next(i for i, o in enumerate(self._items) if o is item) + 1, None
        )
        newest = self._repo.commit_config().exact_rule.newest
        on_branch = (
            end
            for end in placed((one.found.step for one in later if one.action == "commit"), ends)
            if end is ends[at]
        )
        return len(list(islice(on_branch, newest))) == newest

    def branch_for(self, step: int | None, branches: list[Branch]) -> Branch:
        """Return the branch for a checkpoint; add a new one to `branches` if none takes it."""
        for branch in branches:
            if branch.takes(step):
                return branch
        if not self._imported(branches[0].tip):
            branches.clear()  # the branch holds another run than the folder
        name = free_name(self._base, self._repo.refs.names("heads"))
        branches.append(new_branch(name, step))
        return branches[-1]

    def present(self) -> list[Branch]:
        """Return the branches that end with a checkpoint of this folder, otherwise the main one."""
        steps = {item.id: item.found.step for item in self._items if item.id is not None}
        main = self._main()
        branches = [main] if self._imported(main.tip) else []
        for name in self._repo.refs.names("heads"):
            tip = self._repo.revisions.branch(name)
            side = name not in (main.name, stem(name)) and stem(name) == stem(self._base)
            if side and tip in steps:
                step = steps[tip]
                branches.append(
                    Branch(name, tip, AFTER_ALL if step is None else step, step is None)
                )
        return branches or [main]

    def _main(self) -> Branch:
        """Return the branch that the user named, otherwise HEAD's (without a name if detached)."""
        head = self._repo.head()
        name = self._wanted or (head.branch if head else "main")
        tip = self._repo.revisions.branch(name) if name else None
        start = tip
        if tip is None and self._wanted:  # a new branch begins at HEAD
            start = self._repo.revisions.head()
        commits = self._repo.catalog.line(start) if name else iter(())
        step = next((commit.step for _, commit in commits if commit.step is not None), -1)
        return Branch(name, tip, step, all(item.found.step is None for item in self._items))

    def _imported(self, commit: ObjectId | None) -> bool:
        """Return whether a commit holds a checkpoint of this folder."""
        return commit is not None and any(item.id == commit for item in self._items)

    @property
    def _base(self) -> str:
        """The branch whose name the side branches extend."""
        head = self._repo.head()
        return self._wanted or (head.branch if head else None) or "main"
