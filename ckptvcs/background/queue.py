"""Background: the queue of `commit_async`.

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
from functools import partial
from typing import Any, Generic, TypeVar

from ckptvcs.background.shared_state import Staging
from ckptvcs.errors import CkptError
from ckptvcs.parallel import Pool

_COPIES = 2  # one that is being encoded and one that waits
_log = logging.getLogger("ckptvcs")

T = TypeVar("T")


class Background(Generic[T]):
    """A thread that runs work in order, and the memory that the work reads."""

    def __init__(self) -> None:
        self.process = os.getpid()  # a forked child does not have the thread
        self._thread = Pool(1)
        self._free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        self._open: list[tuple[str, Future[T]]] = []
        self._lock = threading.Lock()
        for _ in range(_COPIES):
            self._free.put(Staging())
        # Thread pools refuse work before `atexit` functions run; this function runs before that.
        at_end = getattr(threading, "_register_atexit", None)
        if at_end is not None:
            at_end(partial(_finish, weakref.ref(self)))

    def stage(self) -> Staging:
        """Return memory for a copy; blocks, and logs a warning, until some is free.

        Pass it to `submit` or `release`.
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
        """Make the memory of a copy available again."""
        self._free.put(staging)

    def submit(self, staging: Staging, work: Callable[[], T], name: str) -> Future[T]:
        """Run `work` after all earlier work, then release its copy; errors are logged by `name`."""
        future: Future[T] = Future()
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
        self.raise_failed()

    def close(self) -> None:
        """Wait until all work is done and stop the thread; raises as `raise_failed`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _joined(failed: list[tuple[str, BaseException]]) -> CkptError:
    """Return one error for several, of the type of the first one."""
    what = "; ".join(f"{name}: {error}" for name, error in failed)
    message, first = f"{len(failed)} background commits failed: {what}", failed[0][1]
    if isinstance(first, CkptError):
        return type(first)(message, hint=first.hint)
    return CkptError(message)


def _finish(reference: weakref.ref[Background[Any]]) -> None:
    background = reference()
    if background is not None and background.process == os.getpid():
        with contextlib.suppress(BaseException):  # every error was logged
            background.wait()
