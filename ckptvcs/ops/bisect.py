"""Bisect: a line of commits, of which the first are good and the last are bad -> the first bad one.

    good  good  good  ?  ?  ?  bad          each test halves what is unknown

A commit that cannot be judged is skipped; where only such are left between the last good one and
the first bad one, the first bad commit is one of several.

A judge says what a commit is: a command of the user, a metric, or whether its weights are finite.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import InvalidInputError
from ckptvcs.files.names import safe_path
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.checkout import checkout_files
from ckptvcs.ops.diff import all_finite
from ckptvcs.ops.repository import Repository
from ckptvcs.store.disk import scratch_folder
from ckptvcs.store.ids import ObjectId

_SKIP, _HIGHEST = 125, 127  # exit codes of a command, as `git bisect run` has them
_STDERR = 2


class Verdict(StrEnum):
    """The result of a bisect test for one commit."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


Judge = Callable[[LogEntry], Verdict]
Watch = Callable[[LogEntry, Verdict, int], None]
"""Told of each verdict, and how many commits may be the first bad one after it."""


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
    """Of 0 ... `count` - 1, where 0 is good and the last is bad: the last that was found good and
    the first that was found bad.  All between them were skipped.

    `judge` is asked once at most for each, about log2(`count`) times where none is skipped.
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
    """The commits from `good` to `bad`, along first parents.

    Raises:
        InvalidInputError: `good` is not an ancestor of `bad`.
    """
    if good == bad:
        raise InvalidInputError(f"commit {good[:8]} cannot be both good and bad")
    found = []
    for name, _ in catalog.ancestors(bad):
        found.append(name)
        if name == good:
            return found[::-1]
    turned = any(name == bad for name, _ in catalog.ancestors(good))
    raise InvalidInputError(
        f"good commit {good[:8]} is not an ancestor of bad commit {bad[:8]}",
        hint="the good one is named first" if turned else "see 'ckpt log --graph'",
    )


def bisect(
    names: Sequence[ObjectId], entry: Callable[[ObjectId], LogEntry], judge: Judge, watch: Watch
) -> Bisection:
    """Find the first bad commit of a line, oldest first.

    Raises:
        InvalidInputError: the first is not good, or the last is not bad.
    """
    tested: list[tuple[LogEntry, Verdict]] = []
    good, bad = 0, len(names) - 1

    def test(number: int) -> Verdict:
        nonlocal good, bad
        found = entry(names[number])
        verdict = judge(found)
        tested.append((found, verdict))
        if verdict == Verdict.GOOD:
            good = max(good, number)
        elif verdict == Verdict.BAD:
            bad = min(bad, number)
        watch(found, verdict, bad - good)
        return verdict

    for number, wanted in ((0, Verdict.GOOD), (bad, Verdict.BAD)):
        verdict = test(number)
        if verdict != wanted:
            what = "could not be judged" if verdict == Verdict.SKIP else f"is {verdict}"
            raise InvalidInputError(
                f"commit {names[number][:8]} was given as {wanted}, but {what}",
                hint="the first commit must be good and the second bad, as the test sees it",
            )
    good, bad = narrow(len(names), test)
    candidates = tuple(entry(name) for name in names[good + 1 : bad + 1])
    return Bisection(entry(names[good]), candidates, tuple(tested))


def search(
    repository: Repository, good: str | int, bad: str | int, judge: Judge, watch: Watch
) -> Bisection:
    """Find the first bad commit between two; see `Repo.bisect`."""
    names = line(repository.catalog, repository.resolve(good), repository.resolve(bad))
    return bisect(names, repository.entry, judge, watch)


def choose_judge(
    repository: Repository,
    command: Sequence[str] | None,
    metric: str | None,
    above: float | None,
    below: float | None,
    *,
    nan: bool,
) -> Judge:
    """Return the one judge that is asked for.

    Raises:
        InvalidInputError: none is, or several are; or a bound without a metric.
    """
    if sum((bool(command), nan, metric is not None)) != 1:
        raise InvalidInputError(
            "one test is needed",
            hint="'-- COMMAND', --nan, or --metric NAME with --above or --below",
        )
    if (metric is not None) != (above is not None or below is not None):
        raise InvalidInputError("--metric requires --above or --below, and these require --metric")
    if metric is not None:
        return metric_judge(metric, above=above, below=below)
    if command:
        # The place is new, and nobody's working directory.
        return command_judge(command, partial(checkout_files, repository, force=True))
    return finite_judge(repository.catalog, repository.restorer)


def metric_judge(name: str, *, above: float | None, below: float | None) -> Judge:
    """Bad is a metric above or below a bound, or NaN; a commit without the metric is skipped."""

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
    """Bad are weights that are not finite."""
    known: set[bytes] = set()

    def judge(entry: LogEntry) -> Verdict:
        finite = all_finite(catalog, restorer(entry.id), known)
        return Verdict.GOOD if finite else Verdict.BAD

    return judge


def command_judge(command: Sequence[str], write: Callable[[ObjectId, Path], object]) -> Judge:
    """A command says by its exit code: 0 good, 125 skip, any other up to 127 bad.

    `write` checks a commit out to a path, which takes the place of `{}` in the arguments, or comes
    after them; it is gone when the command has ended.  What the command prints goes to stderr.
    The judge raises InvalidInputError where the command cannot be run, is ended by a signal, or
    ends with a code above 127.
    """

    def judge(entry: LogEntry) -> Verdict:
        with scratch_folder("ckpt-bisect-") as at:
            path = entry.commit.path
            target = at / ("checkpoint" if path == "." else safe_path(path).name)
            write(entry.id, target)
            return _verdict(_run(command, entry, target), entry)

    return judge


def _run(command: Sequence[str], entry: LogEntry, target: Path) -> int:
    arguments = [part.replace("{}", str(target)) for part in command]
    if arguments == list(command):
        arguments.append(str(target))
    step = "" if entry.step is None else str(entry.step)
    told = {"CKPT_STEP": step, "CKPT_COMMIT": entry.id, "CKPT_PATH": str(target)}
    try:
        # stdout is for what was found.
        return subprocess.run(
            arguments, stdout=_STDERR, env=os.environ | told, check=False
        ).returncode
    except OSError as error:
        raise InvalidInputError(f"cannot run '{command[0]}': {error.strerror or error}") from error


def _verdict(code: int, entry: LogEntry) -> Verdict:
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if not 0 <= code <= _HIGHEST:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise InvalidInputError(
            f"the command {how} at commit {entry.id[:8]}: the search was stopped",
            hint="0 is good, 125 skips, any other code up to 127 is bad",
        )
    return Verdict.GOOD if code == 0 else Verdict.SKIP if code == _SKIP else Verdict.BAD
