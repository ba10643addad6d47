"""The inner loops of the codec, in two forms that give the same bits.

`reference` is numpy and says what each loop means.  `compiled` is several times faster, but takes
about a second to load, so `prepare` loads it once there is enough work to pay for that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial
from types import ModuleType

from ckptvcs.codec.kernels import reference
from ckptvcs.parallel import start_thread

_WORTH_LOADING = 100_000_000  # bytes of tensors
_SWITCH = "CKPT_COMPILED"  # 0: never, 1: always
_LONG_SECONDS = 3.0  # of a processor: loading takes one
_LOOK_SECONDS = 0.5
_log = logging.getLogger("ckptvcs")


class _State:
    """State of the process."""

    loops: ModuleType | None = None
    work_bytes = 0


def prepare(size_bytes: int) -> None:
    """Load the compiled loops, if they can be had, and work of that many bytes of tensors makes up
    for it, together with what this process did before.
    """
    _State.work_bytes += size_bytes
    wanted = os.environ.get(_SWITCH) or str(int(_State.work_bytes >= _WORTH_LOADING))
    if wanted == "0" or _State.loops is not None:
        return
    loaded = threading.Event()
    start_thread(partial(_announce, loaded))
    try:
        from ckptvcs.codec.kernels import compiled  # noqa: PLC0415  takes about a second

        _State.loops = compiled
    except (ImportError, RuntimeError, OSError):  # no numba, or nowhere to keep what it compiles
        _State.loops = reference
    finally:
        loaded.set()


def _announce(loaded: threading.Event) -> None:
    """Say so where loading takes so much work that it must be compiling."""
    start = time.process_time()
    while not loaded.wait(_LOOK_SECONDS):
        if time.process_time() - start >= _LONG_SECONDS:
            _log.warning("compiling the codec kernels (only once)")
            return


def active() -> ModuleType:
    """Return the module with the kernels to call."""
    return _State.loops or reference
