"""Write the files of a commit into a user's folder.

A new directory is filled under a temporary name, so it appears complete or not at all. In an
existing directory, each file is replaced atomically, and files that are not in the commit stay.
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
"""The existing files and links at the paths of a commit, None where the path is free."""


def named_paths(commit: Commit, *, own: bool) -> list[str]:
    """Return the paths of a commit, with its `own` file or folder name if that is set."""
    if commit.source != "directory":
        return [commit.path] if own else []
    top = f"{commit.path}/" if own and commit.path != "." else ""
    return [f"{top}{file.path}" for file in commit.files]


def save_file(restorer: Restorer, target: Target, progress: Progress) -> str:
    """Write the only file of a commit; return its BLAKE3 hash (hex).

    Raises:
        ConflictError: the file changed after it was looked at.
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
    """Write the files of a directory; return the BLAKE3 hash (hex) of each.

    Raises:
        ConflictError: a file changed after it was looked at. Files before it are written.
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
    hashes = []
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
                hashes.append(restorer.write_whole(file, out, progress))
    _make_links(restorer.commit, place, looks)
    for file in reversed(restorer.commit.files):
        # Set modes and times of directories last: they must be writable until then.
        if file.skeleton is None and file.link is None:
            with place.inside(safe_path(file.path)) as folder:
                folder.finish(file.mode & 0o777 | 0o700, file.mtime_ns)
    return hashes


def _make_links(commit: Commit, place: Folder, looks: Looks) -> None:
    """Create links after all files, so that no file is written through a link."""
    for file in commit.files:
        if file.link is None:
            continue
        if not is_name(file.link):
            raise CorruptionError(f"{file.path} has an invalid link target")
        path = safe_path(file.path)
        with place.inside(path.parent, make=True) as parent:
            parent.link(path.name, file.link, looks.get(file.path))


def require_links(commit: Commit, looks: Looks, shown: Callable[[str], object]) -> None:
    """Raise ConflictError if a path of a link exists and is not a link."""
    for file in commit.files:
        seen = looks.get(file.path)
        if file.link is not None and seen is not None and not stat.S_ISLNK(seen.st_mode):
            raise ConflictError(
                f"{shown(file.path)} blocks a link: it exists and is not a link",
                hint="write elsewhere with -o, or overwrite it with --force",
            )
