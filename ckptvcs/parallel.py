"""Run work in threads, with results in order.

The heavy loops (numpy, zstd, blake3, reads) release the interpreter lock, so threads use all
cores.  Only a few results are buffered, so memory stays bounded.  If the system cannot start a
thread, the calling thread does the work.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
from _thread import LockType, allocate_lock, start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from queue import Empty, SimpleQueue
from threading import Event, Lock, Semaphore, get_native_id, local
from time import monotonic
from typing import Any, Generic, TypeVar
from weakref import WeakSet

_SWITCH_INTERVAL = 2e-4  # seconds until a thread passes on the interpreter lock
_LOWEST_PRIORITY = 19
_PROCESS = os.getpid()  # the process that imported this module; a fork has another id
_BLAS_THREADS = frozenset({"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"})
START_TIMEOUT = 5.0  # seconds; a thread that has not begun by then has died
_RETRY_AFTER = 30.0  # seconds without attempts after a thread died
_SMALL = 1 << 14  # words of an item, below which a thread costs more time than it saves
_AHEAD = 2  # more items than threads, so that no thread idles while a slow item is awaited

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int], None]
"""A function that is called with each number of bytes read or written."""


def quiet(_: object) -> None:
    """Ignore progress, or another notification."""


def reading(progress: Progress) -> Progress:
    """Return the function that counts the bytes of a pass before the counted one.

    It is the attribute `reading` of a progress that has one.
    """
    found: Progress = getattr(progress, "reading", quiet)
    return found


def worker_count() -> int:
    """Return the number of cores that this process may use, at most 16."""
    return min(16, _cores())


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@lru_cache(2)
def shared_pool(process: int, background: bool) -> Pool:
    """Return the pool of a process; a forked child gets a new one.

    A background process leaves one core free.
    """
    return Pool(max(1, worker_count() - background))


_thread = local()
_interval_lock = Lock()
_intervals: list[float] = []  # the original switch interval, then one entry per further user


def _renew_lock() -> None:
    """Replace the lock: a thread of the parent process may hold it, and the child has no such
    thread.
    """
    global _interval_lock
    _interval_lock = Lock()


os.register_at_fork(after_in_child=_renew_lock)


def stay_in_background() -> None:
    """Give this thread, and the threads that it starts, the lowest priority."""
    _thread.background = True
    with suppress(AttributeError, OSError):  # on Linux, each thread has its own priority
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _LOWEST_PRIORITY)


def spare_threads() -> None:
    """Limit OpenBLAS to one thread if the system cannot start one per core.

    If OpenBLAS cannot start a thread, it interrupts the process (SIGINT) or waits forever.  This
    must run before numpy is imported.
    """
    if "numpy" in sys.modules or _BLAS_THREADS.intersection(os.environ):
        return
    if not _are_given():
        os.environ["OPENBLAS_NUM_THREADS"] = "1"


def may_hash_in_threads() -> bool:
    """Return whether BLAKE3 may use its threads.

    It panics if it cannot start them.  In a forked process, it waits forever for the threads of
    the parent.
    """
    return os.getpid() == _PROCESS and _are_given()


@lru_cache(1)
def _are_given() -> bool:
    """Return whether the system can start one thread per core.

    All threads have begun when this returns: CPython 3.11 crashes if the interpreter ends before
    a thread has begun.
    """
    gate = Event()
    try:
        return all(start_thread(gate.wait) for _ in range(_cores()))
    finally:
        gate.set()


class _Work(Generic[R]):
    """A call that the first of several threads runs, once."""

    def __init__(self, function: Callable[[], R]) -> None:
        self.future: Future[R] = Future()
        self._function, self._turns = function, itertools.count()

    def __call__(self) -> None:
        # `next` is atomic, so only one thread gets 0.
        if next(self._turns) or not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(result)


class Pool:
    """At most `most` threads, started when they are needed.

    The interpreter waits for them before it ends.  A thread that still runs library code after
    the interpreter has ended would crash the process.
    """

    def __init__(self, most: int) -> None:
        self._most, self._process = most, os.getpid()
        self._queue: SimpleQueue[_Work[Any] | None] = SimpleQueue()
        self._idle, self._lock = Semaphore(0), Lock()
        self._ends: list[LockType] = []  # one per thread; a thread releases its lock at its end
        _pools.add(self)

    def start(self, function: Callable[[], R], *, here: bool = False) -> Future[R]:
        """Run `function` in a thread; at once in this one if `here`, or if no thread starts."""
        work = _Work(function)
        if here:
            work()
        elif self._idle.acquire(blocking=False):
            self._queue.put(work)
        elif not self._start_thread(work):
            if self._ends:
                self._queue.put(work)
            else:
                work()
        return work.future

    def _start_thread(self, work: _Work[Any]) -> bool:
        """Start one more thread, which begins with `work`; return whether that was possible."""
        with self._lock:
            if len(self._ends) == self._most:
                return False
            end = allocate_lock()
            end.acquire()
            begun = start_thread(partial(self._serve, end, [work]))
            if begun:
                self._ends.append(end)
            return begun

    def _serve(self, end: LockType, first: list[_Work[Any]]) -> None:
        try:
            # `pop`, so that no other reference keeps the work alive until the thread ends.
            work: _Work[Any] | None = first.pop()
            while work is not None:
                with suppress(BaseException):  # the future holds the exception
                    work()
                del work
                try:
                    work = self._queue.get_nowait()
                except Empty:
                    self._idle.release()
                    work = self._queue.get()
        finally:
            end.release()

    def shutdown(self, *, cancel: bool = False) -> None:
        """Wait for the threads to end; with `cancel`, cancel work that has not begun."""
        if os.getpid() != self._process:
            return  # a forked child does not have these threads
        with suppress(Empty):
            while cancel and (work := self._queue.get_nowait()) is not None:
                work.future.cancel()
        with self._lock:
            ends, self._ends = self._ends, []
        for _ in ends:
            self._queue.put(None)
        for end in ends:
            end.acquire()


_pools: WeakSet[Pool] = WeakSet()


@atexit.register
def _shut_down_all() -> None:
    with suppress(KeyboardInterrupt):  # the process ends anyway
        for pool in [*_pools]:
            pool.shutdown()


refused_until = 0.0


def start_thread(run: Callable[[], object]) -> bool:
    """Run something in a new thread; return whether that thread has begun.

    A thread may die at its start because memory is missing.  `Thread.start` would then wait
    forever; this function waits for a limited time.
    """
    global refused_until
    if monotonic() < refused_until:
        return False
    alive, wanted = allocate_lock(), [True]
    alive.acquire()
    # `append` needs no Python frame, for which memory may be missing, and stores nothing.
    hook, sys.unraisablehook = sys.unraisablehook, deque[object](maxlen=0).append
    try:
        start_new_thread(run_thread, (alive, wanted, run))
        if alive.acquire(timeout=START_TIMEOUT):
            return True
    except (RuntimeError, MemoryError):
        return False
    finally:
        sys.unraisablehook = hook
    wanted.clear()
    refused_until = monotonic() + _RETRY_AFTER
    return False


def run_thread(alive: LockType, wanted: list[bool], run: Callable[[], object]) -> None:
    """Report that this thread lives, then call `run` if the starter still waits for it."""
    alive.release()
    if wanted:  # otherwise the caller has given up
        run()


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], words: Callable[[T], int] | None = None
) -> Iterator[R]:
    """Map `function` over `items` in threads, a few items ahead of the consumer.

    `words` returns the size of an item in words; the calling thread processes small items itself.

    An exception of `function` is raised at its item and cancels the waiting work.  `function`
    must not call `ordered_map`: all calls share one pool of threads.
    """
    pool = shared_pool(os.getpid(), getattr(_thread, "background", False))
    waiting: deque[Future[R]] = deque()
    with _short_switch_interval():
        try:
            for item in items:
                small = words is not None and words(item) < _SMALL
                waiting.append(pool.start(partial(function, item), here=small))
                if len(waiting) > worker_count() + _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


@contextmanager
def _short_switch_interval() -> Iterator[None]:
    """Let threads switch often.

    The setting is that of the whole process: the first user sets it, the last one restores it.
    """
    with _interval_lock:
        if not _intervals:
            _intervals.append(sys.getswitchinterval())
            sys.setswitchinterval(min(_intervals[0], _SWITCH_INTERVAL))
        else:
            _intervals.append(_SWITCH_INTERVAL)
    try:
        yield
    finally:
        with _interval_lock:
            original = _intervals[0]
            _intervals.pop()
            if not _intervals:
                sys.setswitchinterval(original)
