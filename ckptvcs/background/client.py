"""commit_async, as the training process sees it: copy, hand over, hear what became of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ckptvcs.background.process import Done, NoWorkerError, Worker
from ckptvcs.background.queue import Background
from ckptvcs.background.shared_state import pack, unpack
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.state import Copies
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.repository import Repository

_log = logging.getLogger("ckptvcs")


class Client:
    """Commits the states of one process in the background, in the order of the calls."""

    def __init__(self, repository: Repository) -> None:
        self._repository, self._process = repository, os.getpid()
        self.queue: Background[LogEntry] = Background()
        self.worker = Worker(repository.folder, repository.refs.completes)

    @property
    def is_ours(self) -> bool:
        """Whether this process has its threads: a forked child has none."""
        return self._process == os.getpid()

    def commit(
        self,
        take: Callable[[Copies], Checkpoint],
        said: Mapping[str, Any],
        branch: Callable[[], str | None],
        follow: Callable[[Done], LogEntry],
        at_once: Callable[[], LogEntry],
    ) -> Future[LogEntry]:
        """Commit what `take` makes with copies of its bytes; `at_once` does so without a copy, if
        there is no room for one.  `said` and `branch` (asked when the commit begins) are what
        `commit_checkpoint` takes; `follow` is told of the commit, and gives its entry.
        """
        staging = self.queue.stage()
        try:
            packed = pack(take(staging.copies), staging)
        except (MemoryError, OSError) as error:
            self.queue.release(staging)
            _log.warning("not enough memory for a copy (%s): training waits for this commit", error)
            return self.queue.done(at_once())
        except BaseException:
            self.queue.release(staging)
            raise

        def commit() -> LogEntry:
            request: dict[str, Any] = {**said, "branch": branch()}
            try:
                made = self.worker.commit(staging, packed, request)
            except NoWorkerError as error:
                _log.warning("%s: this process commits, beside the training", error)
                own = Repository(self._repository.folder)
                result = commit_checkpoint(own, unpack(packed, staging.memory), **request)
                made = Done(result.id, result.branch)
            return follow(made)

        step = said["step"]
        return self.queue.submit(
            staging, commit, "without a step" if step is None else f"step {step}"
        )

    def raise_failed(self) -> None:
        """Raise what an earlier commit failed with, once."""
        self.queue.raise_failed()

    def wait(self) -> None:
        """Wait for all commits.  Raises what one of them failed with."""
        self.queue.wait()

    def close(self) -> None:
        """The same, at the end; the process that commits ends, too."""
        try:
            self.queue.close()
        finally:
            self.worker.close()
