"""Client: the training process's side of `commit_async`.

stage           memory for a copy; there are two, so that one can wait while the other is encoded
submit          a thread that passes the copies to the worker in order
raise_failed    raises errors at the next call and at the end
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from ckptvcs.background.process import Done, NoWorkerError, Worker
from ckptvcs.background.shared_state import Staging, pack, unpack
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.state import Copies
from ckptvcs.errors import CkptError
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request
from ckptvcs.parallel import Pool

_COPIES = 2  # one that is being encoded and one that waits
_log = logging.getLogger("ckptvcs")


class Client:
    """Commits the states of one process in the background, in the order of the calls."""

    def __init__(self, repository: Repository) -> None:
        self._repository, self._process = repository, os.getpid()
        self.worker = Worker(repository.folder, repository.refs.completes)
        self._thread = Pool(1)
        self._free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        self._open: list[tuple[str, Future[LogEntry]]] = []
        self._lock = threading.Lock()
        self._blocked = 0  # calls that waited since the last call that found nothing to do
        for _ in range(_COPIES):
            self._free.put(Staging())
        # Thread pools refuse work before `atexit` functions run; this function runs before that.
        at_end = getattr(threading, "_register_atexit", None)
        if at_end is not None:
            at_end(partial(_finish, weakref.ref(self)))

    @property
    def is_ours(self) -> bool:
        """Whether this process created the client: a forked child has none of its threads."""
        return self._process == os.getpid()

    def commit(
        self,
        take: Callable[[Copies], Checkpoint],
        request: Request,
        branch: Callable[[], str | None],
        follow: Callable[[Done], LogEntry],
        commit_directly: Callable[[], LogEntry],
    ) -> Future[LogEntry]:
        """Copy a state, and return a future of its commit.

        Args:
            take: Builds the checkpoint from copies of its bytes.
            request: The commit, without its checkpoint.
            branch: Returns the branch; called when the commit begins.
            follow: Called with the new commit; returns its log entry.
            commit_directly: Called instead if memory for the copy is missing.
        """
        staging = self.stage()
        try:
            packed = pack(take(staging.copies), staging)
        except (MemoryError, OSError) as error:
            self.release(staging)
            _log.warning("not enough memory for a copy (%s): training waits for this commit", error)
            future: Future[LogEntry] = Future()
            future.set_result(commit_directly())
            return future
        except BaseException:
            self.release(staging)
            raise

        def commit() -> LogEntry:
            # The worker has another command line, other packages, and no runs of trackers.
            request.branch, request.origin = branch(), request.provenance()
            try:
                done = self.worker.commit(staging, packed, request)
            except NoWorkerError as error:
                _log.warning("%s: a thread of the training process commits instead", error)
                repository = Repository(self._repository.folder)
                state = unpack(packed, staging.memory)
                result = commit_checkpoint(repository, replace(request, checkpoint=state))
                done = Done(result.id, result.branch)
            return follow(done)

        name = "without a step" if request.step is None else f"step {request.step}"
        return self.submit(staging, commit, name)

    def stage(self) -> Staging:
        """Return memory for a copy; blocks until some is free.

        The first of several calls that block logs a warning; their number follows when all earlier
        work is done.  Pass the memory to `submit` or `release`.
        """
        if self._free.qsize() == _COPIES:
            self._count_blocked()
        try:
            return self._free.get_nowait()
        except queue.Empty:
            with self._lock:
                self._blocked += 1
                is_first = self._blocked == 1
            if is_first:
                _log.warning(
                    "commit_async blocked: the previous commit is still being compressed; "
                    "consider committing less often"
                )
            return self._free.get()

    def _count_blocked(self) -> None:
        """Log how many calls have blocked, if several have, and count from 0 again."""
        with self._lock:
            count, self._blocked = self._blocked, 0
        if count > 1:
            _log.warning("commit_async blocked %d times", count)

    def release(self, staging: Staging) -> None:
        """Make the memory of a copy available again."""
        self._free.put(staging)

    def submit(self, staging: Staging, work: Callable[[], LogEntry], name: str) -> Future[LogEntry]:
        """Run `work` after all earlier work, then release its copy; errors are logged by `name`."""
        future: Future[LogEntry] = Future()
        future.set_running_or_notify_cancel()  # a submitted commit cannot be cancelled

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                _log.error("background commit failed (%s): %s", name, error)
                self.release(staging)
                future.set_exception(error)
            else:
                self.release(staging)
                future.set_result(result)

        with self._lock:
            try:
                self._thread.start(run)
            except BaseException:  # the interpreter is shutting down
                self.release(staging)
                raise
            self._open.append((name, future))
        return future

    def raise_failed(self) -> None:
        """Raise the errors of earlier work, each once; several are joined to one error."""
        with self._lock:
            ended = [(name, future) for name, future in self._open if future.done()]
            self._open = [pair for pair in self._open if pair not in ended]
        failed = [
            (name, error) for name, future in ended if (error := future.exception()) is not None
        ]
        if len(failed) == 1:
            raise failed[0][1]
        if failed:
            raise _joined(failed)

    def wait(self) -> None:
        """Wait until all work is done; raises as `raise_failed`."""
        for _, future in [*self._open]:
            future.exception()
        self._count_blocked()
        self.raise_failed()

    def close(self) -> None:
        """Wait until all work is done and stop thread and worker; raises as `raise_failed`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self.worker.close()


def _joined(failed: list[tuple[str, BaseException]]) -> CkptError:
    """Return one error for several, of the type of the first one."""
    what = "; ".join(f"{name}: {error}" for name, error in failed)
    message, first = f"{len(failed)} background commits failed: {what}", failed[0][1]
    if isinstance(first, CkptError):
        return type(first)(message, hint=first.hint)
    return CkptError(message)


def _finish(reference: weakref.ref[Client]) -> None:
    client = reference()
    if client is not None and client.is_ours:
        with contextlib.suppress(BaseException):  # every error was logged
            client.wait()
