"""Placing: user files, written whole into folders that others may change meanwhile.

    look     what has the name now: nothing, or a file of this identity
    write    to a temporary name (.ckpt-HEX) in the same folder
    place    the new file gets the name, if that is still as it was at the look

A folder is held open.  Names are looked up in what is open, and below it never through a symbolic
link, so that nobody who moves or links folders meanwhile can turn a write elsewhere.

A name that was free is taken by a rename that replaces nothing.  Where a file is to be replaced,
the two names are exchanged: what comes out is deleted if it is what the look found, and else put
back.  A crash in between leaves the one or the other under the temporary name.  On a file system
that cannot exchange names, a moment is left between the last look and the rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

from ckptvcs.errors import ConflictError, InvalidInputError

Seen = os.stat_result
"""What had a name at a look."""

LINK_ERRORS = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)
"""What opening a folder fails with where a symbolic link stands in its place."""

# What is in a folder need not be readable.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_TRIES = 2  # to delete what is temporary: the system may refuse a call once
_NO_LINKS = (*_CANNOT, errno.EPERM, errno.EMLINK)
FREE_ONLY, EXCHANGE = "free only", "exchange"
_FLAGS = {
    "linux": ("renameat2", {FREE_ONLY: 1, EXCHANGE: 2}),
    "darwin": ("renameatx_np", {FREE_ONLY: 4, EXCHANGE: 2}),
}


@cache
def _system_rename() -> Any:
    """The call of this system that renames with flags, if it has one."""
    name, _ = _FLAGS.get(sys.platform, ("", {}))
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None


def rename(folder: int, old: str, new: str, how: str) -> bool:
    """Rename within a folder in one step, onto a free name only or by exchange; False where this
    system or file system cannot do that.
    """
    call = _system_rename()
    if call is None:
        return False
    flag = _FLAGS[sys.platform][1][how]
    if call(folder, os.fsencode(old), folder, os.fsencode(new), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), new)


def _lasting(status: Seen | None) -> tuple[int, ...] | None:
    """What of a file a rename leaves, and a change does not."""
    if status is None:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode


def _same(now: Seen | None, seen: Seen) -> bool:
    """Whether nothing was done to a file since a look."""
    if now is None:
        return False
    # A file with other names changes when one of these is taken away.
    same_change = seen.st_nlink > 1 or now.st_ctime_ns == seen.st_ctime_ns
    return _lasting(now) == _lasting(seen) and same_change


class NotRegularError(OSError):
    """A pipe, a device, a folder: not a regular file."""


class Folder:
    """A folder, held open; `path` is what it was called when it was opened."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._at, self.path = descriptor, path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a folder by a way that the user has named: links on it are followed.

        Raises:
            OSError: there is no such folder.
        """
        return cls(os.open(path, _FOLDER), path)

    def close(self) -> None:
        os.close(self._at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, name: str, *, make: bool = False) -> Folder:
        """Open a folder in this one, which is no symbolic link; `make` it where there is none.

        Raises:
            OSError: it is a link (of LINK_ERRORS), or cannot be opened.
        """
        path = self.path / name
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self._at)
        try:
            return Folder(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self._at), path)
        except OSError as error:
            found = None
            with contextlib.suppress(OSError):
                found = self.look(name)
            link = found is not None and stat.S_ISLNK(found.st_mode)
            code = errno.ELOOP if link else error.errno or errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error

    @contextmanager
    def inside(self, way: PurePosixPath, *, make: bool = False) -> Iterator[Folder]:
        """The folder at the end of a way down from this one, no step of which is a link."""
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
        """What has a name; of a link itself."""
        try:
            return os.stat(name, dir_fd=self._at, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def status(self) -> Seen:
        """What this folder is."""
        return os.fstat(self._at)

    def open_file(self, name: str, *, follow: bool = False) -> BinaryIO:
        """A regular file, open to read.

        Raises:
            NotRegularError: it is none.
            OSError: it cannot be opened; a link can be only with `follow`.
        """
        # A pipe would wait for its writer.
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
        """A file to be written, which gets its name when the block ends without an error.

        Raises:
            ConflictError: what has the name is not what was seen; it stays.
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
        """Make a symbolic link.  Raises ConflictError as `file` does."""
        with self._temporary() as temporary:
            os.symlink(text, temporary.name, dir_fd=self._at)
            temporary.is_new = True
            temporary.own, temporary.is_new = self.look(temporary.name), False
            self._place(temporary, name, seen)

    @contextmanager
    def tree(self, name: str) -> Iterator[Folder]:
        """A folder to be filled, which gets its name, if that is free still, when the block ends
        without an error.
        """
        temporary = _temporary_name()
        os.mkdir(temporary, dir_fd=self._at)
        try:
            with self.enter(temporary) as place:
                yield Folder(place._at, self.path / name)
            try:
                if not rename(self._at, temporary, name, FREE_ONLY):
                    # A folder takes the place of an empty folder at most.
                    os.rename(temporary, name, src_dir_fd=self._at, dst_dir_fd=self._at)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise self._came(name) from error
        finally:
            for _ in range(_TRIES):
                shutil.rmtree(temporary, ignore_errors=True, dir_fd=self._at)

    def remove(self, name: str, seen: Seen) -> bool:
        """Delete a file, if it is what was seen; whether it was.  It is first taken out of the way
        of whoever saves it anew in this very moment.
        """
        if _lasting(self.look(name)) != _lasting(seen):
            return False
        with self._temporary() as temporary:
            try:
                os.rename(name, temporary.name, src_dir_fd=self._at, dst_dir_fd=self._at)
            except FileNotFoundError:
                return False
            try:
                is_seen = _lasting(self.look(temporary.name)) == _lasting(seen)
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
        """Give the folder its mode and time, when all is in it."""
        os.chmod(".", mode, dir_fd=self._at)
        os.utime(".", ns=(mtime_ns, mtime_ns), dir_fd=self._at)

    @contextmanager
    def _temporary(self) -> Iterator[_Temporary]:
        """A name of our own, which is deleted in the end where it leads to what is our own."""
        temporary = _Temporary(_temporary_name())
        try:
            yield temporary
        finally:
            for _ in range(_TRIES):
                with contextlib.suppress(OSError):
                    self._clear(temporary)
                    break

    def _clear(self, temporary: _Temporary) -> None:
        found, own = self.look(temporary.name), temporary.own
        if found is None:
            return
        if temporary.is_new or (own and (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)):
            os.unlink(temporary.name, dir_fd=self._at)

    def _place(self, temporary: _Temporary, name: str, seen: Seen | None) -> None:
        if _lasting(self.look(temporary.name)) != _lasting(temporary.own):
            raise ConflictError(f"somebody else changed {self.path / temporary.name}")
        if seen is None:
            try:
                self._take(temporary.name, name)
            except FileExistsError as error:
                raise self._came(name) from error
        else:
            self._replace(temporary, name, seen)

    def _take(self, temporary: str, name: str) -> None:
        """Give a file a name that is free.  Raises FileExistsError."""
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
        # The name is taken by an empty file, which is exchanged for the whole one.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        claim = os.open(name, flags, 0o600, dir_fd=self._at)
        try:
            claimed = os.fstat(claim)
        finally:
            os.close(claim)
        if claimed.st_size or _lasting(self.look(name)) != _lasting(claimed):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        os.replace(temporary, name, src_dir_fd=self._at, dst_dir_fd=self._at)

    def _replace(self, temporary: _Temporary, name: str, seen: Seen) -> None:
        """Give a file the name of one that was seen, if that still has it."""
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
            is_seen = _lasting(self.look(temporary.name)) == _lasting(seen)
        except OSError:
            rename(self._at, temporary.name, name, EXCHANGE)
            temporary.own = own
            raise
        if is_seen:
            temporary.own = seen
            return
        try:  # somebody saved it in this very moment
            rename(self._at, temporary.name, name, EXCHANGE)
        except FileNotFoundError:  # and took it away
            self._put_back(temporary, name)
            raise self._changed(name) from None
        if _lasting(self.look(temporary.name)) != _lasting(own):  # and once more: the later one
            with contextlib.suppress(OSError):
                rename(self._at, temporary.name, name, EXCHANGE)
            raise self._saved_again(temporary, name)
        temporary.own = own
        raise self._changed(name)

    def _put_back(self, temporary: _Temporary, name: str) -> None:
        """Give what somebody has saved its name again, if that is free."""
        try:
            self._take(temporary.name, name)
        except OSError as error:
            raise self._saved_again(temporary, name) from error

    def _saved_again(self, temporary: _Temporary, name: str) -> ConflictError:
        return ConflictError(
            f"{self.path / name} was saved again and again meanwhile",
            hint=f"compare it with {self.path / temporary.name}, an earlier save",
        )

    def _came(self, name: str) -> ConflictError:
        return ConflictError(f"{self.path / name} was created meanwhile; it is kept", hint=_LOOK)

    def _changed(self, name: str) -> ConflictError:
        return ConflictError(f"{self.path / name} was changed meanwhile; it is kept", hint=_LOOK)


_LOOK = "look at it, then try again, or write elsewhere"


@dataclass
class _Temporary:
    """A temporary name, and what may be deleted under it."""

    name: str
    own: Seen | None = None
    is_new: bool = False  # what has it was made a moment ago


def _temporary_name() -> str:
    return f".ckpt-{os.urandom(6).hex()}"  # short: names have limits
