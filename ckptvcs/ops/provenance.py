"""Where a commit comes from: who made it, and with which training code.

git is not called: it does what the settings of a repository say, and the working directory may be
somebody else's.  Its files are read, which is all that it takes:

    .git         the folder, or a file that says where it is
    HEAD         a commit, or the ref that is at one
    REF          a commit, in the folder or in that which worktrees share (commondir)
    packed-refs  the others, a line each
"""

from __future__ import annotations

import getpass
import os
import re
import stat
from pathlib import Path

_MAX_LINE = 4096  # bytes of a file with one line
_MAX_PACKED = 1 << 26  # bytes that are looked through for a ref
_MAX_HOPS = 5  # refs that lead to each other
_ID = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})")
_REF = re.compile(r"refs/(?!.*(?:^|/)\.\.?(?:/|$))[^\0-\x20\x7f~^:?*\[\\]+")


def user() -> str:
    """The name of the user, empty where nobody knows it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return ""


def code_commit() -> str | None:
    """The git commit of the code in the working directory, if there is one."""
    try:
        folder = Path.cwd()
        for above in (folder, *folder.parents):
            if (above / ".git").exists():
                return _head(_git_folder(above / ".git"))
    except (OSError, ValueError):
        pass  # there is none, or what is there is none of git's
    return None


def _read(path: Path, most: int) -> str:
    """A regular file as text.  Raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    # A pipe, should it be one by now, would wait for its writer.
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
    """What a ref says.  Raises OSError."""
    for place in dict.fromkeys((folder, shared)):
        try:
            return _read(place / name, _MAX_LINE)
        except OSError:  # it is packed
            continue
    for line in _read(shared / "packed-refs", _MAX_PACKED).splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return commit
    return ""
