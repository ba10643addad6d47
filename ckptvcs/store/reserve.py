"""A reserve of disk space: a deletion needs some space, because it must first be recorded.

cache/reserve      random bytes, deleted when the disk is full
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NAME = "reserve"
_RESERVE_BYTES = 1 << 20  # for a mark, the records of thirty thousand dropped commits, folders


def keep_reserve(cache: Path) -> None:
    """Create the reserve if it is missing and the disk has room."""
    path = cache / _NAME
    if path.exists():
        return
    try:
        path.write_bytes(os.urandom(_RESERVE_BYTES))  # no file system can compress this
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def give_up_reserve(cache: Path) -> None:
    """Delete the reserve, the cached bases and their errors; the next commits rebuild them.

    Raises:
        OSError: the file system refuses.
    """
    (cache / _NAME).unlink(missing_ok=True)
    for path in [*(cache / "bases").glob("[!.]*"), *(cache / "errors").glob("[!.]*")]:
        path.unlink(missing_ok=True)
