"""Worker: a process beside that commits what it is given, so that training is not held up.

Threads of one process take turns at the interpreter, some hundred times in a step of training; a
process of its own takes nothing but a core and memory.  It is started from nothing, reads states
where they were copied to, in shared memory, and ends with the process that it works for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptvcs.errors import CkptError

if TYPE_CHECKING:
    from ckptvcs.checkpoint.parcel import Parcel
    from ckptvcs.checkpoint.staging import Staging

# Who stops a job may tell all of its processes; this one ends with the one that it works for, which
# may have something left to commit.
_NOT_HEARD = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_START = (
    f"import signal as s; [s.signal(getattr(s, name), s.SIG_IGN) for name in {_NOT_HEARD}]; "
    "from ckptvcs.serving import serve; serve()"
)
_PATIENCE = 10.0  # seconds for an idle process to end in
_LOOK = 1.0  # seconds between looks whether it is alive


@dataclass(frozen=True)
class Job:
    """One commit, of what is in a `room`; a handle for that follows if it is `fresh`."""

    room: int
    fresh: bool
    size: int
    parcel: Parcel
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


class Worker:
    """The process, started when it is first needed, and anew after it died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end: weakref.finalize[Any, Any] | None = None
        self._sent: set[int] = set()

    def _start(self) -> None:
        self._pipe, far = Pipe()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        arguments = [str(far.fileno()), str(os.getpid()), str(self._folder.resolve())]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *arguments], pass_fds=[far.fileno()],
            stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}, process_group=0,
        )  # fmt: skip
        far.close()
        self._sent.clear()
        self._end = weakref.finalize(self, _stop, self._pipe, self._process, os.getpid())

    def commit(self, staging: Staging, parcel: Parcel, said: dict[str, Any]) -> Done:
        """Have a state committed whose tensors are in the room of a `staging`.

        Raises:
            CkptError: what went wrong there; or the process died.
        """
        if self._end is not None and self._end.alive and self._process.poll() is not None:
            self.close()  # it died while it had nothing to do
        if self._end is None or not self._end.alive:
            self._start()
        token, handle, size = staging.handle()
        job = Job(token, token not in self._sent, size, parcel, said)
        try:
            self._pipe.send(job)
            if job.fresh:
                send_handle(self._pipe, handle, self._process.pid)
                self._sent.add(token)
            answer = self._answer()
        except (EOFError, OSError) as error:
            self.close()
            code = self._process.returncode
            how = signal.Signals(-code).name if code and code < 0 else f"exit {code}"
            raise CkptError(f"the process that commits in the background ended ({how})") from error
        if isinstance(answer, Failed):
            raise answer.kind(answer.message, hint=answer.hint)
        assert isinstance(answer, Done)
        return answer

    def _answer(self) -> object:
        while not self._pipe.poll(_LOOK):  # forked children may hold the other end, too
            if self._process.poll() is not None and not self._pipe.poll():
                raise EOFError
        return self._pipe.recv()

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
