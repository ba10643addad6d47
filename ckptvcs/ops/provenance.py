"""The provenance of a commit: the user, and the git commit of the training code.

This module never calls git.  git may run programs that the settings of a repository name, and the
working directory may belong to someone else.  The module reads these files instead:

    .git         the git folder, or a file with its path
    HEAD         a commit id, or the name of a ref
    REF          a commit id; in the git folder, or in the folder that worktrees share (commondir)
    packed-refs  other refs, one per line
"""

from __future__ import annotations

import getpass
import os
import re
import stat
from pathlib import Path

_MAX_LINE = 4096  # bytes read from a file of one line
_MAX_PACKED = 1 << 26  # bytes read from packed-refs
_MAX_HOPS = 5  # symbolic refs in a row
_ID = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})")
_REF = re.compile(r"refs/(?!.*(?:^|/)\.\.?(?:/|$))[^\0-\x20\x7f~^:?*\[\\]+")


def user() -> str:
    """Return the name of the user; "" if the system has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return ""


def code_commit() -> str | None:
    """Return the git commit of the working directory; None if it is not in a git repository."""
    try:
        folder = Path.cwd()
        for above in (folder, *folder.parents):
            if (above / ".git").exists():
                return _head(_git_folder(above / ".git"))
    except (OSError, ValueError):
        pass  # the files are not readable, or not those of git
    return None


def _read(path: Path, most: int) -> str:
    """Read at most `most` bytes of a regular file as text; raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    # O_NONBLOCK: if a pipe has replaced the file meanwhile, `open` would wait for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        return file.read(most).decode("utf-8", "surrogateescape")


def _git_folder(path: Path) -> Path:
    if path.is_dir():
        return path
    text = _read(path, _MAX_LINE)
    if not text.startswith("gitdir: "):
        raise ValueError
    return path.parent / text.removeprefix("gitdir: ").rstrip("\n")


def _head(folder: Path) -> str | None:
    shared = folder
    if (folder / "commondir").exists():
        shared = folder / _read(folder / "commondir", _MAX_LINE).rstrip("\n")
    name = "HEAD"
    for _ in range(_MAX_HOPS):
        text = _find(folder, shared, name).strip()
        if _ID.fullmatch(text):
            return text
        name = text.removeprefix("ref: ").strip()
        if not text.startswith("ref: ") or not _REF.fullmatch(name):
            return None
    return None


def _find(folder: Path, shared: Path, name: str) -> str:
    """Return the content of a ref; raises OSError."""
    for directory in dict.fromkeys((folder, shared)):
        try:
            return _read(directory / name, _MAX_LINE)
        except OSError:  # the ref may be in packed-refs
            continue
    for line in _read(shared / "packed-refs", _MAX_PACKED).splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return commit
    return ""
