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
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

from ckptvcs.checkpoint.staging import Staging

_COPIES = 2  # one that is coded, one that waits
_log = logging.getLogger("ckptvcs")

T = TypeVar("T")


class Background(Generic[T]):
    """A thread that waits for work to be done, and the copies that are worked on."""

    def __init__(self) -> None:
        self.process = os.getpid()  # a forked child has none of the threads
        self._thread = ThreadPoolExecutor(1, "ckpt-background")
        self._free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        self._open: list[Future[T]] = []
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
            _log.warning("a commit waits until an earlier one is coded: commit less often")
            return self._free.get()

    def release(self, staging: Staging) -> None:
        """Nobody reads a copy any more."""
        self._free.put(staging)

    def submit(self, staging: Staging, work: Callable[[], T]) -> Future[T]:
        """Do `work`, which uses a copy, when all that came before is done."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled: the copy is made

        def run() -> None:
            try:
                made = work()
            except BaseException as error:
                _log.error("a commit in the background failed: %s", error)
                self.release(staging)
                future.set_exception(error)
            else:
                self.release(staging)
                future.set_result(made)

        self._thread.submit(run)
        self._open.append(future)
        return future

    def raise_failed(self) -> None:
        """Raise what earlier work failed with, once; the first of several: all are logged."""
        ended = [future for future in self._open if future.done()]
        self._open = [future for future in self._open if future not in ended]
        failed = [error for error in (future.exception() for future in ended) if error]
        if failed:
            raise failed[0]

    def wait(self) -> None:
        """Wait until all is done; raises as `raise_failed` does."""
        for future in self._open:
            future.exception()
        self.raise_failed()

    def close(self) -> None:
        """The same, and no thread stays."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _finish(found: weakref.ref[Background[Any]]) -> None:
    background = found()
    if background is not None and background.process == os.getpid():
        with contextlib.suppress(BaseException):  # which was logged
            background.wait()
