"""The steps by which bytes and names become durable on a POSIX file system.

Each is one thing that may fail, or be the last before a crash; everything that a repository must
not lose goes through here.  What is not synced may be lost, and names may become durable in another
order than they were made in.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ckptvcs.errors import StorageError

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of Linux

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space and try again",
    errno.EDQUOT: "the disk quota is used up: free some space and try again",
    errno.EFBIG: "files may not be that large here: raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "check the permissions of the repository",
    errno.EPERM: "check the permissions of the repository",
    errno.ENOTSUP: "keep the repository on a file system of this machine's own, such as ext4",
    errno.EIO: "the disk fails: copy what is there elsewhere, and run 'ckpt verify'",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
}


def storage_error(error: OSError, action: str) -> StorageError:
    """What the user is told when the operating system refuses."""
    reason = error.strerror or str(error)
    return StorageError(f"cannot {action}: {reason}", hint=_HINTS.get(error.errno or 0))


def open_nonblocking(path: str | Path, flags: int) -> int:
    """Open a file; return at once for a pipe, which has no bytes to read."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_small(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is larger.
    """
    with open(path, "rb", opener=open_nonblocking) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than its limit of {limit} bytes")
    return data


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder for temporary files.  What cannot be deleted at its end stays: TemporaryDirectory
    of Python 3.11 tries again without an end where it may not list a folder.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_full(error: StorageError) -> bool:
    """Whether it is for want of room that the operating system refused."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def create(path: Path) -> BinaryIO:
    """Begin a file that does not exist yet."""
    return path.open("xb")


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Append to a file, as far as the operating system's memory."""
    file.write(data)


def sync(file: BinaryIO) -> None:
    """Make the bytes of a file durable."""
    file.flush()
    os.fsync(file.fileno())


def link(path: Path, name: Path) -> bool:
    """Give a file another name; whether it keeps its own.  Raises FileExistsError where that is
    taken: of two who want it one gets it, and what it shows is never half a file.
    """
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_to_new(path, name, error)
        return False
    return True


def _rename_to_new(path: Path, name: Path, refused: OSError) -> None:
    """The same where the file system has no hard links: a rename that replaces nothing, which the
    kernel does in one step.  To look first, and then rename, would let two writers both succeed.
    """
    try:
        rename_new = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        raise _cannot_link() from refused
    done = rename_new(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(name), _RENAME_NOREPLACE)
    if done != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS):  # the file system cannot; the kernel cannot
            raise _cannot_link() from refused
        raise OSError(code, os.strerror(code), str(name))


def _cannot_link() -> OSError:
    return OSError(errno.ENOTSUP, "this file system has neither hard links nor exclusive renames")


def rename(path: Path, name: Path) -> None:
    """Give a file another name instead of its own; whatever had that is gone."""
    path.replace(name)


def unlink(path: Path) -> None:
    """Take a name away, if it is there."""
    path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably.

    One that is there and empty may come from a process that was killed before it synced the folder
    above, which is synced then.  Nothing is put into a folder before that is done, so that one
    which holds anything is durable.
    """
    try:
        with os.scandir(path) as entries:
            if next(entries, None) is not None:
                return
    except (FileNotFoundError, NotADirectoryError):
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
    if path != path.parent:
        sync_folder(path.parent)


def real_path(path: Path) -> Path:
    """A path without links.  `Path.resolve` of Python 3.11 raises RuntimeError where a link leads
    to itself.
    """
    return Path(os.path.realpath(path))


def sync_above(path: Path) -> None:
    """Make the way to a folder durable: the names in all folders above it, on its file system, that
    this user may read.
    """
    device = path.stat().st_dev
    for folder in real_path(path).parents:
        if folder.stat().st_dev != device:
            return
        with contextlib.suppress(PermissionError):
            sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, as far as the file system knows how to."""
    settle(path)


def settle(path: Path) -> None:
    """Make durable what a file, or a folder, holds, whoever has written it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes, scratch: Path) -> None:
    """Replace a file atomically and durably.

    `scratch` is a folder for the temporary file, on the same file system.

    Raises:
        StorageError: the file is unchanged.
    """
    temporary = scratch / f"{path.name}-{os.urandom(8).hex()}"
    try:
        make_folder(scratch)
        with create(temporary) as file:
            write(file, data)
            sync(file)
        rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, f"write {path}") from error
    finally:
        # gc deletes a temporary file that stays here.
        with contextlib.suppress(OSError):
            unlink(temporary)
