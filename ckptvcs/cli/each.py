"""each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import Every, ExportFormat, JsonOption, Part, open_repo, split_range
from ckptvcs.errors import CkptError, after
from ckptvcs.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs import Visit

_VISIT = "entry.id entry.step state metrics error"
"""The attributes of a result that JSON shows."""


def each(
    context: Context,
    revisions: Annotated[
        str, Argument(metavar="REV..REV", help="first and last commit, both included")
    ],
    command: Annotated[
        list[str],
        Argument(
            metavar="-- COMMAND ...",
            help="command to run; {} becomes the path, {step} the step, {id} the id",
        ),
    ],
    metric: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="skip commits that have this metric; can be repeated"),
    ] = None,
    jobs: Annotated[
        int, Option("-j", "--jobs", metavar="N", min=1, help="commands at the same time")
    ] = 1,
    every: Every = None,
    only: Part = None,
    form: ExportFormat = None,
    fail_fast: Annotated[bool, Option("--fail-fast", help="stop after the first failure")] = False,
    json: JsonOption = False,
) -> None:
    """Run a command on every commit, and store the metrics that it prints."""
    start, stop = split_range(revisions)
    repo = open_repo(context)
    seen: list[Visit] = []

    def watch(visit: Visit, left: int) -> None:
        seen.append(visit)
        if visit.state != "skipped":
            _tell(visit, left, json=json)

    with after(lambda: _progress(seen)):
        visits = repo.each(
            None,
            start,
            stop,
            command=command,
            metrics=metric or (),
            every=every,
            only=only,
            form=form,
            jobs=jobs,
            fail_fast=fail_fast,
            watch=watch,
        )
    if json:
        render.as_json([render.attributes(visit, _VISIT) for visit in visits])
    _end(visits, metric or ())


def _tell(visit: Visit, left: int, *, json: bool) -> None:
    """Print the result of one commit."""
    shown, rest = entries.commit_name(visit.entry), f" ({left} left)" if left else ""
    if visit.error is not None:
        render.complain(f"error: {shown}: {render.printable(str(visit.error))}{rest}")
    elif not json:
        render.data(f"{shown}: {entries.metrics(visit.metrics) or 'no metrics'}{rest}")


def _progress(seen: Sequence[Visit]) -> str:
    """Return what an interruption leaves, and how to continue."""
    done = [visit for visit in seen if visit.state == "done"]
    if not done:
        return ""
    options = _options(seen)
    known = f"; continue with {options}" if options else ""
    return f"{counted(len(done), 'commit')} done{known}"


def _options(visits: Sequence[Visit]) -> str:
    """Return the options that skip commits with the metrics that runs have printed."""
    names = dict.fromkeys(name for visit in visits for name in visit.metrics)
    return " ".join(f"--metric {render.printable(name)}" for name in names)


def _end(visits: Sequence[Visit], metrics: Sequence[str]) -> None:
    """Report the skipped commits.

    Raises:
        CkptError: A run failed.
    """
    skipped = sum(visit.state == "skipped" for visit in visits)
    if skipped:
        render.talk(
            f"skipped {skipped} of {counted(len(visits), 'commit')}: they have {', '.join(metrics)}"
        )
    failed = sum(visit.state == "failed" for visit in visits)
    if failed:
        options = "" if metrics else f" with {_options(visits) or '--metric NAME'}"
        raise CkptError(
            f"{failed} of {counted(len(visits), 'commit')} failed",
            hint=f"run the command again{options} to try only these",
        )
