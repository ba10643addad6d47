"""The git folder of a directory, and the commit that its HEAD names.

.git         the git folder, or a file with its path
HEAD         a commit id, or the name of a ref
REF          a commit id; in the git folder, or in the folder that worktrees share (commondir)
packed-refs  other refs, one per line
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.ops.git.objects import UnreadableError, read_file

_MAX_LINE = 4096  # bytes of a file of one line
_MAX_PACKED = 1 << 26  # bytes of packed-refs
_MAX_HOPS = 5  # symbolic refs in a row
_ID = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})")
_REF = re.compile(r"refs/(?!.*(?:^|/)\.\.?(?:/|$))[^\0-\x20\x7f~^:?*\[\\]+")


@dataclass(frozen=True)
class Clone:
    """A directory that git tracks.

    Attributes:
        worktree: The directory with the tracked files.
        folder: Its git folder, with HEAD and the index.
        shared: The git folder with the objects and most refs.
        commit: The id of the commit of HEAD.
        branch: The branch that HEAD follows; None if it is detached.
    """

    worktree: Path
    folder: Path
    shared: Path
    commit: str
    branch: str | None


def find_clone(start: Path) -> Clone | None:
    """Return the clone that contains a directory; None without one, or without a commit."""
    try:
        for above in (start, *start.parents):
            if (above / ".git").exists():
                return _clone(above)
    except (OSError, ValueError, UnreadableError):
        pass  # the files are not readable, or not those of git
    return None


def _clone(worktree: Path) -> Clone | None:
    folder = shared = _git_folder(worktree / ".git")
    if (folder / "commondir").exists():
        shared = folder / _text(folder / "commondir").rstrip("\n")
    name, branch = "HEAD", None
    for _ in range(_MAX_HOPS):
        text = _find(folder, shared, name).strip()
        if _ID.fullmatch(text):
            return Clone(worktree, folder, shared, text, branch)
        name = text.removeprefix("ref: ").strip()
        if not text.startswith("ref: ") or not _REF.fullmatch(name):
            return None
        branch = branch or name.removeprefix("refs/heads/")
    return None


def _text(path: Path, most: int = _MAX_LINE) -> str:
    return read_file(path, most).decode("utf-8", "surrogateescape")


def _git_folder(path: Path) -> Path:
    if path.is_dir():
        return path
    text = _text(path)
    if not text.startswith("gitdir: "):
        raise UnreadableError(f"{path} names no folder")
    return path.parent / text.removeprefix("gitdir: ").rstrip("\n")


def _find(folder: Path, shared: Path, name: str) -> str:
    """Return the content of a ref.  Raises UnreadableError."""
    for directory in dict.fromkeys((folder, shared)):
        try:
            return _text(directory / name)
        except UnreadableError:  # the ref may be in packed-refs
            continue
    for line in _text(shared / "packed-refs", _MAX_PACKED).splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return commit
    return ""
