"""The inner loops of the codec, in two implementations that give the same bits.

`reference` defines each loop with numpy. `compiled` is several times faster, but takes about a
second to load: `prepare` loads it when the process has enough work. The first time on a machine,
`compiling` compiles it in a separate process, and `reference` does the work meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial
from typing import cast

from ckptvcs.codec.kernels import reference
from ckptvcs.parallel import start_thread

_WORTH_LOADING = 100_000_000  # bytes of tensors
_SWITCH = "CKPT_COMPILED"  # 0: never, 1: always
_LONG_SECONDS = 3.0  # CPU time after which a user is told that the kernels are being compiled
_LOOK_SECONDS = 0.5
_log = logging.getLogger("ckptvcs")


class Kernels:
    """The type of both implementations: the functions of `reference`, with their signatures."""

    bit_positions = staticmethod(reference.bit_positions)
    change = staticmethod(reference.change)
    code_residuals = staticmethod(reference.code_residuals)
    directions = staticmethod(reference.directions)
    divide_roots = staticmethod(reference.divide_roots)
    extent = staticmethod(reference.extent)
    gap_positions = staticmethod(reference.gap_positions)
    join_bits = staticmethod(reference.join_bits)
    join_words = staticmethod(reference.join_words)
    log_sums = staticmethod(reference.log_sums)
    product = staticmethod(reference.product)
    quantize_units = staticmethod(reference.quantize_units)
    root_squares = staticmethod(reference.root_squares)
    split = staticmethod(reference.split)
    split_near = staticmethod(reference.split_near)
    split_words = staticmethod(reference.split_words)
    squares = staticmethod(reference.squares)
    times_columns = staticmethod(reference.times_columns)
    times_rows = staticmethod(reference.times_rows)
    weight_squares = staticmethod(reference.weight_squares)
    with_signs = staticmethod(reference.with_signs)


REFERENCE = cast(Kernels, reference)


class _State:
    """State of the process."""

    kernels: Kernels | None = None
    work_bytes = 0
    is_told = False


def prepare(size_bytes: int) -> None:
    """Load the compiled kernels if the process has worked, or will work, on enough bytes.

    `size_bytes` are the bytes of the tensors that follow. `reference` stays active without numba.
    """
    _State.work_bytes += size_bytes
    switch = os.environ.get(_SWITCH)
    wanted = switch != "0" if switch else _State.work_bytes >= _WORTH_LOADING
    if not wanted or _State.kernels is not None or (not switch and _is_compiling()):
        return
    loaded = threading.Event()
    start_thread(partial(_announce, loaded))
    try:
        from ckptvcs.codec.kernels import compiled  # noqa: PLC0415  takes about a second

        _State.kernels = cast(Kernels, compiled)
    except (ImportError, RuntimeError, OSError):  # no numba, or no folder for its cache
        _State.kernels = REFERENCE
    finally:
        loaded.set()


def _is_compiling() -> bool:
    """Return whether the kernels are being compiled; start that if they never were."""
    from ckptvcs.codec.kernels import compiling  # noqa: PLC0415  only for much work

    if compiling.is_tried() or not compiling.start():
        return False
    if not _State.is_told:
        _State.is_told = True
        _log.warning("compiling the codec kernels in the background (only once)")
    return True


def _announce(loaded: threading.Event) -> None:
    """Log a warning if loading takes so much CPU time that numba must be compiling."""
    start = time.process_time()
    while not loaded.wait(_LOOK_SECONDS):
        if time.process_time() - start >= _LONG_SECONDS:
            _log.warning("compiling the codec kernels (only once)")
            return


def active() -> Kernels:
    """Return the module whose kernels to call."""
    return _State.kernels or REFERENCE
