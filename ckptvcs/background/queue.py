"""Commits in the background: copied at once, coded one after another while training goes on.

stage     room for a copy: two of them, so that one may wait while another is coded
submit    a thread, which gives them to a worker in their order
raised    what went wrong is said at the next call, and at the end
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
from functools import partial
from typing import Any, Generic, TypeVar

from ckptvcs.background.shared_state import Staging
from ckptvcs.errors import CkptError
from ckptvcs.parallel import Pool

_COPIES = 2  # one that is coded, one that waits
_log = logging.getLogger("ckptvcs")

T = TypeVar("T")


class Background(Generic[T]):
    """A thread that waits for work to be done, and the copies that are worked on."""

    def __init__(self) -> None:
        self.process = os.getpid()  # a forked child has none of the threads
        self._thread = Pool(1)
        self._free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        self._open: list[tuple[str, Future[T]]] = []
        self._lock = threading.Lock()
        for _ in range(_COPIES):
            self._free.put(Staging())
        # When the interpreter ends, thread pools take no more work before `atexit` is asked; this
        # is asked before that.
        at_end = getattr(threading, "_register_atexit", None)
        if at_end is not None:
            at_end(partial(_finish, weakref.ref(self)))

    def stage(self) -> Staging:
        """Room for a copy, to be given to `submit` or back to `release`; waits until there is some,
        and says so.
        """
        try:
            return self._free.get_nowait()
        except queue.Empty:
            _log.warning(
                "commit_async blocked: the previous commit is still being compressed; "
                "consider committing less often"
            )
            return self._free.get()

    def release(self, staging: Staging) -> None:
        """Nobody reads a copy any more."""
        self._free.put(staging)

    def submit(self, staging: Staging, work: Callable[[], T], name: str) -> Future[T]:
        """Do `work`, which uses a copy, when all that came before is done; errors are told with its
        `name`.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled: the copy is made

        def run() -> None:
            try:
                made = work()
            except BaseException as error:
                _log.error("a commit in the background failed (%s): %s", name, error)
                self.release(staging)
                future.set_exception(error)
            else:
                self.release(staging)
                future.set_result(made)

        with self._lock:
            try:
                self._thread.start(run)
            except BaseException:  # the interpreter ends
                self.release(staging)
                raise
            self._open.append((name, future))
        return future

    def done(self, value: T) -> Future[T]:
        """The future of what is done already."""
        future: Future[T] = Future()
        future.set_result(value)
        return future

    def raise_failed(self) -> None:
        """Raise what earlier work failed with: each failure once, several as one error."""
        with self._lock:
            ended = [(name, future) for name, future in self._open if future.done()]
            self._open = [pair for pair in self._open if pair not in ended]
        found = ((name, future.exception()) for name, future in ended)
        failed = [(name, error) for name, error in found if error is not None]
        if len(failed) == 1:
            raise failed[0][1]
        if failed:
            raise _joined(failed)

    def wait(self) -> None:
        """Wait until all is done; raises as `raise_failed` does."""
        for _, future in [*self._open]:
            future.exception()
        self.raise_failed()

    def close(self) -> None:
        """The same, and no thread stays."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _joined(failed: list[tuple[str, BaseException]]) -> CkptError:
    """Several failures as one, of the kind of the first."""
    what = "; ".join(f"{name}: {error}" for name, error in failed)
    message, first = f"{len(failed)} commits in the background failed: {what}", failed[0][1]
    if isinstance(first, CkptError):
        return type(first)(message, hint=first.hint)
    return CkptError(message)


def _finish(found: weakref.ref[Background[Any]]) -> None:
    background = found()
    if background is not None and background.process == os.getpid():
        with contextlib.suppress(BaseException):  # which was logged
            background.wait()
