"""Bisect: find the first bad commit of a first-parent history by binary search.

    good  good  good  ?  ?  ?  bad          each test halves the number of unknown commits

A test is a command of the user, a bound on a metric, or a check for non-finite weights.  If a test
cannot decide about a commit, the commit is skipped.  If only skipped commits are left between the
last good and the first bad one, each of them may be the first bad commit.
"""

from __future__ import annotations

import math
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import InvalidInputError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.checkout import checkout_files
from ckptvcs.ops.command import file_name, fill
from ckptvcs.ops.finite import all_finite
from ckptvcs.ops.repository import Repository
from ckptvcs.store.disk import scratch_folder
from ckptvcs.store.ids import ObjectId

_SKIP, _HIGHEST = 125, 127  # exit codes as in `git bisect run`
_STDERR = 2


class Verdict(StrEnum):
    """The result of a bisect test for one commit."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


Judge = Callable[[LogEntry], Verdict]
Watch = Callable[[LogEntry, Verdict, int], None]
"""Called with each tested commit, its verdict, and the number of remaining candidates."""


@dataclass(frozen=True)
class Bisection:
    """The result of a bisect.

    Attributes:
        last_good: The newest commit that is known to be good.
        candidates: The commits that may be the first bad one, oldest first.  The last of them is
            bad; all others were skipped.
        tested: The tested commits with their verdicts, in the order of the tests.
    """

    last_good: LogEntry
    candidates: tuple[LogEntry, ...]
    tested: tuple[tuple[LogEntry, Verdict], ...]

    @property
    def first_bad(self) -> LogEntry | None:
        """The first bad commit; None if skipped commits leave several candidates."""
        return self.candidates[0] if len(self.candidates) == 1 else None


def narrow(count: int, judge: Callable[[int], Verdict]) -> tuple[int, int]:
    """Return the last good and the first bad number; all numbers between them were skipped.

    Of the numbers 0 ... `count` - 1, 0 is good and the last one is bad.  `judge` tests no number
    twice, and about log2(`count`) numbers if it skips none.
    """
    good, bad = 0, count - 1
    skipped: set[int] = set()
    while True:
        unknown = [number for number in range(good + 1, bad) if number not in skipped]
        if not unknown:
            return good, bad
        middle = unknown[len(unknown) // 2]
        verdict = judge(middle)
        if verdict == Verdict.GOOD:
            good = middle
        elif verdict == Verdict.BAD:
            bad = middle
        else:
            skipped.add(middle)


def line(catalog: Catalog, good: ObjectId, bad: ObjectId) -> list[ObjectId]:
    """Return the commits from `good` to `bad` along first parents.

    Raises:
        InvalidInputError: `good` is not an ancestor of `bad`.
    """
    if good == bad:
        raise InvalidInputError(f"commit {good[:8]} cannot be both good and bad")
    names = []
    for name, _ in catalog.ancestors(bad):
        names.append(name)
        if name == good:
            return names[::-1]
    swapped = any(name == bad for name, _ in catalog.ancestors(good))
    raise InvalidInputError(
        f"good commit {good[:8]} is not an ancestor of bad commit {bad[:8]}",
        hint="pass the good commit first" if swapped else "see 'ckpt log --graph'",
    )


def search(
    repository: Repository, first: ObjectId, last: ObjectId, judge: Judge, watch: Watch | None
) -> Bisection:
    """Find the first bad commit between a good one and a bad one; see `Repo.bisect`."""
    names, entry = line(repository.catalog, first, last), repository.entry
    tested: list[tuple[LogEntry, Verdict]] = []
    good, bad = 0, len(names) - 1

    def test(number: int) -> Verdict:
        nonlocal good, bad
        commit = entry(names[number])
        verdict = judge(commit)
        tested.append((commit, verdict))
        if verdict == Verdict.GOOD:
            good = max(good, number)
        elif verdict == Verdict.BAD:
            bad = min(bad, number)
        if watch is not None:
            watch(commit, verdict, bad - good)
        return verdict

    for number, expected in ((0, Verdict.GOOD), (bad, Verdict.BAD)):
        verdict = test(number)
        if verdict != expected:
            what = "was skipped" if verdict == Verdict.SKIP else f"is {verdict}"
            raise InvalidInputError(
                f"commit {names[number][:8]} was given as {expected}, but {what}",
                hint="pass a commit that passes the test, then one that fails it",
            )
    good, bad = narrow(len(names), test)
    candidates = tuple(entry(name) for name in names[good + 1 : bad + 1])
    return Bisection(entry(names[good]), candidates, tuple(tested))


def choose_judge(
    repository: Repository,
    command: Sequence[str] | None,
    metric: str | None,
    above: float | None,
    below: float | None,
    *,
    nan: bool,
) -> Judge:
    """Return the requested test."""
    if sum((bool(command), nan, metric is not None)) != 1:
        raise InvalidInputError(
            "bisect needs exactly one test",
            hint="pass '-- COMMAND', --nan, or --metric NAME with --above or --below",
        )
    if (metric is not None) != (above is not None or below is not None):
        raise InvalidInputError("--metric requires --above or --below, and these require --metric")
    if metric is not None:
        return metric_judge(metric, above=above, below=below)
    if command:
        # `force` is safe: the target is a new scratch folder.
        return command_judge(command, partial(checkout_files, repository, force=True))
    return finite_judge(repository.catalog, repository.restorer)


def metric_judge(name: str, *, above: float | None, below: float | None) -> Judge:
    """Return a test of a metric: bad if it is out of bounds or NaN, skip if it is missing."""

    def judge(entry: LogEntry) -> Verdict:
        value = entry.metrics.get(name)
        if value is None:
            return Verdict.SKIP
        bad = (
            math.isnan(value)
            or (above is not None and value > above)
            or (below is not None and value < below)
        )
        return Verdict.BAD if bad else Verdict.GOOD

    return judge


def finite_judge(catalog: Catalog, restorer: Callable[[ObjectId], Restorer]) -> Judge:
    """Return a test of the weights: bad if one of them is not finite."""
    known: set[bytes] = set()

    def judge(entry: LogEntry) -> Verdict:
        finite = all_finite(catalog, restorer(entry.id), known)
        return Verdict.GOOD if finite else Verdict.BAD

    return judge


def command_judge(command: Sequence[str], write: Callable[[ObjectId, Path], object]) -> Judge:
    """Return a test by the exit code of a command: 0 good, 125 skip, any other up to 127 bad.

    The test restores a commit with `write` to a temporary path, and fills the arguments with
    `ops.command.fill`.  The output of the command goes to stderr.  The test raises
    InvalidInputError if the command cannot be run, is ended by a signal, or exits with a code above
    127.
    """

    def judge(entry: LogEntry) -> Verdict:
        with scratch_folder("ckpt-bisect-") as at:
            target = at / file_name(entry)
            write(entry.id, target)
            return _verdict(_run(command, entry, target), entry)

    return judge


def _run(command: Sequence[str], entry: LogEntry, target: Path) -> int:
    arguments, variables = fill(command, entry, target)
    try:
        # Only the result of the bisect goes to stdout.
        return subprocess.run(arguments, stdout=_STDERR, env=variables, check=False).returncode
    except OSError as error:
        raise InvalidInputError(f"cannot run '{command[0]}': {error.strerror or error}") from error


def _verdict(code: int, entry: LogEntry) -> Verdict:
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if not 0 <= code <= _HIGHEST:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise InvalidInputError(
            f"bisect was stopped: the command {how} at commit {entry.id[:8]}",
            hint="exit with 0 for good, 125 to skip, any other code up to 127 for bad",
        )
    return Verdict.GOOD if code == 0 else Verdict.SKIP if code == _SKIP else Verdict.BAD
