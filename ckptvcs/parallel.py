"""Work in threads, results in order.

The heavy loops (numpy, zstd, blake3, reads) release the interpreter lock, so threads use all
cores; at most a few results wait, so memory stays bounded.  Where the system gives no thread, the
one that asks does the work itself.
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

_TURN = 2e-4  # seconds that a thread holds the interpreter while another wants to start a loop
_LEAST = 19  # the priority that comes last
_PROCESS = os.getpid()  # that has loaded this
_BLAS_THREADS = frozenset({"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"})
_BIRTH = 5.0  # seconds, after which a thread has died in its first moment
_AGAIN = 30.0  # seconds after that in which no other one is tried
_AHEAD = 2  # items more than threads, so that none idles while a slow one is waited for

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int], None]
"""Is told of bytes that were read or written."""


def quiet(_: object) -> None:
    """Ignore progress, or another notification."""


def worker_count() -> int:
    """How many threads to use: the cores this process may run on, at most 16."""
    return min(16, _cores())


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@lru_cache(2)
def _pool(process: int, background: bool) -> Pool:
    """The threads of this process; a forked child makes its own."""
    workers = max(1, worker_count() - background)  # one core is somebody else's
    return Pool(workers)


_thread = local()
_turns = Lock()
_asking: list[float] = []  # what was set before, and one entry for each of the others


def _renew_lock() -> None:
    """A thread of the parent, which a forked child does not have, may hold it."""
    global _turns
    _turns = Lock()


os.register_at_fork(after_in_child=_renew_lock)


def stay_in_background() -> None:
    """Let what this thread does, and the threads that it starts, come after all other work."""
    _thread.background = True
    with suppress(AttributeError, OSError):  # on Linux a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _LEAST)


def spare_threads() -> None:
    """Keep numpy, which is not loaded yet, from starting threads where the system does not give as
    many: its OpenBLAS interrupts the process (SIGINT) for want of one, or waits for it for ever.
    """
    if "numpy" in sys.modules or _BLAS_THREADS.intersection(os.environ):
        return
    if not _are_given():
        os.environ["OPENBLAS_NUM_THREADS"] = "1"


def may_hash_in_threads() -> bool:
    """Whether BLAKE3 may use its threads: it panics where they cannot be started, and a process
    that was forked waits for ever for those of its parent.
    """
    return os.getpid() == _PROCESS and _are_given()


@lru_cache(1)
def _are_given() -> bool:
    """Whether the system gives one thread for each core.  All have begun when this returns: CPython
    3.11 crashes where the interpreter ends before a thread has begun.
    """
    gate = Event()
    try:
        return all(start_thread(gate.wait) for _ in range(_cores()))
    finally:
        gate.set()


class _Work(Generic[R]):
    """Work that is done once, by whoever comes first."""

    def __init__(self, function: Callable[[], R]) -> None:
        self.future: Future[R] = Future()
        self._function, self._turns = function, itertools.count()

    def __call__(self) -> None:
        # A count is taken in one step of the interpreter.
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
    """Some threads, which are started as they are needed.  The interpreter waits for them before it
    ends: what a thread of another library does meanwhile may need it, and ends the process where it
    is gone.
    """

    def __init__(self, most: int) -> None:
        self._most, self._process = most, os.getpid()
        self._queue: SimpleQueue[_Work[Any] | None] = SimpleQueue()
        self._idle, self._lock = Semaphore(0), Lock()
        self._ends: list[LockType] = []  # of each thread: it is free once that has ended
        _pools.add(self)

    def start(self, function: Callable[[], R]) -> Future[R]:
        """Have something done by a thread; where the system gives none, do it here and now."""
        work = _Work(function)
        if self._idle.acquire(blocking=False):
            self._queue.put(work)
        elif not self._is_with_new_thread(work):
            if self._ends:
                self._queue.put(work)
            else:
                work()
        return work.future

    def _is_with_new_thread(self, work: _Work[Any]) -> bool:
        """Whether one more thread could be started, for some work to begin with."""
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
            work: _Work[Any] | None = first.pop()  # which nothing else holds until the thread ends
            while work is not None:
                with suppress(BaseException):  # which its future has
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
        """Wait for the threads to end; what has not begun may be cancelled."""
        if os.getpid() != self._process:
            return  # a forked child has none of them
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
    for pool in [*_pools]:
        pool.shutdown()


_refused_until = 0.0


def start_thread(run: Callable[[], object]) -> bool:
    """Run something in a thread that nobody waits for; whether the system gives one, with the
    memory that it needs in its first moment: `Thread.start` waits for ever for one without.
    """
    global _refused_until
    if monotonic() < _refused_until:
        return False
    alive, wanted = allocate_lock(), [True]
    alive.acquire()
    # That takes no frame of Python, for which there may be no memory, and keeps nothing.
    hook, sys.unraisablehook = sys.unraisablehook, deque[object](maxlen=0).append
    try:
        start_new_thread(_live, (alive, wanted, run))
        if alive.acquire(timeout=_BIRTH):
            return True
    except (RuntimeError, MemoryError):
        return False
    finally:
        sys.unraisablehook = hook
    wanted.clear()
    _refused_until = monotonic() + _AGAIN
    return False


def _live(alive: LockType, wanted: list[bool], run: Callable[[], object]) -> None:
    alive.release()
    if wanted:  # else it comes too late
        run()


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, in threads, a few items ahead of the consumer.

    An exception of `function` is raised at its item; work that waits then is dropped.  `function`
    must not call `ordered_map` itself: all work shares one pool of threads.
    """
    pool = _pool(os.getpid(), getattr(_thread, "background", False))
    waiting: deque[Future[R]] = deque()
    with _short_turns():
        try:
            for item in items:
                waiting.append(pool.start(partial(function, item)))
                if len(waiting) > worker_count() + _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads take turns often.  That holds for the whole process, where several may ask for it
    at once: the first one sets it, and the last one puts it back.
    """
    with _turns:
        if not _asking:
            _asking.append(sys.getswitchinterval())
            sys.setswitchinterval(min(_asking[0], _TURN))
        else:
            _asking.append(_TURN)
    try:
        yield
    finally:
        with _turns:
            before = _asking[0]
            _asking.pop()
            if not _asking:
                sys.setswitchinterval(before)
