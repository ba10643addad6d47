"""The commits that a log lists."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.log import Bound, LogEntry, step_of
from ckptvcs.history.selection import MetricTest, Selection, Time, parse_time
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId

Steps = tuple[int | None, int | None]
"""The first and the last step, both included; None for no bound."""


def log(
    repository: Repository,
    limit: int | None,
    only: Selection,
    *,
    revision: str | int | None,
    branch: str | None,
    all_branches: bool,
    start: Bound,
    stop: Bound,
) -> list[LogEntry]:
    """Return commits; see `Repo.log`."""
    if limit is not None and not isinstance(limit, int):
        raise InvalidInputError(
            f"the limit must be a whole number, got {limit!r}",
            hint="choose a range by start= and stop=",
        )
    limit = None if limit is None else min(limit, sys.maxsize)
    ranged = start is not None or stop is not None
    if branch is not None and (revision is not None or all_branches):
        raise InvalidInputError(
            f"branch '{branch}' cannot be combined with a revision or with all branches",
            hint="leave one of them out",
        )
    if ranged and all_branches:
        raise InvalidInputError(
            "a range lists one branch, not all", hint="choose steps of all branches: --steps A..B"
        )
    tip = _tip(repository, revision, branch, stop)
    if ranged:
        line = repository.history.line(start, stop, revision=None if tip is None else f"id:{tip}")
        only = replace(only, names=frozenset(line))
    return repository.history.entries(limit, start=tip, all_branches=all_branches, only=only)


def select(
    steps: Steps | None,
    since: Time | None,
    until: Time | None,
    metrics: Sequence[str],
    sort: str | None,
    *,
    reverse: bool,
) -> Selection:
    """Return the selection that the arguments of `Repo.log` describe.  Raises InvalidInputError."""
    try:
        low, high = steps or (None, None)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"steps must be a pair, got {steps!r}", hint="write steps=(600, 800)"
        ) from error
    if isinstance(metrics, str):
        metrics = [metrics]
    return Selection(
        None,
        None if since is None else parse_time(since),
        None if until is None else parse_time(until, end=True),
        low,
        high,
        tuple(map(MetricTest.parse, metrics)),
        sort,
        reverse,
    )


def _tip(
    repository: Repository, revision: str | int | None, branch: str | None, stop: Bound
) -> ObjectId | None:
    """Return the newest commit to list; None for HEAD."""
    if branch is not None:
        tip = repository.revisions.branch(branch)
        if tip is None:
            raise NotFoundError(f"no branch is named '{branch}'", hint="list them: 'ckpt branch'")
        return tip
    if revision is None and step_of(stop) is None:
        revision = stop
    return None if revision is None else repository.resolve(revision)
