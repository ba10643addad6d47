"""Targets: the output paths of the user, and the files that exist there before the work begins.

Decoding takes minutes.  So targets are looked at first, and `files/placing.py` compares afterwards.
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

_NAME_IT = "choose the output path with -o"


@dataclass(frozen=True)
class Target:
    """An output path: the lowest existing folder, the missing folders below it, and a name.

    An empty name stands for the folder itself.  `seen` is the status of the name at the look.
    """

    path: Path
    folder: Folder
    missing: PurePosixPath
    name: str
    seen: Seen | None

    @property
    def is_folder(self) -> bool:
        """Whether the target was an existing folder."""
        return self.seen is not None and stat.S_ISDIR(self.seen.st_mode)

    @contextmanager
    def parent(self) -> Iterator[Folder]:
        """Open the folder that contains the name, creating missing folders."""
        with self.folder.inside(self.missing, make=True) as parent:
            yield parent

    @contextmanager
    def existing(self) -> Iterator[Folder]:
        """Open the target, an existing folder."""
        with self.folder.inside(PurePosixPath(self.name)) as folder:
            yield folder

    @contextmanager
    def file(self, **how: Any) -> Iterator[BinaryIO]:
        """Write the target as a file, with the arguments of `Folder.file`.

        Raises:
            InvalidInputError: the target is a folder, or its path contains a link.
            StorageError: the file cannot be written.
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
    """Looks at targets, and holds their folders open until the end."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._known: dict[Path, tuple[Folder, PurePosixPath]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def look(self, path: Path) -> Target:
        """Look at a path that the user has given; links in it are followed now."""
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
        """Look at a path that should not exist.

        Raises:
            ConflictError: the path exists, and `force` is not set.
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
        """Look at a path that the user did not give, below `top`: it may not contain a link."""
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
    """Return the path of a target."""
    return target.path if isinstance(target, Target) else target


@contextmanager
def looked(target: Path | Target) -> Iterator[Target]:
    """Yield a target; look at a path now."""
    if isinstance(target, Target):
        yield target
        return
    with Targets() as targets:
        yield targets.look(target)


@contextmanager
def writing(path: Path, hint: str | None = None) -> Iterator[None]:
    """Translate system errors of writing a file; `hint` is for the case of a symbolic link.

    Raises:
        InvalidInputError: the path contains a symbolic link.
        StorageError: for other errors.
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
