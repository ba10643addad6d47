"""Keep the descriptors 0, 1 and 2 away from the files of a repository.

If a process starts with closed standard streams, the next file that it opens gets the number of
one of them.  Then a C library or child process that prints by number would write into that file.
"""

from __future__ import annotations

import os

_STANDARD = 3  # 0, 1, 2


def occupy_standard() -> None:
    """Open each closed standard stream to the null device."""
    while (number := _closed()) is not None:
        opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        os.set_inheritable(opened, number < _STANDARD)
        if opened >= _STANDARD:  # another thread has opened it
            os.close(opened)


def _closed() -> int | None:
    for number in range(_STANDARD):
        try:
            os.get_inheritable(number)
        except OSError:
            return number
    return None
