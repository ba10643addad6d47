"""Sizes: a number of bytes as people read it."""

from __future__ import annotations


def size(count: float) -> str:
    """A number of bytes in three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
