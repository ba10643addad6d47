"""Make forks safe.  A child has only the thread that forked, but the locks of all threads.

In the child, a lock that another thread held is never released, a module that another thread was
importing stays incomplete, and an LMDB handle may be in any state.  So a fork waits for a limited
time until no thread imports or uses LMDB.  The child begins with new locks and without the files.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from threading import RLock

_IMPORT_WAIT = 60.0  # seconds: a module may have to be compiled first
_USE_WAIT = 1.0  # seconds
_PAUSE = 0.005  # seconds
_PACKAGE = __name__.partition(".")[0] + "."

using = RLock()
"""Each user of LMDB holds this lock, for any index, so that a fork can wait for it."""

_forking: dict[int, bool] = {}  # thread -> whether it holds `using`
_in_child: list[Callable[[bool], None]] = []


def in_child(forget: Callable[[bool], None]) -> None:
    """Call `forget(idle)` in each forked child; `idle` says whether no thread was using LMDB."""
    _in_child.append(forget)


def _is_importing() -> bool:
    """Return whether another thread is importing a module of this package."""
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
