"""Text for the terminal: sizes, times, names of commits, and untrusted text made safe to show.

A name, a message or an error may contain terminal control sequences, or marks that reverse the
order of letters.  U+FFFD replaces every character that is not visible.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import re
import traceback
from collections.abc import Callable

UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""Invisible letters and marks that are not in the Unicode category "format"."""

_VARIATION_SELECTORS = range(0xFE00, 0xFE10)  # allowed: emoji often have one


def size(count: float) -> str:
    """Return a number of bytes with a unit and three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


_TIME = re.compile(r"([0-9]*\.?[0-9]+|[0-9]+\.)([smhdwy])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31557600}


def seconds(text: str) -> float | None:
    """Return the seconds of a time such as `12h` or `7d`; None if the text has another form."""
    match = _TIME.fullmatch(text)
    return float(match[1]) * _SECONDS[match[2]] if match else None


def is_glob(pattern: str) -> bool:
    """Return whether a text has a sign of globs."""
    return any(sign in pattern for sign in "*?[")


def name_test(pattern: str | None) -> Callable[[str], bool]:
    """Return the test of a name: a glob, or without `*`, `?` and `[` a text that it contains.

    `*` also matches dots.  A glob may also match the end of a name, after a dot or a colon.  None
    accepts every name.
    """
    if pattern is None:
        return lambda _: True
    if is_glob(pattern):
        return lambda name: any(fnmatch.fnmatchcase(name, p) for p in (pattern, f"*[.:]{pattern}"))
    return lambda name: pattern in name


def counted(number: int, noun: str) -> str:
    """Return `1 commit` or `2 commits`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def commit_name(step: int | None, commit_id: str) -> str:
    """Return `step 700 (7b0c4f3e)`, or the short id of a commit without a step."""
    return commit_id[:8] if step is None else f"step {step} ({commit_id[:8]})"


def nonfinite_values(count: int) -> str:
    """Return `3 values are NaN or infinite`."""
    return f"{'1 value is' if count == 1 else f'{count} values are'} NaN or infinite"


def from_number(value: float) -> float | str:
    """Return a number as JSON can represent it: NaN and infinities become strings."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def plain(text: str) -> str:
    """Return `text` on one line, with the same length."""
    if text.isprintable() and (text.isascii() or not UNSEEN.search(text)):
        return text
    return "".join(c if _is_visible(c) else "\ufffd" for c in text)


def _is_visible(character: str) -> bool:
    if not character.isprintable():
        return False
    return ord(character) in _VARIATION_SELECTORS or not UNSEEN.match(character)


def printable(text: str) -> str:
    """Return `text` on one line, with white space as single spaces."""
    return plain(" ".join(text.split()))


def plain_lines(text: str) -> list[str]:
    """Return the plain lines of a text whose line breaks are trusted, such as a traceback."""
    return [plain(line.replace("\t", " ")) for line in text.split("\n")]


class PlainLog(logging.Filter):
    """Make every log record plain, for all handlers."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            text = "".join(traceback.format_exception(*record.exc_info))
            record.exc_text = "\n".join(plain_lines(text.rstrip("\n")))
        return True


def tame_log() -> None:
    """Make all log records of this package plain."""
    logger = logging.getLogger("ckptvcs")
    if not any(isinstance(present, PlainLog) for present in logger.filters):
        logger.addFilter(PlainLog())
