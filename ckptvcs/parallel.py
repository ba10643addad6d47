"""Work in threads, results in order.

The heavy loops (numpy, zstd, blake3, reads) release the interpreter lock, so threads use all
cores; at most a few results wait, so memory stays bounded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def worker_count() -> int:
    """How many threads to use: the cores this process may run on, at most 16."""
    try:
        return min(16, len(os.sched_getaffinity(0)))
    except AttributeError:
        return min(16, os.cpu_count() or 1)


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, in threads, a few items ahead of the consumer.

    An exception of `function` is raised at its item; work that waits then is dropped.
    """
    workers = worker_count()
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
