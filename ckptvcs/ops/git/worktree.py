"""The files of a worktree, beside the index and a commit."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from ckptvcs.ops.git.ignore import Ignored
from ckptvcs.ops.git.index import Entry, Index
from ckptvcs.ops.git.objects import MAX_BYTES, Objects, UnreadableError, tree

SUBMODULE, LINK, FOLDER = 0o160000, 0o120000, 0o040000
FILE, EXECUTABLE = 0o100644, 0o100755
_MAX_DEPTH = 64  # folders inside each other
_MAX_MEMORY = 1 << 27  # bytes of the files of a tree
_ENTRY = 256  # bytes that a file takes beside its path
_OURS = {".git", ".ckpt"}

Side = tuple[int, bytes] | None
"""The mode and the id of a file of the commit; None if the commit lacks it."""


class TimeUpError(Exception):
    """The time for reading a worktree has passed."""


class Clock:
    """A limit of time, which a slow file system or a huge tree would otherwise exceed."""

    def __init__(self, seconds: float) -> None:
        self._end = monotonic() + seconds

    def check(self) -> None:
        """Raise TimeUpError after the end."""
        if monotonic() > self._end:
            raise TimeUpError


def staged(
    index: Index, objects: Objects, root: bytes, clock: Clock
) -> Iterator[tuple[bytes, Side]]:
    """Yield the paths that differ between the commit and the index, as the commit has them.

    Raises:
        UnreadableError: An object is missing.
        TimeUpError: The time has passed.
    """
    if index.trees.get(b"") == root:
        return
    held, same = _committed(index, objects, root, clock)
    before = b""
    for entry in index.entries:
        if entry.conflict and entry.path == before:
            continue  # the version of another side of the merge
        before = entry.path
        old = held.pop(entry.path, None)
        if old is None:
            clock.check()
            if _is_inside(entry.path, same):
                continue
        if entry.conflict or old is None or (old[1], old[0] >> 12) != (entry.id, entry.mode >> 12):
            yield entry.path, old
    yield from held.items()


def _committed(
    index: Index, objects: Objects, root: bytes, clock: Clock
) -> tuple[dict[bytes, Side], set[bytes]]:
    """Return the files of a tree, except those of the folders that are the same in the index.

    The set has these folders.
    """
    held: dict[bytes, Side] = {}
    same: set[bytes] = set()
    stack, size = [(b"", root, 0)], 0
    while stack:
        clock.check()
        folder, name, depth = stack.pop()
        if index.trees.get(folder) == name:
            same.add(folder)
            continue
        kind, content = objects.read(name)
        if kind != "tree" or depth > _MAX_DEPTH:
            raise UnreadableError("a tree is damaged")
        for part, mode, below in tree(content, len(name)):
            path = folder + b"/" + part if folder else part
            size += len(path) + _ENTRY
            if size > _MAX_MEMORY:
                raise UnreadableError("a tree has too many files")
            if mode == FOLDER:
                stack.append((path, below, depth + 1))
            else:
                held[path] = mode, below
    return held, same


def _is_inside(path: bytes, folders: set[bytes]) -> bool:
    return any(path[:at] in folders for at, byte in enumerate(path) if byte == ord("/"))


def edited(worktree: Path, index: Index, made_ns: int, clock: Clock) -> Iterator[Entry]:
    """Yield the tracked files that the worktree has otherwise than the index, or not at all.

    `made_ns` is the time of the index: later changes may leave no other trace.
    Raises TimeUpError.
    """
    above = os.fsencode(worktree) + b"/"
    made = divmod(made_ns, 1_000_000_000)
    for number, entry in enumerate(index.entries):
        if number % 64 == 0:
            clock.check()
        if entry.settled or entry.conflict or entry.mode == SUBMODULE or not is_sound(entry.path):
            continue
        try:
            status = os.lstat(above + entry.path)
        except (OSError, ValueError):
            yield entry
            continue
        if _is_untouched(entry, status, made):
            continue
        clock.check()
        if not _is_equal(worktree, entry, status):
            yield entry


def is_sound(path: bytes) -> bool:
    """Return whether a path of the index stays below the worktree."""
    return not {b"", b".", b".."}.intersection(path.split(b"/"))


def _is_untouched(entry: Entry, status: os.stat_result, made: tuple[int, int]) -> bool:
    seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode) or (seconds, nanoseconds) >= made:
        return False
    # Some file systems and programs keep no nanoseconds.
    fine = nanoseconds == entry.mtime[1] or not nanoseconds or not entry.mtime[1]
    return fine and seconds == entry.mtime[0] and status.st_size & 0xFFFFFFFF == entry.size


def _is_equal(worktree: Path, entry: Entry, status: os.stat_result) -> bool:
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode) or status.st_size > MAX_BYTES:
        return False
    try:
        found = read_below(worktree, entry.path)
    except UnreadableError:
        return False
    # git may convert the ends of lines.
    forms = [] if found is None else [found[1], found[1].replace(b"\r\n", b"\n")]
    return entry.id in [blob_id(form, len(entry.id)) for form in forms]


def blob_id(data: bytes, id_bytes: int) -> bytes:
    """Return the id that git gives a file with this content."""
    head = b"blob %d\0" % len(data)
    if id_bytes == hashlib.sha256().digest_size:
        return hashlib.sha256(head + data).digest()
    return hashlib.sha1(head + data, usedforsecurity=False).digest()


def read_below(worktree: Path, path: bytes) -> tuple[int, bytes] | None:
    """Return the mode and the content of a file, or the target of a link; None without either.

    No link is followed: it could lead to a file of the user that is none of the worktree.

    Raises:
        UnreadableError: The file is too large, or not readable.
    """
    *folders, name = path.split(b"/")
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        at = os.open(worktree, flags | os.O_DIRECTORY)
        try:
            for part in folders:
                inner = os.open(part, flags | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = inner
            status = os.stat(name, dir_fd=at, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                return LINK, os.readlink(name, dir_fd=at)
            if not stat.S_ISREG(status.st_mode):
                return None
            if status.st_size > MAX_BYTES:
                raise UnreadableError("a tracked file is too large")
            number = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
            with os.fdopen(number, "rb") as file:
                mode = EXECUTABLE if status.st_mode & stat.S_IXUSR else FILE
                return mode, file.read(MAX_BYTES)
        finally:
            os.close(at)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise UnreadableError(str(error)) from error
    except ValueError as error:
        raise UnreadableError(str(error)) from error


def untracked(worktree: Path, git: Path, index: Index, clock: Clock) -> Iterator[str]:
    """Yield the untracked files, except ignored ones; a folder of such files counts as one.

    Raises TimeUpError.
    """
    files = {os.fsdecode(entry.path): entry.mode for entry in index.entries}
    folders: set[str] = set()
    for file in files:
        above = file.rpartition("/")[0]
        while above and above not in folders:
            folders.add(above)
            above = above.rpartition("/")[0]
    rules = Ignored().below(git / "info" / "exclude", 0)
    stack: list[tuple[tuple[str, ...], Ignored]] = [((), rules)]
    while stack:
        parts, rules = stack.pop()
        rules = rules.below(worktree.joinpath(*parts, ".gitignore"), len(parts))
        for name, is_folder in _listed(worktree.joinpath(*parts), clock):
            clock.check()
            inner = (*parts, name)
            path = "/".join(inner)
            if path in files and (not is_folder or files[path] == SUBMODULE):
                continue
            if rules.covers(inner, is_folder=is_folder):
                continue
            if path in folders and is_folder:
                stack.append((inner, rules))
            elif not is_folder:
                yield path
            elif _holds_files(worktree, inner, rules, clock):
                yield f"{path}/"


def _listed(folder: Path, clock: Clock) -> list[tuple[str, bool]]:
    """Return the names in a folder, sorted, and whether each is a folder."""
    clock.check()
    try:
        with os.scandir(folder) as entries:
            rows = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError:
        return []
    return sorted(row for row in rows if row[0] not in _OURS)


def _holds_files(worktree: Path, parts: tuple[str, ...], rules: Ignored, clock: Clock) -> bool:
    """Return whether a folder contains a file that is not ignored."""
    stack = [(parts, rules)]
    while stack:
        parts, rules = stack.pop()
        if len(parts) > _MAX_DEPTH:
            continue
        rules = rules.below(worktree.joinpath(*parts, ".gitignore"), len(parts))
        for name, is_folder in _listed(worktree.joinpath(*parts), clock):
            clock.check()
            inner = (*parts, name)
            if rules.covers(inner, is_folder=is_folder):
                continue
            if not is_folder:
                return True
            stack.append((inner, rules))
    return False
