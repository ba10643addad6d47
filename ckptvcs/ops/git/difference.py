"""The difference of two versions of a text file, in the form that `git apply` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_CONTEXT = 3  # lines
_MAX_EDITS = 500  # removed and added lines; beyond them, the file is replaced as a whole
_MAX_LINES = 10_000  # of a changed part; beyond them, it is replaced as a whole
_BINARY = 8000  # bytes in which a zero shows that a file is binary, as in git

Block = tuple[int, int, int, int]
"""A changed block: its first line and the line after it, in the old and in the new file."""


def difference(name: str, old: bytes | None, new: bytes | None, mode: int) -> str:
    """Return the difference of a file.

    Args:
        name: The path of the file.
        old: The old content; None if the file is new.
        new: The new content; None if the file is deleted.
        mode: The mode, as git writes it.
    """
    left, right = _quoted(f"a/{name}"), _quoted(f"b/{name}")
    head = f"diff --git {left} {right}\n"
    if old is None:
        head, left = f"{head}new file mode {mode:o}\n", "/dev/null"
    elif new is None:
        head, right = f"{head}deleted file mode {mode:o}\n", "/dev/null"
    a, b = _lines(old or b""), _lines(new or b"")
    if a is None or b is None:
        return f"{head}Binary files {left} and {right} differ\n"
    hunks = "".join(_hunks(a, b))
    return f"{head}--- {left}\n+++ {right}\n{hunks}" if hunks else head


def _lines(data: bytes) -> list[str] | None:
    """Return the lines of a file with their ends; None if it is not text."""
    if b"\0" in data[:_BINARY]:
        return None
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return None
    last = lines.pop()
    return [f"{line}\n" for line in lines] + ([last] if last else [])


def _quoted(name: str) -> str:
    """Return a name as git quotes it."""
    if not any(character in '"\\' or not " " <= character <= "~" for character in name):
        return name
    escaped = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in name.encode("utf-8", "surrogateescape")
    )
    return f'"{"".join(escaped)}"'


def _hunks(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    """Yield the hunks: blocks with the lines around them."""
    group: list[Block] = []
    for block in _blocks(a, b):
        if group and block[0] - group[-1][1] > 2 * _CONTEXT:
            yield from _hunk(a, b, group)
            group = []
        group.append(block)
    if group:
        yield from _hunk(a, b, group)


def _hunk(a: Sequence[str], b: Sequence[str], group: list[Block]) -> Iterator[str]:
    start, end = max(0, group[0][0] - _CONTEXT), min(len(a), group[-1][1] + _CONTEXT)
    shift = group[0][2] - group[0][0]  # from old line numbers to new ones, before the hunk
    new_end = end + group[-1][3] - group[-1][1]
    yield f"@@ -{_span(start, end)} +{_span(start + shift, new_end)} @@\n"
    at = start
    for first, last, new_first, new_last in group:
        yield from (_line(" ", line) for line in a[at:first])
        yield from (_line("-", line) for line in a[first:last])
        yield from (_line("+", line) for line in b[new_first:new_last])
        at = last
    yield from (_line(" ", line) for line in a[at:end])


def _span(start: int, end: int) -> str:
    return f"{start + 1 if end > start else start},{end - start}"


def _line(sign: str, line: str) -> str:
    return (
        f"{sign}{line}" if line.endswith("\n") else f"{sign}{line}\n\\ No newline at end of file\n"
    )


def _blocks(a: Sequence[str], b: Sequence[str]) -> Iterator[Block]:
    """Yield the changed blocks, first to last."""
    start, most = 0, min(len(a), len(b))
    while start < most and a[start] == b[start]:
        start += 1
    end = 0
    while end < most - start and a[-1 - end] == b[-1 - end]:
        end += 1
    old, new = a[start : len(a) - end], b[start : len(b) - end]
    at = new_at = 0
    for x, y in (*_common(old, new), (len(old), len(new))):
        if x > at or y > new_at:
            yield start + at, start + x, start + new_at, start + y
        at, new_at = x + 1, y + 1


def _common(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of lines that both have in common, by Myers' algorithm.

    The list is empty if more than `_MAX_EDITS` lines differ, so that its time is bounded.
    """
    if len(a) + len(b) > _MAX_LINES:
        return []
    furthest = {1: 0}  # by diagonal: how far it is reached in `a`
    steps: list[dict[int, int]] = []
    for edits in range(min(len(a) + len(b), _MAX_EDITS) + 1):
        steps.append(furthest.copy())
        for k in range(-edits, edits + 1, 2):
            down = k == -edits or (k != edits and furthest[k - 1] < furthest[k + 1])
            x = furthest[k + 1] if down else furthest[k - 1] + 1
            while x < len(a) and x - k < len(b) and a[x] == b[x - k]:
                x += 1
            furthest[k] = x
            if x >= len(a) and x - k >= len(b):
                return _path(steps, len(a), len(b))
    return []


def _path(steps: Sequence[dict[int, int]], x: int, y: int) -> list[tuple[int, int]]:
    """Walk back from the end along the furthest points."""
    pairs: list[tuple[int, int]] = []
    for edits in range(len(steps) - 1, -1, -1):
        furthest, k = steps[edits], x - y
        down = k == -edits or (k != edits and furthest[k - 1] < furthest[k + 1])
        before = k + 1 if down else k - 1
        from_x = furthest[before] if edits else 0
        from_y = from_x - before if edits else 0
        while x > from_x and y > from_y:
            x, y = x - 1, y - 1
            pairs.append((x, y))
        x, y = from_x, from_y
    return pairs[::-1]
