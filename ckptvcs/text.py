"""Text for people: sizes in bytes, and text of others made plain so that it can be shown.

A name, a message, an error may hold sequences that drive a terminal, or marks that turn the order
of letters around.  What would not be seen as itself is seen as U+FFFD.
"""

from __future__ import annotations

import logging
import math
import re
import traceback

UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""Letters and marks that are shown as nothing, besides those of the category of formats."""

_VARIANTS = range(0xFE00, 0xFE10)  # of signs such as emoji, which have one as a rule


def size(count: float) -> str:
    """A number of bytes in three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def from_number(value: float) -> float | str:
    """A number as JSON can hold it: what is not finite becomes its name."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def plain(text: str) -> str:
    """`text` on one line, as long as it was."""
    if text.isprintable() and (text.isascii() or not UNSEEN.search(text)):
        return text
    return "".join(c if _is_seen(c) else "\ufffd" for c in text)


def _is_seen(character: str) -> bool:
    if not character.isprintable():
        return False
    return ord(character) in _VARIANTS or not UNSEEN.match(character)


def printable(text: str) -> str:
    """`text` on one line, its white space as single spaces."""
    return plain(" ".join(text.split()))


def plain_lines(text: str) -> list[str]:
    """The lines of a text whose line breaks are ours, a traceback, say."""
    return [plain(line.replace("\t", " ")) for line in text.split("\n")]


class PlainLog(logging.Filter):
    """Makes what is logged plain, whoever logged it and wherever it goes."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            text = "".join(traceback.format_exception(*record.exc_info))
            record.exc_text = "\n".join(plain_lines(text.rstrip("\n")))
        return True


def tame_log() -> None:
    """Have all that this package logs made plain."""
    logger = logging.getLogger("ckptvcs")
    if not any(isinstance(found, PlainLog) for found in logger.filters):
        logger.addFilter(PlainLog())
