"""The steps that make bytes and names durable on a POSIX file system.

All durable data of a repository goes through this module.  Each function is one step that may
fail, or be the last one before a crash.  A crash may lose all data that is not synced, and names
may become durable in a different order from their creation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ckptvcs.errors import StorageError
from ckptvcs.store import renaming
from ckptvcs.store.renaming import FREE_ONLY

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

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
    """Return the error, with a hint, for a refusal of the operating system."""
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
def scratch_folder(prefix: str, above: Path | None = None) -> Iterator[Path]:
    """Create a temporary folder, and delete it at the end as far as possible.

    It is created in `above`, otherwise in the temporary directory of the system.

    (TemporaryDirectory of Python 3.11 never ends if it is not allowed to list a folder.)

    Raises:
        OSError: the folder cannot be created.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=above))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_full(error: StorageError) -> bool:
    """Return whether the cause of an error is a full disk or quota."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder.

    Raises:
        OSError: the system does not tell.
    """
    return shutil.disk_usage(folder).free


def create(path: Path) -> BinaryIO:
    """Create a file.  Raises FileExistsError."""
    return path.open("xb")


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Append to a file, without syncing."""
    file.write(data)


def sync(file: BinaryIO) -> None:
    """Make the bytes of a file durable."""
    file.flush()
    os.fsync(file.fileno())


def link(path: Path, name: Path) -> bool:
    """Give a file a second name; return whether it keeps the first.

    The step is atomic: only one of several writers gets the name.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # With a check and then a rename, two writers could succeed.
        if not renaming.rename(renaming.AT_WORKING_FOLDER, str(path), str(name), FREE_ONLY):
            reason = "this file system has neither hard links nor exclusive renames"
            raise OSError(errno.ENOTSUP, reason) from error
        return False
    return True


def rename(path: Path, name: Path) -> None:
    """Rename a file, replacing any file of the new name."""
    path.replace(name)


def unlink(path: Path) -> None:
    """Delete a file, if it exists."""
    path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents durably.

    An existing empty folder may not be durable: its creator may have been killed before it synced
    the parent.  So this function syncs the parent.  A folder that is not empty is durable, because
    nothing is created in a folder before its parent is synced.
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
    """Return a path without links.

    (`Path.resolve` of Python 3.11 raises RuntimeError if a link leads to itself.)
    """
    return Path(os.path.realpath(path))


def sync_above(path: Path) -> None:
    """Make the path to a folder durable.

    This syncs all folders above it on the same file system that the user may read.
    """
    device = path.stat().st_dev
    for folder in real_path(path).parents:
        if folder.stat().st_dev != device:
            return
        with contextlib.suppress(PermissionError):
            sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, if the file system supports that."""
    settle(path)


def settle(path: Path) -> None:
    """Make the content of a file or folder durable, whoever wrote it."""
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
