"""Bytes as somebody else may have made them, and what reading them may cost."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ckptvcs.errors import CkptError

_EXTREMES = tuple(
    number & (1 << 64) - 1
    for bits in (0, 7, 8, 15, 16, 20, 28, 31, 32, 56, 63)
    for number in ((1 << bits) - 1, 1 << bits, -(1 << bits))
)
_HUGE = (1 << 31, 1 << 56, (1 << 63) - 1, 1 << 63, -1, -(1 << 63), 10**400)
_ROOM_BYTES = 600 << 20


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with bits flipped, pieces cut out, added, doubled or moved, and integers of any width
    set to extremes.
    """
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        match draw(st.integers(0, 6)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del data[at:]
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=20))
            case 3:
                data[end:end] = data[at:end]
            case 4:
                del data[at:end]
            case 5:
                piece = data[at:end]
                to = draw(st.integers(0, len(data)))
                data[to : to + len(piece)] = piece
            case 6:
                width = draw(st.sampled_from([1, 2, 4, 8]))
                extreme = draw(st.sampled_from(_EXTREMES)) & (1 << 8 * width) - 1
                data[at : at + width] = extreme.to_bytes(width, "little")
    return bytes(data)


any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(_HUGE)
    | st.floats()
    | st.sampled_from(["", "a" * 64, "0" * 63 + "\n", "\0", "\ud800", "..", "NaN", "x" * 5000])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@st.composite
def mutated_json(draw: st.DrawFn, good: Any) -> Any:
    """A JSON value with some of what it holds replaced, doubled or taken out."""
    if not isinstance(good, dict | list) or not good or draw(st.integers(0, 9)) == 0:
        return draw(any_json)
    copy: Any = good.copy()
    for _ in range(draw(st.integers(1, 2))):
        if not copy:
            break
        key = draw(st.sampled_from(list(copy) if isinstance(copy, dict) else range(len(copy))))
        match draw(st.integers(0, 4)):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, list):
                copy.append(copy[key])
            case _:
                copy[key] = draw(mutated_json(copy[key]))
    return copy


@contextlib.contextmanager
def little_room() -> Iterator[None]:
    """Let this process take no more than some hundred megabytes besides what it has."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_or_refuse(read: Callable[[], object]) -> None:
    """Read something in little room: it works, or there is an error that is documented."""
    with little_room(), contextlib.suppress(CkptError):
        read()
