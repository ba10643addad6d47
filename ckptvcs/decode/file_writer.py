"""Write the files of a commit into a user's folder.

A directory that does not exist yet is filled under a temporary name, and is there whole or not at
all.  In one that exists each file is; what is there and not in the commit stays.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping

from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import ConflictError, CorruptionError, InvalidInputError
from ckptvcs.files.names import is_name, safe_path
from ckptvcs.files.placing import Folder, Seen
from ckptvcs.files.targets import Target, writing
from ckptvcs.history.commit import Commit
from ckptvcs.parallel import Progress

Looks = Mapping[str, Seen | None]
"""What was found where the files and links of a directory belong, by their paths."""


def named_paths(commit: Commit, *, own: bool) -> list[str]:
    """The paths that a commit names: of a file only where it gets its `own` one."""
    if commit.source != "directory":
        return [commit.path] if own else []
    top = f"{commit.path}/" if own and commit.path != "." else ""
    return [f"{top}{file.path}" for file in commit.files]


def save_file(restorer: Restorer, target: Target, progress: Progress) -> str:
    """Write the file of a commit that has one; the BLAKE3 of its bytes.

    Raises:
        ConflictError: the file has changed since the look.
    """
    file = next(file for file in restorer.commit.files if file.skeleton is not None)
    with target.file(mode=file.mode & 0o777, mtime_ns=file.mtime_ns) as out:
        return restorer.write_whole(file, out, progress)


def look_at_files(commit: Commit, target: Target) -> dict[str, Seen | None]:
    """Return the existing files and links at the paths of the commit."""
    looks: dict[str, Seen | None] = {}
    if not target.is_folder:
        return looks
    with writing(target.path), target.existing() as place:
        for file in commit.files:
            if file.skeleton is None and file.link is None:
                continue
            path = safe_path(file.path)
            try:
                with place.inside(path.parent) as parent:
                    looks[file.path] = parent.look(path.name)
            except FileNotFoundError:
                looks[file.path] = None
    return looks


def save_directory(
    restorer: Restorer, target: Target, looks: Looks, progress: Progress
) -> list[str]:
    """Write the files of a directory; the BLAKE3 of each.

    Raises:
        ConflictError: a file is not what was there at the look; those before it are written.
    """
    if target.is_folder:
        with writing(target.path), target.existing() as place:
            return _fill(restorer, place, looks, progress)
    if target.seen is not None:
        if stat.S_ISLNK(target.seen.st_mode):
            raise InvalidInputError(
                f"{target.path} is a symbolic link; not writing through it",
                hint="name the folder that it leads to, with -o",
            )
        raise InvalidInputError(f"{target.path} is a file, the commit is a directory")
    with writing(target.path), target.parent() as parent, parent.tree(target.name) as place:
        return _fill(restorer, place, {}, progress)


def _fill(restorer: Restorer, place: Folder, looks: Looks, progress: Progress) -> list[str]:
    found = []
    for file in restorer.commit.files:
        path = safe_path(file.path)
        if file.skeleton is None and file.link is not None:
            continue
        with place.inside(path.parent, make=True) as parent:
            if file.skeleton is None:
                parent.enter(path.name, make=True).close()
                continue
            seen, mode = looks.get(file.path), file.mode & 0o777
            with parent.file(path.name, seen, mode=mode, mtime_ns=file.mtime_ns) as out:
                found.append(restorer.write_whole(file, out, progress))
    _make_links(restorer.commit, place, looks)
    for file in reversed(restorer.commit.files):
        # Directories get their modes and times last: until then they must take files.
        if file.skeleton is None and file.link is None:
            with place.inside(safe_path(file.path)) as folder:
                folder.finish(file.mode & 0o777 | 0o700, file.mtime_ns)
    return found


def _make_links(commit: Commit, place: Folder, looks: Looks) -> None:
    """Links come last, so that no file is written through one."""
    for file in commit.files:
        if file.link is None:
            continue
        if not is_name(file.link):
            raise CorruptionError(f"{file.path} has an invalid link target")
        path = safe_path(file.path)
        with place.inside(path.parent, make=True) as parent:
            parent.link(path.name, file.link, looks.get(file.path))


def require_links(commit: Commit, looks: Looks, shown: Callable[[str], object]) -> None:
    """Raises ConflictError where something else than a link is in the way of one."""
    for file in commit.files:
        seen = looks.get(file.path)
        if file.link is not None and seen is not None and not stat.S_ISLNK(seen.st_mode):
            raise ConflictError(
                f"{shown(file.path)} blocks a link: it exists and is not a link",
                hint="write elsewhere with -o, or overwrite it with --force",
            )
