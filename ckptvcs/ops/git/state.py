"""What the code of a training was: the commit, the changes since, and the new files."""

from __future__ import annotations

from ckptvcs.history.provenance import CodeState
from ckptvcs.ops.git.difference import difference
from ckptvcs.ops.git.head import Clone
from ckptvcs.ops.git.index import Entry, Index, read_index
from ckptvcs.ops.git.objects import Objects, UnreadableError
from ckptvcs.ops.git.worktree import (
    FILE,
    SUBMODULE,
    Clock,
    Side,
    TimeUpError,
    edited,
    is_sound,
    read_below,
    staged,
    untracked,
)

SECONDS = 3.0
"""The time that is spent on one state."""

_MAX_NAMES = 200  # changed files, untracked files
_MAX_DIFF = 1 << 18  # bytes
_MAX_FILE = 1 << 20  # bytes of a file in the diff


def read_code(clone: Clone, *, diff: bool, seconds: float = SECONDS) -> CodeState:
    """Return the state of a clone; what cannot be read, or not in time, is left out."""
    reading = _Reading(clone, Clock(seconds))
    reading.compare()
    text = reading.diff() if diff else None
    new = reading.untracked()
    changed = sorted(reading.changed)
    names = tuple(_name(path) for path in changed[:_MAX_NAMES])
    return CodeState(
        commit=clone.commit,
        branch=clone.branch,
        dirty=True if changed else (False if reading.is_compared else None),
        changed=names,
        untracked=new,
        diff=text,
        complete=reading.complete and len(names) == len(changed),
    )


class _Reading:
    def __init__(self, clone: Clone, clock: Clock) -> None:
        self._clone, self._clock = clone, clock
        self._objects = Objects(clone.shared, len(clone.commit) // 2)
        self._index: Index | None = None
        self.changed: dict[bytes, Side] = {}  # by path: what the commit has
        self.complete, self.is_compared = True, False

    def compare(self) -> None:
        """Find the changed files."""
        path = self._clone.folder / "index"
        try:
            made = path.stat().st_mtime_ns
            self._index = read_index(path, len(self._clone.commit) // 2)
            try:
                self.changed |= staged(self._index, self._objects, self._root(), self._clock)
                self.is_compared = True
            except UnreadableError:
                self.complete = False
            for entry in edited(self._clone.worktree, self._index, made, self._clock):
                self.changed.setdefault(entry.path, _side(entry))
        except (OSError, UnreadableError, TimeUpError):
            self.complete = self.is_compared = False

    def _root(self) -> bytes:
        """Return the id of the tree of the commit."""
        kind, content = self._objects.read(bytes.fromhex(self._clone.commit))
        name = content[len(b"tree ") :].partition(b"\n")[0]
        try:
            if kind == "commit" and content.startswith(b"tree "):
                return bytes.fromhex(name.decode("ascii"))
        except ValueError:
            pass
        raise UnreadableError("the commit is damaged")

    def diff(self) -> str:
        """Return the difference from the commit to the worktree, as long as it may be."""
        texts: list[str] = []
        size = 0
        try:
            for path, old in sorted(self.changed.items()):
                self._clock.check()
                text = self._diff_of(path, old)
                size += len(text.encode())
                if size > _MAX_DIFF:
                    size -= len(text.encode())
                    self.complete = False
                else:
                    texts.append(text)
        except TimeUpError:
            self.complete = False
        return "".join(texts)

    def _diff_of(self, path: bytes, side: Side) -> str:
        """Return the difference of one file; "" if there is none, or it cannot be read."""
        if not is_sound(path) or (side and side[0] == SUBMODULE):
            return ""
        try:
            found = read_below(self._clone.worktree, path)
            old = None if side is None else self._objects.read(side[1])[1]
        except UnreadableError:
            self.complete = False
            return ""
        new = None if found is None else found[1]
        if max(len(old or b""), len(new or b"")) > _MAX_FILE:
            self.complete = False
            return ""
        mode = found[0] if side is None and found else side[0] if side else FILE
        return "" if old == new else difference(_name(path), old, new, mode)

    def untracked(self) -> tuple[str, ...]:
        """Return the untracked files."""
        names: list[str] = []
        if self._index is None:
            return ()
        try:
            for name in untracked(
                self._clone.worktree, self._clone.shared, self._index, self._clock
            ):
                if len(names) == _MAX_NAMES:
                    self.complete = False
                    break
                names.append(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        except TimeUpError:
            self.complete = False
        return tuple(sorted(names))


def _side(entry: Entry) -> Side:
    return entry.mode, entry.id


def _name(path: bytes) -> str:
    return path.decode("utf-8", "replace")
