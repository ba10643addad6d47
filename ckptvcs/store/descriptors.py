"""Descriptors: the numbers 0, 1 and 2 never belong to a file of a repository.

A process may be started with standard streams that are closed.  The next file that it opens has the
number of one, and whatever prints by number (a library in C, a child process) prints into it.
"""

from __future__ import annotations

import os

_STANDARD = 3  # 0, 1, 2


def occupy_standard() -> None:
    """Open what is closed of the standard streams, to nowhere."""
    while (number := _closed()) is not None:
        opened = os.open(os.devnull, os.O_RDWR)  # which is the lowest number that is free
        os.set_inheritable(opened, number < _STANDARD)
        if opened >= _STANDARD:  # another thread was quicker
            os.close(opened)


def _closed() -> int | None:
    for number in range(_STANDARD):
        try:
            os.get_inheritable(number)
        except OSError:
            return number
    return None
