"""Write user files atomically into folders that other programs may change at the same time.

    look     which file has the name now, if any
    write    to a temporary name (.ckpt-HEX) in the same folder
    place    give the new file the name, if that is still free or still has the same file

A folder is held open.  Names below it are looked up in the open folder, never through a symbolic
link.  So a program that moves or links folders meanwhile cannot redirect a write.

A rename that replaces nothing takes a free name.  To replace a file, the two names are exchanged.
Then the old file is deleted if it is the file that `look` saw; otherwise it is put back.  After a
crash in between, one of the two files has the temporary name.  If the file system cannot exchange
names, a change between the last look and the rename is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self

from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.store.renaming import CANNOT, EXCHANGE, FREE_ONLY, rename

Seen = os.stat_result
"""The status of a file at a look."""

LINK_ERRORS = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)
"""The errors of opening a folder whose name belongs to a symbolic link."""

# O_PATH also opens a folder that the user may not list.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_TRIES = 2  # to delete temporary files: the system may refuse once
_NO_LINKS = (*CANNOT, errno.EPERM, errno.EMLINK)


def lasting(status: Seen | None) -> tuple[int, ...] | None:
    """Return the properties of a file that a change alters but a rename does not."""
    if status is None:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode


def _same(now: Seen | None, seen: Seen) -> bool:
    """Return whether a file is unchanged since a look."""
    if now is None:
        return False
    # Deleting another name of a file changes its ctime.
    same_ctime = seen.st_nlink > 1 or now.st_ctime_ns == seen.st_ctime_ns
    return lasting(now) == lasting(seen) and same_ctime


class NotRegularError(OSError):
    """The name belongs to a pipe, a device or a folder."""


class Folder:
    """An open folder; `path` is its path at the time of opening."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._at, self.path = descriptor, path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a folder at a path that the user has given, following links.

        Raises:
            OSError: the folder does not exist or cannot be opened.
        """
        return cls(os.open(path, _FOLDER), path)

    def close(self) -> None:
        os.close(self._at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, name: str, *, make: bool = False) -> Folder:
        """Open a folder in this one, not through a link; with `make`, create it if missing.

        Raises:
            OSError: the name is a link (LINK_ERRORS), or the folder cannot be opened.
        """
        path = self.path / name
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self._at)
        try:
            return Folder(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self._at), path)
        except OSError as error:
            seen = None
            with contextlib.suppress(OSError):
                seen = self.look(name)
            is_link = seen is not None and stat.S_ISLNK(seen.st_mode)
            code = errno.ELOOP if is_link else error.errno or errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error

    @contextmanager
    def inside(self, way: PurePosixPath, *, make: bool = False) -> Iterator[Folder]:
        """Open the folder at a relative path below this one, through no link."""
        if way.is_absolute() or ".." in way.parts:
            raise InvalidInputError(f"{way} is not below {self.path}")
        at = Folder(os.dup(self._at), self.path)
        try:
            for name in way.parts:
                below = at.enter(name, make=make)
                at.close()
                at = below
            yield at
        finally:
            at.close()

    # -- looking -----------------------------------------------------------------------------------

    def look(self, name: str) -> Seen | None:
        """Return the status of a name, without following a link."""
        try:
            return os.stat(name, dir_fd=self._at, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def status(self) -> Seen:
        """Return the status of this folder."""
        return os.fstat(self._at)

    def open_file(self, name: str, *, follow: bool = False) -> BinaryIO:
        """Open a regular file for reading.

        Raises:
            NotRegularError: the name belongs to something else.
            OSError: the file cannot be opened, or is a link and `follow` is False.
        """
        # O_NONBLOCK: opening a pipe would wait for its writer.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        file = os.open(name, flags, dir_fd=self._at)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise NotRegularError(errno.EINVAL, "not a regular file", name)
        return os.fdopen(file, "rb", buffering=0)

    # -- writing -----------------------------------------------------------------------------------

    @contextmanager
    def file(
        self, name: str, seen: Seen | None, *, mode: int | None = None, mtime_ns: int = 0
    ) -> Iterator[BinaryIO]:
        """Write a new file, which gets its name when the block ends without an error.

        Raises:
            ConflictError: the file of that name is not the one `seen`; it stays.
        """
        with self._temporary() as temporary:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary.name, flags, 0o666, dir_fd=self._at)
            temporary.is_new = True
            with os.fdopen(descriptor, "w+b") as out:
                temporary.own, temporary.is_new = os.fstat(descriptor), False
                yield out
                out.flush()
                if mode is not None:
                    os.fchmod(descriptor, mode)
                if mtime_ns:
                    os.utime(descriptor, ns=(mtime_ns, mtime_ns))
                temporary.own = os.fstat(descriptor)
            self._place(temporary, name, seen)

    def link(self, name: str, text: str, seen: Seen | None) -> None:
        """Create a symbolic link.  Raises ConflictError as `file` does."""
        with self._temporary() as temporary:
            os.symlink(text, temporary.name, dir_fd=self._at)
            temporary.is_new = True
            temporary.own, temporary.is_new = self.look(temporary.name), False
            self._place(temporary, name, seen)

    @contextmanager
    def tree(self, name: str) -> Iterator[Folder]:
        """Fill a new folder, which gets its name at the end.  Raises ConflictError if it exists."""
        temporary = _temporary_name()
        os.mkdir(temporary, dir_fd=self._at)
        try:
            with self.enter(temporary) as place:
                yield Folder(place._at, self.path / name)
            try:
                if not rename(self._at, temporary, name, FREE_ONLY):
                    # This rename can only replace an empty folder.
                    os.rename(temporary, name, src_dir_fd=self._at, dst_dir_fd=self._at)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise self._came(name) from error
        finally:
            for _ in range(_TRIES):
                shutil.rmtree(temporary, ignore_errors=True, dir_fd=self._at)

    def remove(self, name: str, seen: Seen) -> bool:
        """Delete a file if it is the one `seen`; return whether it was.

        It is renamed first, so that a program that saves it at this moment loses nothing.
        """
        if lasting(self.look(name)) != lasting(seen):
            return False
        with self._temporary() as temporary:
            try:
                os.rename(name, temporary.name, src_dir_fd=self._at, dst_dir_fd=self._at)
            except FileNotFoundError:
                return False
            try:
                is_seen = lasting(self.look(temporary.name)) == lasting(seen)
            except OSError:
                self._put_back(temporary, name)
                raise
            if is_seen:
                temporary.own = seen
            else:
                self._put_back(temporary, name)
            return is_seen

    def rmdir(self, name: str) -> None:
        """Delete an empty folder.  Raises OSError."""
        os.rmdir(name, dir_fd=self._at)

    def finish(self, mode: int, mtime_ns: int) -> None:
        """Set mode and time of the folder, after its content is complete."""
        os.chmod(".", mode, dir_fd=self._at)
        os.utime(".", ns=(mtime_ns, mtime_ns), dir_fd=self._at)

    @contextmanager
    def _temporary(self) -> Iterator[_Temporary]:
        """Yield a temporary name; delete its file at the end if that file is ours."""
        temporary = _Temporary(_temporary_name())
        try:
            yield temporary
        finally:
            for _ in range(_TRIES):
                with contextlib.suppress(OSError):
                    self._clear(temporary)
                    break

    def _clear(self, temporary: _Temporary) -> None:
        now, own = self.look(temporary.name), temporary.own
        if now is None:
            return
        if temporary.is_new or (own and (now.st_dev, now.st_ino) == (own.st_dev, own.st_ino)):
            os.unlink(temporary.name, dir_fd=self._at)

    def _place(self, temporary: _Temporary, name: str, seen: Seen | None) -> None:
        if lasting(self.look(temporary.name)) != lasting(temporary.own):
            raise ConflictError(f"another program changed {self.path / temporary.name}")
        if seen is None:
            try:
                self._take(temporary.name, name)
            except FileExistsError as error:
                raise self._came(name) from error
        else:
            self._replace(temporary, name, seen)

    def _take(self, temporary: str, name: str) -> None:
        """Rename a file to a free name.  Raises FileExistsError."""
        if rename(self._at, temporary, name, FREE_ONLY):
            return
        try:
            os.link(
                temporary, name, src_dir_fd=self._at, dst_dir_fd=self._at, follow_symlinks=False
            )
            return
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LINKS:
                raise
        # Claim the name with an empty file, then replace that file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        claim = os.open(name, flags, 0o600, dir_fd=self._at)
        try:
            claimed = os.fstat(claim)
        finally:
            os.close(claim)
        if claimed.st_size or lasting(self.look(name)) != lasting(claimed):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        os.replace(temporary, name, src_dir_fd=self._at, dst_dir_fd=self._at)

    def _replace(self, temporary: _Temporary, name: str, seen: Seen) -> None:
        """Replace the file that was `seen`, if it still has the name."""
        if stat.S_ISDIR(seen.st_mode) or not _same(self.look(name), seen):
            raise self._changed(name)
        try:
            if not rename(self._at, temporary.name, name, EXCHANGE):
                os.replace(temporary.name, name, src_dir_fd=self._at, dst_dir_fd=self._at)
                return
        except FileNotFoundError as error:
            raise self._changed(name) from error
        own, temporary.own = temporary.own, None
        try:
            is_seen = lasting(self.look(temporary.name)) == lasting(seen)
        except OSError:
            rename(self._at, temporary.name, name, EXCHANGE)
            temporary.own = own
            raise
        if is_seen:
            temporary.own = seen
            return
        try:  # another program saved it at this moment: put that file back
            rename(self._at, temporary.name, name, EXCHANGE)
        except FileNotFoundError:  # the new file was deleted
            self._put_back(temporary, name)
            raise self._changed(name) from None
        if lasting(self.look(temporary.name)) != lasting(own):  # saved again: keep the later one
            with contextlib.suppress(OSError):
                rename(self._at, temporary.name, name, EXCHANGE)
            raise self._saved_again(temporary, name)
        temporary.own = own
        raise self._changed(name)

    def _put_back(self, temporary: _Temporary, name: str) -> None:
        """Give a file that another program saved its name again, if that is free."""
        try:
            self._take(temporary.name, name)
        except OSError as error:
            raise self._saved_again(temporary, name) from error

    def _saved_again(self, temporary: _Temporary, name: str) -> ConflictError:
        return ConflictError(
            f"another program saved {self.path / name} several times meanwhile",
            hint=f"compare it with {self.path / temporary.name}, an earlier save",
        )

    def _came(self, name: str) -> ConflictError:
        return ConflictError(f"{self.path / name} was created meanwhile; it is kept", hint=_LOOK)

    def _changed(self, name: str) -> ConflictError:
        return ConflictError(f"{self.path / name} was changed meanwhile; it is kept", hint=_LOOK)


_LOOK = "look at it, then try again, or write elsewhere"


@dataclass
class _Temporary:
    """A temporary name, and the file of that name that may be deleted."""

    name: str
    own: Seen | None = None
    is_new: bool = False  # our file was just created, and its status is not known yet


def _temporary_name() -> str:
    return f".ckpt-{os.urandom(6).hex()}"  # short, because names have a length limit
