"""Links: which symbolic links in a directory are followed, so that what they lead to is content.

    ROOT/file -> a file below ROOT                   by a way that only ROOT has here; by one that
                                                     every copy has, it stays a link
    A/snapshots/X/.../file -> A/blobs/HASH           the cache of the Hugging Face Hub
                           -> A/../blobs/AB/HASH     its store for all next to A, if it is marked

Only files are followed.  A directory may come from somebody else, with links to what nobody meant
to commit: whatever leads elsewhere stays a link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.checkpoint.notes import SUFFIXES
from ckptvcs.files.names import is_repository_name
from ckptvcs.text import size

_SHARED = ".huggingface-shared-blobs"  # a file that marks a store of the Hub as such
_MAX_HOPS = 40  # as many as Linux goes
_NAMED = 3  # links that a line names
# What is on the way to a file need not be readable.
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Target:
    """A regular file that a link leads to, and what it was when it was found."""

    path: Path
    status: os.stat_result


def within(name: str, target_of: Callable[[str], str | None]) -> str | None:
    """The path that a name leads to, if that lies below the same top, all the way; `target_of` says
    where a path leads to that is a link.
    """
    done: list[str] = []
    left = name.split("/")[::-1]
    hops = 0
    while left:
        part = left.pop()
        if part == ".." and not done:
            return None
        if part == "..":
            done.pop()
        elif part not in ("", "."):
            done.append(part)
            target = target_of("/".join(done))
            if target is not None:
                hops += 1
                if target.startswith("/") or hops > _MAX_HOPS:
                    return None
                done.pop()
                left += target.split("/")[::-1]
    return "/".join(done)


def follow(name: str, root: Path, skip: Path | None) -> Target | None:
    """Where a link in the directory `root` (a path without links) leads to, if it is followed."""
    try:
        real = Path(os.path.realpath(root / name, strict=True))
        if not _is_ours(real, root, skip) or _is_same_in_copies(name, real, root):
            return None
        status = _status(real)  # a directory on the way may have become a link
    except OSError:
        return None
    return Target(real, status) if stat.S_ISREG(status.st_mode) else None


def _is_same_in_copies(name: str, real: Path, root: Path) -> bool:
    """Whether a link leads to a file of the directory in every copy of it, too."""

    def target_of(path: str) -> str | None:
        return str((root / path).readlink()) if (root / path).is_symlink() else None

    found = within(name, target_of)
    return found is not None and root / found == real


def _is_ours(real: Path, root: Path, skip: Path | None) -> bool:
    if any(map(is_repository_name, real.parts)) or (skip and real.is_relative_to(skip)):
        return False
    return real.is_relative_to(root) or any(map(real.is_relative_to, _stores(root)))


def _stores(root: Path) -> Iterator[Path]:
    """The stores of blobs that stand beside the snapshots which `root` is one of, or holds."""
    for home in (root, *root.parents):
        snapshots = home / "snapshots"
        if root != home and not root.is_relative_to(snapshots):
            continue
        if root == home and not snapshots.is_dir():
            continue
        yield home / "blobs"
        if _is_regular(home.parent / "blobs" / _SHARED):
            yield home.parent / "blobs"


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _status(path: Path) -> os.stat_result:
    """What is at a path on which there is no link.  Raises OSError: there is one, or nothing."""
    at = os.open(path.anchor, _DIRECTORY)
    try:
        for part in path.parts[1:-1]:
            below = os.open(part, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        return os.stat(path.name, dir_fd=at, follow_symlinks=False)
    finally:
        os.close(at)


def notes(links: Sequence[str], root: Path, skip: Path | None) -> Iterator[str]:
    """A line for each kind of links, by their names in `root`, that hide content."""
    kinds: dict[str, list[str]] = {}
    missing = 0
    for name in links:
        path = root / name
        known = name.lower().endswith(SUFFIXES)
        try:
            real = Path(os.path.realpath(path, strict=True))
            status = real.stat()
        except OSError:
            if known:
                kinds.setdefault("leads nowhere", []).append(name)
            continue
        if stat.S_ISREG(status.st_mode):
            if _is_ours(real, root, skip):
                continue  # it leads to content
            missing += status.st_size
            kinds.setdefault(_OUT, []).append(name)
        elif stat.S_ISDIR(status.st_mode):
            if not real.is_relative_to(root):
                kinds.setdefault("leads to a directory elsewhere", []).append(name)
        elif known:
            kinds.setdefault("leads to no file", []).append(name)
    for kind, names in kinds.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        shown = ", ".join(names[:_NAMED]) + more
        one = len(names) == 1
        what = f"a link that {kind}" if one else f"links, each of which {kind}"
        cost = f"the {size(missing)} that it leads to" if kind == _OUT else "what it leads to"
        cost = cost if one else cost.replace(" it ", " they ").replace("leads", "lead")
        yield f"{shown}: {what}; stored as {'a link' if one else 'links'}, without {cost}"


_OUT = "leads out of the directory"
