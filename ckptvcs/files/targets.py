"""Targets: where the user wants something to be written, and what is there before it is made.

What is written takes minutes to decode.  The look comes before, `files/placing.py` compares after.
"""

from __future__ import annotations

import contextlib
import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.files.placing import Folder, Seen
from ckptvcs.store.disk import storage_error

_NAME_IT = "name the place yourself, with -o"


@dataclass(frozen=True)
class Target:
    """Where something is to be written: the lowest folder that there is, the folders that are to be
    made in it, a name (none: the folder itself), and what had the name at the look.
    """

    path: Path
    folder: Folder
    missing: PurePosixPath
    name: str
    seen: Seen | None

    @property
    def is_folder(self) -> bool:
        """Whether a folder was there."""
        return self.seen is not None and stat.S_ISDIR(self.seen.st_mode)

    @contextmanager
    def parent(self) -> Iterator[Folder]:
        """The folder that the name is in, made where it was missing."""
        with self.folder.inside(self.missing, make=True) as parent:
            yield parent

    @contextmanager
    def existing(self) -> Iterator[Folder]:
        """The folder that was there."""
        way = PurePosixPath(self.name) if self.name else PurePosixPath()
        with self.folder.inside(way) as found:
            yield found

    @contextmanager
    def file(self, **how: Any) -> Iterator[BinaryIO]:
        """A file to be written, as by `Folder.file`.

        Raises:
            InvalidInputError: a folder has the name, or a link is on the way.
            StorageError: it cannot be written.
        """
        if self.is_folder:
            raise InvalidInputError(
                f"{self.path} is a directory", hint="name the file to write: -o PATH"
            )
        with (
            writing(self.path),
            self.parent() as parent,
            parent.file(self.name, self.seen, **how) as out,
        ):
            yield out


class Targets:
    """Looks, each at what has a name now; the folders are held open until the end."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._known: dict[Path, tuple[Folder, PurePosixPath]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def look(self, path: Path) -> Target:
        """A path as the user has named it: links on the way are followed, now."""
        with writing(path):
            if path.name in ("", ".."):
                folder = self._open.enter_context(Folder.open(path))
                return Target(path, folder, PurePosixPath(), "", folder.status())
            if path.parent not in self._known:
                self._known[path.parent] = self._lowest(path.parent)
            folder, missing = self._known[path.parent]
            seen = None if missing.parts else folder.look(path.name)
            return Target(path, folder, missing, path.name, seen)

    def free(self, path: Path, *, force: bool) -> Target:
        """The same, where nothing is in the way.

        Raises:
            ConflictError: there is something, and `force` is not given.
        """
        target = self.look(path)
        if target.seen is not None and not force:
            raise ConflictError(f"{path} exists", hint="overwrite it with --force")
        return target

    def _lowest(self, path: Path) -> tuple[Folder, PurePosixPath]:
        missing: list[str] = []
        while True:
            try:
                folder = self._open.enter_context(Folder.open(path))
                return folder, PurePosixPath(*reversed(missing))
            except FileNotFoundError:
                if path.name in ("", "..") or path.is_symlink():
                    raise
            missing.append(path.name)
            path = path.parent

    def below(self, top: Path, way: PurePosixPath) -> Target:
        """A way down from a folder that the user did not name: no step of it may be a link."""
        with writing(top / way, _NAME_IT):
            folder, parts = Folder.open(top), list(way.parts)
            try:
                while len(parts) > 1 and folder.look(parts[0]) is not None:
                    below = folder.enter(parts.pop(0))
                    folder.close()
                    folder = below
            finally:
                self._open.enter_context(folder)
            if not parts:
                return Target(top, folder, way, "", folder.status())
            missing, name = PurePosixPath(*parts[:-1]), parts[-1]
            seen = None if missing.parts else folder.look(name)
            return Target(top / way, folder, missing, name, seen)


def named(target: Path | Target) -> Path:
    """What a target is called."""
    return target.path if isinstance(target, Target) else target


@contextmanager
def looked(target: Path | Target) -> Iterator[Target]:
    """A target, looked at now where that was not done before."""
    if isinstance(target, Target):
        yield target
        return
    with Targets() as targets:
        yield targets.look(target)


@contextmanager
def writing(path: Path, hint: str | None = None) -> Iterator[None]:
    """What the user is told when the operating system refuses; the hint is for a link.

    Raises:
        InvalidInputError: a symbolic link is on the way.
        StorageError: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            shown = error.filename or path
            raise InvalidInputError(
                f"{shown} is a symbolic link; not writing through it", hint=hint
            ) from error
        raise storage_error(error, f"write {path}") from error
