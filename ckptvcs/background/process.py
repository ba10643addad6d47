"""Worker: a process beside that commits what it is given, so that training is not held up.

Threads of one process take turns at the interpreter, some hundred times in a step of training; a
process of its own takes nothing but a core and memory.  It is started from nothing, reads states
where they were copied to, in shared memory, and ends with the process that it works for.

    Job, a file descriptor    what to commit, and the memory that holds it: each time anew
    Move                      before a branch moves: whoever outlives the process can look whether
                              it did
    Done or Failed            the answer

The copy of a state stays until its commit is answered for.  A process that dies, or an attempt that
fails for no reason of the state, is followed by a process started anew; a limited number of times.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
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

# Who stops a job may tell all of its processes; this one ends with the one that it works for, which
# may have something left to commit.
_NOT_HEARD = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SERVER_CODE = (
    f"import signal as s; [s.signal(getattr(s, name), s.SIG_IGN) for name in {_NOT_HEARD}]; "
    "from ckptvcs.background.server import serve; serve()"
)
_PATIENCE = 10.0  # seconds for an idle process to end in
_LOOK = 1.0  # seconds between looks whether it is alive
MAX_PROCESSES = 3  # that may die over one commit
MAX_ATTEMPTS = 2  # of one commit that may be answered with an error
# A process that dies of these would take the next one, and the training, with it.
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
# Another attempt would meet the same, or was made already.
_FINAL = (BusyError, InvalidInputError, NotFoundError, StorageError, UnsupportedVersionError)
_names = {number.value: number.name for number in signal.Signals}
_log = logging.getLogger("ckptvcs")


@dataclass(frozen=True)
class Job:
    """One commit, of what is in `size` bytes of memory; a descriptor of these follows."""

    size: int
    parcel: StateMessage
    said: dict[str, Any]


@dataclass(frozen=True)
class Done:
    """The commit that was made, and its branch."""

    name: str
    branch: str


@dataclass(frozen=True)
class Failed:
    """What was raised instead."""

    kind: type[CkptError]
    message: str
    hint: str | None


class NoWorkerError(CkptError):
    """No process can be had that lives long enough to commit."""


class _DiedError(Exception):
    """The process has ended, or was ended: without an answer it is of no more use."""

    def __init__(self, how: str, *, by_fault: bool = False) -> None:
        super().__init__(how)
        self.by_fault = by_fault


class Worker:
    """The process, started when it is first needed, and anew after it died."""

    def __init__(self, folder: Path, was_made: Callable[[Move], bool]) -> None:
        """`was_made` says whether a commit that a process announced before it died is there."""
        self._folder, self._was_made = folder, was_made
        self._end: weakref.finalize[Any, Any] | None = None

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

    def commit(self, staging: Staging, parcel: StateMessage, said: dict[str, Any]) -> Done:
        """Have a state committed whose tensors are in the room of a `staging`.

        Raises:
            NoWorkerError: there is no process that can do it; this one may.
            CkptError: what went wrong there.
        """
        died = failed = 0
        while True:
            move: Move | None = None
            problem: Exception
            try:
                for answer in self._answers(staging, parcel, said):
                    if isinstance(answer, Done):
                        return answer
                    if isinstance(answer, Move):
                        move = answer
                    elif isinstance(answer, Failed):
                        raise answer.kind(answer.message, hint=answer.hint)
            except _DiedError as error:
                died, problem = died + 1, error
            except CkptError as error:
                failed, problem = failed + 1, error
            if move is not None and self._was_made(move):
                return Done(move.commit, move.branch)
            if isinstance(problem, _FINAL) or failed == MAX_ATTEMPTS:
                raise problem
            if died == MAX_PROCESSES:
                how = f"the process that commits in the background ended each time ({problem})"
                by_fault = isinstance(problem, _DiedError) and problem.by_fault
                raise CkptError(how) if by_fault else NoWorkerError(how)
            _log.warning("a commit in the background is tried again: %s", problem)
            self.close()

    def _answers(
        self, staging: Staging, parcel: StateMessage, said: dict[str, Any]
    ) -> Iterator[object]:
        """What the process says of one commit, until nobody asks any more."""
        try:
            if self._end is not None and self._end.alive and self.process.poll() is not None:
                self.close()  # it died while it had nothing to do
            if self._end is None or not self._end.alive:
                self._start()
        except OSError as error:
            raise _DiedError(f"it cannot be started: {error}") from error
        try:
            handle, size = staging.handle()
        except OSError as error:
            raise NoWorkerError(f"no memory can be shared: {error}") from error
        try:
            self.pipe.send(Job(size, parcel, said))
            send_handle(self.pipe, handle, self.process.pid)
            while True:
                yield self._answer()
        except (EOFError, OSError) as error:
            self.close()
            code = self.process.returncode
            by_fault = -code in _FAULTS
            raise _DiedError(_names.get(-code, f"exit {code}"), by_fault=by_fault) from error

    def _answer(self) -> object:
        while not self.pipe.poll(_LOOK):  # forked children may hold the other end, too
            if self.process.poll() is not None and not self.pipe.poll():
                raise EOFError
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        if self._end is not None:
            self._end()


def _stop(pipe: Connection, process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:  # not a child of it, forked
        with contextlib.suppress(OSError):
            pipe.send(None)  # children may hold this end, too, so that closing it says nothing
    pipe.close()
    if os.getpid() != owner:
        return
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
