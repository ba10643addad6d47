"""Cut long names of tensors in the middle, so that each can still be told from all others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice

GAP = "\u2026"
_LONGEST = 200  # characters of a name that is compared with others


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Return names of at most `width` characters.

    A gap stands for any text.  Of the cuts that only one of the names has, the first is used: one
    gap near the middle, else two gaps around one part between dots.
    """
    text = "\n".join(dict.fromkeys(name for name in names if len(name) <= _LONGEST))
    return [name if len(name) <= width else _shorten(name, width, text) for name in names]


def _shorten(name: str, width: int, text: str) -> str:
    cuts = [*_cuts(name, width)]
    if len(name) > _LONGEST:
        return cuts[0]
    return next((cut for cut in cuts if _names_one(cut, text)), cuts[0])


def _names_one(cut: str, text: str) -> bool:
    """Return whether a cut stands for only one line of a text."""
    pattern = ".*".join(map(re.escape, cut.split(GAP)))
    found = re.finditer(f"^{pattern}$", text, re.MULTILINE)
    return len([*islice(found, 2)]) == 1


def _cuts(name: str, width: int) -> Iterator[str]:
    """Yield the possible cuts of a name, the preferred one first."""
    room = max(1, width - len(GAP))
    dots = [match.end() for match in re.finditer(r"\.", name) if match.end() < room]
    for head in sorted(dots, key=lambda at: abs(at - room // 2)):
        yield name[:head] + GAP + name[len(name) - room + head :]
    yield from (name[:head] + GAP + name[len(name) - room + head :] for head in range(room))
    # Keep one part, such as the number of a layer, and the end.
    parts = name.split(".")[1:-1]
    for start in ("", name[:1], name[:3]):
        for part in sorted(parts, key=str.isdecimal, reverse=True):
            cut = f"{start}{GAP}.{part}.{GAP}"
            if width - len(cut) > 1:
                yield cut + name[len(cut) - width :]
