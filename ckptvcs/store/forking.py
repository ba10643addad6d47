"""Forks: what a child has of its parent's threads is the one that forked, and all of their locks.

A lock that another thread held is never let go in the child, a module that another thread was
importing is never whole, and a handle of LMDB may be in any state.  So whoever forks waits until
nobody is at it, for a stated time; and the child begins with new locks, and without the files.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from threading import RLock

_IMPORT_WAIT = 60.0  # seconds: what is imported may have to be compiled
_USE_WAIT = 1.0  # seconds
_PAUSE = 0.005  # seconds
_PACKAGE = __name__.partition(".")[0] + "."

using = RLock()
"""To be held by whoever uses LMDB, of any index, so that a fork finds nobody at it."""

_forking: dict[int, bool] = {}  # thread -> whether it holds `using`
_in_child: list[Callable[[bool], None]] = []


def in_child(forget: Callable[[bool], None]) -> None:
    """Have `forget` called in each forked child; it is told whether nobody was using LMDB."""
    _in_child.append(forget)


def _is_importing() -> bool:
    """Whether a module of this package is being imported: no thread that forks is at that."""
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.startswith(_PACKAGE)
    )


def _before() -> None:
    end = time.monotonic() + _IMPORT_WAIT
    while _is_importing() and time.monotonic() < end:
        time.sleep(_PAUSE)
    _forking[threading.get_ident()] = using.acquire(timeout=_USE_WAIT)


def _after_in_parent() -> None:
    if _forking.pop(threading.get_ident()):
        using.release()


def _after_in_child() -> None:
    global using
    idle = _forking.pop(threading.get_ident())
    _forking.clear()
    for forget in _in_child:
        forget(idle)
    using = RLock()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
