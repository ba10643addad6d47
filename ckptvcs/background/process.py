"""Worker: a separate process that commits states while training continues.

A thread would compete with training for the interpreter lock.  A process only needs a core and
memory.  It is not a fork, reads the states in shared memory, and ends with the training process.

    Job, then a file descriptor    to the worker: the commit to make, and the memory with its state
    Move                           from the worker, before a branch moves: if the worker dies, the
                                   training process checks whether the branch moved
    Done or CkptError              from the worker: the result

The copy of a state is kept until the result arrives.  If the worker dies, or fails for a reason
outside the state, a new process tries the commit again, a limited number of times.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptvcs.errors import (
    BusyError,
    CkptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    UnsupportedVersionError,
)
from ckptvcs.history.refs import Move
from ckptvcs.store.disk import real_path

if TYPE_CHECKING:
    from ckptvcs.background.shared_state import Staging, StateMessage
    from ckptvcs.ops.request import Request

# A scheduler may send these to every process of a job.  The worker ends with the training process,
# which may still have states to commit.
_IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SERVER_CODE = (
    f"import signal as s; [s.signal(getattr(s, name), s.SIG_IGN) for name in {_IGNORED}]; "
    "from ckptvcs.background.server import serve; serve()"
)
_STOP_SECONDS = 10.0  # time for an idle worker to end before it is killed
_POLL_SECONDS = 1.0  # time between checks whether the worker is alive
MAX_PROCESSES = 3  # workers that may die during one commit
MAX_ATTEMPTS = 2  # errors that one commit may return
# A state that kills a worker by one of these could also kill the training process.
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
# A second attempt would fail in the same way, or the commit has retried already.
_FINAL = (BusyError, InvalidInputError, NotFoundError, StorageError, UnsupportedVersionError)
_names = {number.value: number.name for number in signal.Signals}
_log = logging.getLogger("ckptvcs")


@dataclass(frozen=True)
class Job:
    """A commit to make; the descriptor of its `size` bytes of shared memory follows."""

    size: int
    state: StateMessage
    request: Request


@dataclass(frozen=True)
class Done:
    """The id and the branch of a new commit."""

    name: str
    branch: str


class NoWorkerError(CkptError):
    """No worker process can be started, or none lives long enough to commit."""


class _DiedError(Exception):
    """The worker ended without a result; `by_fault` says that a signal in `_FAULTS` ended it."""

    def __init__(self, how: str, *, by_fault: bool = False) -> None:
        super().__init__(how)
        self.by_fault = by_fault


class Worker:
    """The worker process; it starts on the first commit, and restarts if it died."""

    def __init__(self, folder: Path, was_made: Callable[[Move], bool]) -> None:
        """`was_made` returns whether the branch has made a move that a dead worker announced."""
        self._folder, self._was_made = folder, was_made
        self._end: weakref.finalize[Any, Any] | None = None
        self._move: Move | None = None  # the move that the worker announced last

    def _start(self) -> None:
        self.pipe, far = Pipe()
        with far:
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
            arguments = [str(far.fileno()), str(os.getpid()), str(real_path(self._folder))]
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVER_CODE, *arguments],
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
                process_group=0,
            )
        self._end = weakref.finalize(self, _stop, self.pipe, self.process, os.getpid())

    def commit(self, staging: Staging, state: StateMessage, request: Request) -> Done:
        """Commit a state whose tensors are in the memory of `staging`.

        Raises:
            NoWorkerError: No worker can commit; the training process may try.
            CkptError: The error of the commit in the worker.
        """
        died = failed = 0
        while True:
            problem: Exception
            try:
                return self._attempt(staging, state, request)
            except _DiedError as error:
                died, problem = died + 1, error
            except CkptError as error:
                failed, problem = failed + 1, error
            if self._move is not None and self._was_made(self._move):
                return Done(self._move.commit, self._move.branch)
            if isinstance(problem, _FINAL) or failed == MAX_ATTEMPTS:
                raise problem
            if died == MAX_PROCESSES:
                how = f"background commit failed: every worker process ended early ({problem})"
                by_fault = isinstance(problem, _DiedError) and problem.by_fault
                raise CkptError(how) if by_fault else NoWorkerError(how)
            _log.warning("background commit failed, trying again: %s", problem)
            self.close()

    def _attempt(self, staging: Staging, state: StateMessage, request: Request) -> Done:
        """Send one job, and return the result of the worker; note the move that it announces."""
        self._move = None
        try:
            if self._end is not None and self._end.alive and self.process.poll() is not None:
                self.close()  # the worker died while it was idle
            if self._end is None or not self._end.alive:
                self._start()
        except OSError as error:
            raise _DiedError(f"cannot start the worker: {error}") from error
        try:
            handle, size = staging.handle()
        except OSError as error:
            raise NoWorkerError(f"cannot share memory with the worker: {error}") from error
        try:
            self.pipe.send(Job(size, state, request))
            send_handle(self.pipe, handle, self.process.pid)
            while isinstance(answer := self._answer(), Move):
                self._move = answer
            if isinstance(answer, CkptError):
                raise answer
            return answer
        except (EOFError, OSError) as error:
            self.close()
            code = self.process.returncode
            by_fault = -code in _FAULTS
            raise _DiedError(_names.get(-code, f"exit {code}"), by_fault=by_fault) from error

    def _answer(self) -> Move | Done | CkptError:
        # If the worker dies, the pipe may stay open: a forked child may hold its other end.
        while not self.pipe.poll(_POLL_SECONDS):
            if self.process.poll() is not None and not self.pipe.poll():
                raise EOFError
        answer: Move | Done | CkptError = self.pipe.recv()
        return answer

    def close(self) -> None:
        """Stop the worker process."""
        if self._end is not None:
            self._end()


def _stop(pipe: Connection, process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a forked child must not stop the worker
        pipe.close()
        return
    with contextlib.suppress(OSError):
        pipe.send(None)  # closing is not enough: forked children may hold this end open
    pipe.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
