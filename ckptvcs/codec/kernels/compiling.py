"""Compile the kernels once, in a separate process, so that no command waits for it.

A mark in the cache of the user says that this was tried on this machine: an empty file, whose name
has a hash of what numba's cache depends on. The process lives on when its parent ends.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_CODE = "from ckptvcs.codec.kernels.compiling import compile_and_mark; compile_and_mark()"
_NICE = 10
_started: list[subprocess.Popen[bytes]] = []  # Popen warns of a running process that nobody holds


def is_tried() -> bool:
    """Return whether the kernels are compiled, or cannot be, or no mark can be kept."""
    try:
        return _mark().exists()
    except (OSError, RuntimeError, metadata.PackageNotFoundError):  # no home, no numba
        return True


def start() -> bool:
    """Compile the kernels in another process; return whether it is at work."""
    if _started and _started[-1].poll() is None:
        return True
    try:
        cache = _mark().parent
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            return False
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            start_new_session=True,  # Ctrl-C is for the command
        )
    except (OSError, ValueError):
        return False
    _started[:] = [process]
    return True


def compile_and_mark() -> None:
    """Fill numba's cache, and leave the mark."""
    os.nice(_NICE)
    try:
        import ckptvcs.codec.kernels.compiled  # noqa: F401, PLC0415  compiles
    finally:
        _mark().touch()


def _mark() -> Path:
    """Return the path of the mark.

    Raises:
        RuntimeError: The user has no home directory.
        PackageNotFoundError: numba is not installed.
        OSError: The package cannot be read.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = cache if cache.is_absolute() else Path.home() / ".cache"
    here = Path(__file__).parent
    sources = [here / "compiled.py", here / "compiled_bits.py"]
    known = [
        *(f"{path}:{path.stat().st_mtime_ns}" for path in sources),
        metadata.version("numba"),
        sys.version,
        platform.node(),
        os.environ.get("NUMBA_CACHE_DIR", ""),
    ]
    name = hashlib.sha256("\n".join(known).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache / "ckptvcs" / f"kernels-{name}"
