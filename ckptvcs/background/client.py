"""Client: the training process's side of `commit_async`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from ckptvcs.background.process import Done, NoWorkerError, Worker
from ckptvcs.background.queue import Background
from ckptvcs.background.shared_state import pack, unpack
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.state import Copies
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request

_log = logging.getLogger("ckptvcs")


class Client:
    """Commits the states of one process in the background, in the order of the calls."""

    def __init__(self, repository: Repository) -> None:
        self._repository, self._process = repository, os.getpid()
        self.queue: Background[LogEntry] = Background()
        self.worker = Worker(repository.folder, repository.refs.completes)

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
        staging = self.queue.stage()
        try:
            packed = pack(take(staging.copies), staging)
        except (MemoryError, OSError) as error:
            self.queue.release(staging)
            _log.warning("not enough memory for a copy (%s): training waits for this commit", error)
            future: Future[LogEntry] = Future()
            future.set_result(commit_directly())
            return future
        except BaseException:
            self.queue.release(staging)
            raise

        def commit() -> LogEntry:
            request.branch = branch()
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
        return self.queue.submit(staging, commit, name)

    def raise_failed(self) -> None:
        """Raise the errors of earlier commits; each is raised once."""
        self.queue.raise_failed()

    def wait(self) -> None:
        """Wait for all commits; raises as `raise_failed`."""
        self.queue.wait()

    def close(self) -> None:
        """Wait for all commits and stop the worker process; raises as `raise_failed`."""
        try:
            self.queue.close()
        finally:
            self.worker.close()
