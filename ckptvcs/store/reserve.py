"""Room on the disk that is kept free: whoever deletes must first write down what.

cache/reserve      bytes of no meaning, given up where there is no other room
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NAME = "reserve"
_RESERVE_BYTES = 1 << 20  # a mark, the records of thirty thousand dropped commits, their folders


def keep_reserve(cache: Path) -> None:
    """Take the room, unless it is taken already; a disk that has none is left as it is."""
    path = cache / _NAME
    if path.exists():
        return
    try:
        path.write_bytes(os.urandom(_RESERVE_BYTES))  # which no file system makes smaller
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def give_up_reserve(cache: Path) -> None:
    """Make room: delete the reserve, and the materialised bases, which the next commits make anew.

    Raises:
        OSError: the file system refuses.
    """
    (cache / _NAME).unlink(missing_ok=True)
    for path in [*(cache / "bases").glob("[!.]*")]:
        path.unlink(missing_ok=True)
