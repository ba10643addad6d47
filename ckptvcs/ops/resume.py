"""resume: find the newest commit that proves itself, and say what a state lacks to continue a run.

A commit proves itself if all of its values are finite, none of its parts was dropped, and every
tensor decodes to its recorded hash.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ckptvcs.decode.part_reader import PartReader
from ckptvcs.errors import CorruptionError, NotFoundError
from ckptvcs.history.commit import Commit
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId
from ckptvcs.text import commit_name, nonfinite_values

T = TypeVar("T")
_log = logging.getLogger("ckptvcs")

_NEEDS = {
    "random state": re.compile(r"rng|random|generator"),
    "scheduler": re.compile(r"sched"),
    "data position": re.compile(r"loader|sampler|dataset|samples|batch|position|trainer_state"),
}
"""What a run needs to continue bit for bit, and the keys of a state that usually hold it."""

_OBJECTS = frozenset({"model", "optimizer"})


@dataclass(frozen=True)
class Unusable:
    """A commit that does not prove itself.

    Attributes:
        id: The id of the commit.
        step: The training step, if it is known.
        reason: Why it cannot be used.
    """

    id: ObjectId
    step: int | None
    reason: str


@dataclass(frozen=True)
class Resumed:
    """The state from which a run continues.

    Attributes:
        entry: The commit.
        state: The committed nested object with its tensors.
        skipped: The newer commits that do not prove themselves, newest first.
        lacks: What the state lacks to continue bit for bit, such as `random state`; only with
            `check`.
    """

    entry: LogEntry
    state: Any
    skipped: tuple[Unusable, ...]
    lacks: tuple[str, ...] = ()

    @property
    def id(self) -> ObjectId:
        """The id of the commit."""
        return self.entry.id

    @property
    def step(self) -> int | None:
        """The training step of the commit."""
        return self.entry.step

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the commit, with those of its notes."""
        return self.entry.metrics

    @property
    def extra(self) -> dict[str, Any]:
        """The entries of the state beside `model` and `optimizer`."""
        if not isinstance(self.state, Mapping):
            return {}
        return {key: value for key, value in self.state.items() if key not in _OBJECTS}


def resume(repository: Repository, into: Any, *, check: bool) -> Resumed | None:
    """Read the newest commit that proves itself; see `Repo.resume`."""
    if repository.revisions.head() is None:
        _require_no_commits(repository)
        return None

    def read(name: ObjectId) -> Any:
        return repository.read_again(lambda: PartReader(repository.restorer(name)).state())

    name, state, skipped = _first_good(repository, read)
    if into is not None:
        from ckptvcs.checkpoint.torch_objects import scatter  # noqa: PLC0415  needs torch

        scatter(state, into)
    entry = repository.entry(name)
    if not entry.exact:
        error = f"{entry.commit.error.weight_rel:.2g}"
        _log.warning("%s is near (%s): the run does not continue bit for bit", _call(entry), error)
    lacks = tuple(_lacks(entry.commit, state)) if check else ()
    if lacks:
        _log.warning("the state of %s lacks: %s", _call(entry), ", ".join(lacks))
    return Resumed(entry, state, skipped, lacks)


def newest_good(repository: Repository) -> ObjectId:
    """Return the newest commit of HEAD's line that proves itself; log why others are skipped.

    Raises:
        NotFoundError: There are no commits.
        CorruptionError: No commit proves itself.
    """

    def prove(name: ObjectId) -> None:
        restorer = repository.restorer(name)
        if "dropped" in restorer.fidelity.values():
            raise NotFoundError("a part of it was dropped")
        for file in restorer.commit.files:
            if file.skeleton is not None:
                restorer.digest(file)

    repository.resolve("HEAD")
    return _first_good(repository, lambda name: repository.read_again(lambda: prove(name)))[0]


def _first_good(
    repository: Repository, read: Callable[[ObjectId], T]
) -> tuple[ObjectId, T, tuple[Unusable, ...]]:
    """Return the first commit of HEAD's line that `read` accepts, its value, and the others."""
    skipped: list[Unusable] = []
    try:
        for name, commit in repository.catalog.line(repository.revisions.head()):
            try:
                _require_finite(commit)
                value = read(name)
                _require_patches(repository, name, commit)
                return name, value, tuple(skipped)
            except (CorruptionError, NotFoundError) as error:
                skipped.append(Unusable(name, commit.step, error.message))
                _log.warning("skipped %s: %s", _call(skipped[-1]), error.message)
    except CorruptionError as error:  # the commit object itself is lost
        _log.warning("older commits cannot be read: %s", error.message)
    count = len(skipped)
    raise CorruptionError(
        f"no commit can be resumed from: {count} were tried" + _newest_reason(skipped),
        hint="run 'ckpt verify', or check out a commit of another branch",
    )


def _require_finite(commit: Commit) -> None:
    if commit.nonfinite:
        raise CorruptionError(nonfinite_values(commit.nonfinite))


def _require_patches(repository: Repository, name: ObjectId, commit: Commit) -> None:
    if repository.catalog.lost_patches(name, commit):
        raise CorruptionError("its exact patch is missing")


def _newest_reason(skipped: list[Unusable]) -> str:
    return f"; {_call(skipped[0])}: {skipped[0].reason}" if skipped else ""


def _call(commit: Unusable | LogEntry) -> str:
    return commit_name(commit.step, commit.id)


def _require_no_commits(repository: Repository) -> None:
    """Raise NotFoundError if other branches have commits: starting at step 0 would be wrong."""
    tips = repository.revisions.tips()
    if tips:
        raise NotFoundError(
            "the current branch has no commits, but others have",
            hint=f"run 'ckpt checkout {min(tips).partition('/')[2]}'",
        )


def _lacks(commit: Commit, state: Any) -> Iterator[str]:
    """Yield what a state lacks to continue a run bit for bit, as its keys tell."""
    if "optimizer" not in commit.parts:
        yield "optimizer"
    keys = " ".join(_keys(state)).lower()
    for need, pattern in _NEEDS.items():
        if not pattern.search(keys):
            yield need


def _keys(state: Any, depth: int = 2) -> Iterator[str]:
    """Yield the keys of a nested state, without those of the model and the optimizer."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield str(key)
            if depth > 1 and key not in _OBJECTS:
                yield from _keys(value, depth - 1)
