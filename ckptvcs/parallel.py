"""Work in threads, results in order.

The heavy loops (numpy, zstd, blake3, reads) release the interpreter lock, so threads use all
cores; at most a few results wait, so memory stays bounded.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

_TURN = 2e-4  # seconds that a thread holds the interpreter while another wants to start a loop
_AHEAD = 2  # items more than threads, so that none idles while a slow one is waited for

T = TypeVar("T")
R = TypeVar("R")


def worker_count() -> int:
    """How many threads to use: the cores this process may run on, at most 16."""
    try:
        return min(16, len(os.sched_getaffinity(0)))
    except AttributeError:
        return min(16, os.cpu_count() or 1)


@lru_cache(1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked child makes its own."""
    return ThreadPoolExecutor(worker_count(), thread_name_prefix=f"ckpt-{process}")


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, in threads, a few items ahead of the consumer.

    An exception of `function` is raised at its item; work that waits then is dropped.  `function`
    must not call `ordered_map` itself: all work shares one pool of threads.
    """
    pool = _pool(os.getpid())
    waiting: deque[Future[R]] = deque()
    turn = sys.getswitchinterval()
    try:
        sys.setswitchinterval(min(turn, _TURN))
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > worker_count() + _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)
        sys.setswitchinterval(turn)
