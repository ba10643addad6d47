"""each: run a function or a command once on every commit, and store the metrics that it returns.

The commits are decoded one from the other, oldest first.  Each is written to a temporary folder,
which is deleted when its run ends.  The metrics of a run are stored in a note at once, so that an
interruption loses only the runs that have not ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ckptvcs.decode.part_reader import PartReader
from ckptvcs.decode.trajectory import written
from ckptvcs.errors import (
    CkptError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from ckptvcs.history.log import LogEntry
from ckptvcs.ops import note
from ckptvcs.ops.arguments import plain_metrics
from ckptvcs.ops.command import file_name
from ckptvcs.ops.export import check_form, check_part
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Pool, quiet
from ckptvcs.store.disk import is_full, scratch_folder
from ckptvcs.store.ids import ObjectId

Function = Callable[[LogEntry, Path], Mapping[str, float] | None]

_NO_ROOM = "free space in the temporary directory, or choose one with TMPDIR"
_OF_ONE = (CorruptionError, NotFoundError, InvalidInputError)
"""The errors of one commit; all others end the whole call."""


@dataclass(frozen=True)
class Visit:
    """The result of `Repo.each` for one commit.

    Attributes:
        entry: The commit, as it was before the run.
        state: `done`, `failed`, or `skipped` because the commit had the metrics.
        metrics: The metrics that the run returned and that were stored.
        error: The reason of the failure.
    """

    entry: LogEntry
    state: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: Exception | None = None


Watch = Callable[[Visit, int], None]
"""Called with each result and the number of commits that are left."""


def each(
    repository: Repository,
    function: Function,
    names: Sequence[ObjectId],
    metrics: Sequence[str],
    only: str | None,
    form: str | None,
    jobs: int,
    fail_fast: bool,
    watch: Watch | None,
) -> list[Visit]:
    """Call a function once on every commit of `names`; see `Repo.each`."""
    check_form(form)
    check_part(only)
    if jobs < 1:
        raise InvalidInputError(f"invalid number of jobs {jobs}: it must be at least 1")
    if not names:
        raise NotFoundError("no commits in this range", hint="run 'ckpt log' to list them")
    run = _Run(repository, function, metrics, only, form, jobs, fail_fast=fail_fast, watch=watch)
    return run.over([repository.entry(name) for name in names])


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Create a temporary folder, and delete it at the end.  Raises StorageError."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder("ckpt-each-"))
        except OSError as error:
            message = f"cannot create a temporary directory: {error.strerror or error}"
            raise StorageError(message, hint=_NO_ROOM) from error
        yield folder


@dataclass(frozen=True)
class _Job:
    """A commit that was written to a path in a temporary folder, which `folder` deletes."""

    entry: LogEntry
    path: Path
    folder: ExitStack

    def run(self, function: Function) -> Mapping[str, float]:
        with self.folder:
            return function(self.entry, self.path) or {}


class _Run:
    """One call of `each`."""

    def __init__(
        self,
        repository: Repository,
        function: Function,
        metrics: Sequence[str],
        only: str | None,
        form: str | None,
        jobs: int,
        *,
        fail_fast: bool,
        watch: Watch | None,
    ) -> None:
        self._repository, self._function, self._metrics = repository, function, metrics
        self._only, self._form, self._jobs = only, form, jobs
        self._fail_fast, self._watch = fail_fast, watch
        self._pool = Pool(jobs) if jobs > 1 else None
        self._running: dict[Future[Mapping[str, float]], _Job] = {}
        self._visits: dict[ObjectId, Visit] = {}
        self._left = 0
        self._is_over = False

    def over(self, entries: Sequence[LogEntry]) -> list[Visit]:
        """Visit commits, and return the results in the same order."""
        self._left = len(entries)
        for entry in entries:
            if self._has_metrics(entry):
                self._note(Visit(entry, "skipped"))
        try:
            self._begin_all([entry for entry in entries if entry.id not in self._visits])
            while self._running:
                self._finish_some()
        except BaseException:
            self._interrupt()
            raise
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel=True)
        return [self._visits[entry.id] for entry in entries if entry.id in self._visits]

    def _begin_all(self, entries: Sequence[LogEntry]) -> None:
        for job in self._jobs_of(entries):
            if isinstance(job, Visit):
                self._note(job)
            else:
                self._begin(job)
            while len(self._running) == self._jobs:  # the next commit is decoded when it can run
                self._finish_some()
            if self._is_over:
                return

    # -- files -----------------------------------------------------------------------------------

    def _jobs_of(self, entries: Sequence[LogEntry]) -> Iterator[_Job | Visit]:
        """Yield each commit as a job, or the visit of one that cannot be decoded.

        After a failure, the next commit is tried alone: the failure may be one of the commit after
        it, which the decoder looks at ahead.
        """
        catalog, by_name = self._repository.catalog, {entry.id: entry for entry in entries}
        names, alone = list(by_name), False
        self._reached = 0
        while self._reached < len(names):
            some = names[self._reached :][: 1 if alone else None]
            try:
                yield from written(
                    catalog, some, self._only, lambda name, reader: self._job(by_name[name], reader)
                )
                alone = False
            except _OF_ONE as error:
                catalog.store.refresh()
                catalog.forget()
                if alone:
                    yield Visit(by_name[names[self._reached]], "failed", error=error)
                    self._reached += 1
                alone = not alone

    def _job(self, entry: LogEntry, reader: PartReader) -> _Job | Visit:
        """Write the file of a commit."""
        self._reached += 1
        if self._has_metrics(self._repository.entry(entry.id)):  # another process has run it
            return Visit(entry, "skipped")
        with ExitStack() as stack:
            try:
                path = stack.enter_context(_scratch()) / self._file_name(entry)
                if self._only is None and self._form is None:
                    reader.restore(path)
                else:  # `force` is safe: the folder is new
                    reader.export(path, self._only, quiet, force=True)
            except _OF_ONE as error:
                return Visit(entry, "failed", error=error)
            except StorageError as error:
                error.hint = _NO_ROOM if is_full(error) else error.hint
                raise
            return _Job(entry, path, stack.pop_all())

    def _has_metrics(self, entry: LogEntry) -> bool:
        return bool(self._metrics) and entry.metrics.keys() >= set(self._metrics)

    def _file_name(self, entry: LogEntry) -> str:
        name = file_name(entry)
        if self._only is None and self._form is None:
            return name
        stem = name if entry.commit.source == "directory" else Path(name).stem
        part = f".{self._only}" if self._only else ""
        files = [file for file in entry.commit.files if file.skeleton is not None]
        safe = all(file.format == "safetensors" for file in files)
        return f"{stem}{part}.{self._form or ('safetensors' if safe else 'pt')}"

    # -- jobs ------------------------------------------------------------------------------------

    def _begin(self, job: _Job) -> None:
        if self._pool is not None:
            self._running[self._pool.start(partial(job.run, self._function))] = job
            return
        future = Future[Mapping[str, float]]()
        try:
            future.set_result(job.run(self._function))
        except Exception as error:
            future.set_exception(error)
        self._finish(future, job.entry)

    def _finish_some(self) -> None:
        """Wait until a job has ended."""
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in ended:
            self._finish(future, self._running.pop(future).entry)

    def _finish(self, future: Future[Mapping[str, float]], entry: LogEntry) -> None:
        """Store the metrics of a job that has ended."""
        error = future.exception()
        if error is None:
            self._note(self._stored(entry, future.result()))
        elif isinstance(error, Exception) and not isinstance(error, MemoryError):
            self._note(Visit(entry, "failed", error=error))
        else:
            raise error

    def _stored(self, entry: LogEntry, result: Mapping[str, float]) -> Visit:
        """Store metrics in a note, and return the visit.

        Raises:
            StorageError, BusyError: The note cannot be written.
        """
        try:
            numbers = plain_metrics(result)
            if numbers:
                note.write(self._repository, f"id:{entry.id}", metrics=numbers)
        except _OF_ONE as error:
            return Visit(entry, "failed", error=error)
        missing = [name for name in self._metrics if name not in numbers]
        if missing:
            problem = CkptError(f"the result has no number '{missing[0]}'")
            return Visit(entry, "failed", numbers, problem)
        return Visit(entry, "done", numbers)

    def _note(self, visit: Visit) -> None:
        self._visits[visit.entry.id] = visit
        self._left -= 1
        self._is_over = self._is_over or (self._fail_fast and visit.state == "failed")
        if self._watch is not None:
            self._watch(visit, self._left)

    def _interrupt(self) -> None:
        """End the running jobs; store the metrics of those that have ended well."""
        stop = getattr(self._function, "stop", None)
        if stop is not None:
            stop()
        if self._pool is not None:
            self._pool.shutdown(cancel=True)
        for future, job in self._running.items():
            job.folder.close()  # if the job was cancelled before it began
            if future.done() and not future.cancelled() and future.exception() is None:
                with contextlib.suppress(CkptError):
                    self._stored(job.entry, future.result())
