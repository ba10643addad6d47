"""Decide which symbolic links in a directory are replaced by the content of their target.

    ROOT/file -> a file below ROOT                   if the path of the link leaves ROOT, which a
                                                     copy would lack; otherwise it stays a link
    A/snapshots/X/.../file -> A/blobs/HASH           the cache of the Hugging Face Hub
                           -> A/../blobs/AB/HASH     its shared store beside A, if it has the mark

Only links to files are followed.  A foreign directory may have links to private files, so all other
links stay links.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.checkpoint.conventions import TENSOR_SUFFIXES
from ckptvcs.files.names import is_repository_name
from ckptvcs.text import size

_SHARED = ".huggingface-shared-blobs"  # the file that marks a shared store of the Hub
_MAX_HOPS = 40  # the limit of Linux
_NAMED = 3  # links named in a note
# The folders above a file need not be readable.
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Target:
    """The regular file that a link leads to, with its status at that time."""

    path: Path
    status: os.stat_result


def within(name: str, target_of: Callable[[str], str | None]) -> str | None:
    """Return the path that `name` leads to, or None if any link on the way leaves the top folder.

    `target_of` returns the target of a path that is a link, and None for any other path.
    """
    done: list[str] = []
    pending = name.split("/")[::-1]
    hops = 0
    while pending:
        part = pending.pop()
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
                pending += target.split("/")[::-1]
    return "/".join(done)


def follow(name: str, root: Path, skip: Path | None) -> Target | None:
    """Return the target of a link in `root` (a path without links); None if it stays a link."""
    try:
        real = Path(os.path.realpath(root / name, strict=True))
        if not _is_ours(real, root, skip) or _is_same_in_copies(name, real, root):
            return None
        status = _status(real)  # a directory on the way may have become a link
    except OSError:
        return None
    return Target(real, status) if stat.S_ISREG(status.st_mode) else None


def _is_same_in_copies(name: str, real: Path, root: Path) -> bool:
    """Return whether the link leads to the same file in every copy of the directory."""

    def target_of(path: str) -> str | None:
        return str((root / path).readlink()) if (root / path).is_symlink() else None

    target = within(name, target_of)
    return target is not None and root / target == real


def _is_ours(real: Path, root: Path, skip: Path | None) -> bool:
    if any(map(is_repository_name, real.parts)) or (skip and real.is_relative_to(skip)):
        return False
    return real.is_relative_to(root) or any(map(real.is_relative_to, _stores(root)))


def _stores(root: Path) -> Iterator[Path]:
    """Yield the blob stores beside the snapshots that contain `root`, or that `root` contains."""
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
    """Return the status of a path.  Raises OSError if it is missing or contains a link."""
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
    """Yield a note for each kind of links (names in `root`) whose content is not stored."""
    kinds: dict[str, list[str]] = {}
    missing = 0
    for name in links:
        path = root / name
        is_checkpoint = name.lower().endswith(TENSOR_SUFFIXES)
        try:
            real = Path(os.path.realpath(path, strict=True))
            status = real.stat()
        except OSError:
            if is_checkpoint:
                kinds.setdefault("leads nowhere", []).append(name)
            continue
        if stat.S_ISREG(status.st_mode):
            if _is_ours(real, root, skip):
                continue  # its content is stored
            missing += status.st_size
            kinds.setdefault(_OUT, []).append(name)
        elif stat.S_ISDIR(status.st_mode):
            if not real.is_relative_to(root):
                kinds.setdefault("leads to a directory elsewhere", []).append(name)
        elif is_checkpoint:
            kinds.setdefault("leads to no file", []).append(name)
    for kind, names in kinds.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        shown = ", ".join(names[:_NAMED]) + more
        what, its = ("a link that", "its") if len(names) == 1 else ("links, each of which", "their")
        cost = f" ({size(missing)})" if kind == _OUT else ""
        yield f"{shown}: {what} {kind}; stored without {its} content{cost}"


_OUT = "leads out of the directory"
