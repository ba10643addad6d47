"""The branches that an import commits to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
