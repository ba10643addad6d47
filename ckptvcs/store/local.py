"""A backend on a directory: temporary file, fsync, link, fsync of the directory.

A crash before the link leaves a file in tmp/, which gc deletes.  After the link, the file is
complete; it is durable after its folder is synced.  `disk.link` is atomic: only one of two writers
of a name succeeds, and no reader sees half a file.

A file keeps its name in tmp/ until its folder is synced.  So a file with a second name may not be
durable: its writer is not done, or was killed.  No operation waits for a lock.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Future, wait
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ckptvcs.errors import ConflictError, CorruptionError, StorageError
from ckptvcs.parallel import Pool
from ckptvcs.store import disk
from ckptvcs.store.backend import Trace
from ckptvcs.store.disk import storage_error
from ckptvcs.store.lease_files import LocalHold, hold, trace

_SYNC_BYTES = 1 << 25  # larger files are synced while they are written, and deleted in background
MAX_SETTLED = 1 << 14  # names that are remembered as durable; others are synced again
_TRANSIENT = frozenset({"cache", "leases", "marks", "tmp"})  # folders that may be lost in a crash
_NO_FILE = frozenset({errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})


def _not_a_file(name: str) -> CorruptionError:
    return CorruptionError(f"{name} is not a regular file")


def refuse_links(root: Path, *folders: PurePosixPath) -> None:
    """Raise CorruptionError if a folder is a link.

    A repository may come from somebody else, and writing through its links would change files
    outside of it.
    """
    for folder in folders:
        if folder.name and (root / folder).is_symlink():
            raise CorruptionError(f"{root / folder} is a symbolic link, expected a folder")


@lru_cache(1)
def _background(process: int) -> Pool:
    """Return the background thread of a process; a forked child gets a new one."""
    pool = Pool(1)
    atexit.register(pool.shutdown)  # complete all deletions
    return pool


_TRIES = 3


class LocalBackend:
    """Write-once files below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._settled: set[str] = set()
        self._folders: set[Path] = set()  # folders of files that this object published
        self._doubtful: set[str] = set()  # files that were seen and may not be durable
        self._has_links = True  # until a hard link fails
        self._is_rooted = False  # whether the path to `root` was synced

    def __str__(self) -> str:
        return str(self.root)

    def names(self, folder: str) -> Iterator[str]:
        stack = [folder]
        while stack:
            below = stack.pop()
            try:
                with os.scandir(self.root / below) as entries:
                    for entry in entries:
                        name = f"{below}/{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            stack.append(name)
                        else:
                            yield name
            except OSError as error:
                if error.errno in _NO_FILE:  # not a folder either
                    continue
                raise storage_error(error, f"list {below}") from error

    def size(self, name: str) -> int:
        try:
            status = (self.root / name).stat()
        except OSError as error:
            raise self._refused(error, name) from error
        if not stat.S_ISREG(status.st_mode):
            raise _not_a_file(name)
        self._note(name, status)
        return status.st_size

    def _note(self, name: str, status: os.stat_result) -> None:
        if status.st_nlink != 1 or not self._has_links:
            self._doubtful.add(name)

    def _refused(self, error: OSError, name: str) -> Exception:
        """Return the exception to raise for a file that cannot be opened."""
        if error.errno not in _NO_FILE:
            return storage_error(error, f"read {name}")
        if os.path.lexists(self.root / name):
            return _not_a_file(name)
        return FileNotFoundError(errno.ENOENT, "no such file", name)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            with open(self.root / name, "rb", buffering=0, opener=disk.open_nonblocking) as file:
                status = os.fstat(file.fileno())
                self._note(name, status)
                left = max(0, status.st_size - offset)
                if length is not None:
                    left = min(left, length)
                parts = []
                while left and (part := os.pread(file.fileno(), min(left, 1 << 30), offset)):
                    parts.append(part)
                    offset += len(part)
                    left -= len(part)
                return parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError as error:
            raise self._refused(error, name) from error

    def writer(self) -> LocalWriter:
        return LocalWriter(self.root, self)

    def publish(self, path: Path, name: str) -> None:
        """Publish a synced file durably.  Raises OSError."""
        target = self.root / name
        refuse_links(self.root, *PurePosixPath(name).parents)
        if target.parent not in self._folders:
            disk.make_folder(target.parent)
        try:
            linked = disk.link(path, target)  # crash before: debris in tmp/; after: visible
        except FileNotFoundError:  # another process has deleted the folder
            self._folders.discard(target.parent)
            disk.make_folder(target.parent)
            linked = disk.link(path, target)
        disk.sync_folder(target.parent)
        self._folders.add(target.parent)
        self._remember({name})
        self._has_links &= linked

    def hold(self, name: str, describe: Callable[[Trace], bytes]) -> LocalHold:
        return hold(self.root, name, describe)

    def look(self, name: str, limit: int) -> tuple[bytes, Trace]:
        try:
            with open(self.root / name, "rb", buffering=0, opener=disk.open_nonblocking) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise _not_a_file(name)
                if status.st_size > limit:
                    raise CorruptionError(f"{name} is larger than its limit of {limit} bytes")
                return os.pread(file.fileno(), limit, 0), trace(file)
        except OSError as error:
            raise self._refused(error, name) from error

    def clock_ns(self) -> int:
        path = self.root / "tmp" / os.urandom(16).hex()
        try:
            with path.open("xb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:  # the repository is not writable
            return time.time_ns()
        finally:
            with contextlib.suppress(OSError):
                path.unlink()

    def settle(self, names: Iterable[str]) -> None:
        names = {name for name in names if name not in self._settled}
        try:
            for name in names:
                disk.settle(self.root / name)
            self._sync_folders({PurePosixPath(name).parent for name in names})
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise storage_error(error, "sync the repository") from error
        self._remember(names)

    def _remember(self, names: Set[str]) -> None:
        """Remember durable files.  A long series of commits only needs the newest names."""
        if len(self._settled) + len(names) > MAX_SETTLED:
            self._settled.clear()
        self._settled |= names

    def settle_seen(self) -> None:
        seen, self._doubtful = self._doubtful, set()
        for name in seen:
            with contextlib.suppress(FileNotFoundError):
                self.settle([name])

    def _sync_folders(self, folders: set[PurePosixPath]) -> None:
        """Sync folders after their parents: a name is durable only if its whole path is."""
        for folder in sorted({path for below in folders for path in (below, *below.parents)}):
            disk.sync_folder(self.root / folder)
        if folders and not self._is_rooted:
            disk.sync_above(self.root)
            self._is_rooted = True

    def _settle_all(self) -> None:
        """Make all published names durable."""
        folders = [path.name for path in self.root.iterdir() if path.name not in _TRANSIENT]
        below = {
            PurePosixPath(path).relative_to(self.root)
            for name in folders
            for path, _, _ in os.walk(self.root / name)
        }
        self._sync_folders(below)

    def replace(self, name: str, data: bytes) -> None:
        for attempt in range(_TRIES):
            try:
                disk.replace(self.root / name, data, self.root / "tmp")
                return
            except StorageError as error:
                # gc may delete the temporary file of a caller without a lease: try again.
                if attempt + 1 == _TRIES or not isinstance(error.__cause__, FileNotFoundError):
                    raise

    def cache(self, name: str, data: bytes) -> None:
        path, temporary = self.root / name, self.root / "tmp" / os.urandom(16).hex()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def make_folders(self, folders: Iterable[str]) -> list[str]:
        missing = [name for name in folders if not (self.root / name).is_dir()]
        for name in missing:
            self.make_way(name)
            disk.make_folder(self.root / name)
        return missing

    def make_way(self, folder: str) -> None:
        bottom = PurePosixPath(folder)
        for part in (*list(bottom.parents)[-2::-1], bottom):  # not the root, which may be a link
            path = self.root / part
            if path.is_symlink() or not (path.is_dir() or not path.exists()):
                self.delete(str(part))

    def delete(self, name: str) -> None:
        path = self.root / name
        try:
            status = path.lstat()
            if name.startswith("tmp/") and status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
                self._settle_all()  # the second name was the only sign that it is not durable
            if stat.S_ISDIR(status.st_mode):  # a folder in place of a file: gc empties it in tmp/
                disk.rename(path, self.root / "tmp" / os.urandom(16).hex())
            elif status.st_size < _SYNC_BYTES:
                disk.unlink(path)
            else:  # deleting a large file is slow, so do it in the background
                aside = self.root / "tmp" / os.urandom(16).hex()
                disk.rename(path, aside)
                _background(os.getpid()).start(partial(aside.unlink, missing_ok=True))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, f"delete {name}") from error


class LocalWriter:
    """An unfinished file of a LocalBackend, in tmp/ until it is published."""

    def __init__(self, root: Path, backend: LocalBackend) -> None:
        self._backend = backend
        self._path = root / "tmp" / os.urandom(16).hex()
        self._unsynced = 0
        self._syncing: Future[None] | None = None
        try:
            refuse_links(root, PurePosixPath("tmp"))
            self._path.parent.mkdir(exist_ok=True)
            self._file: BinaryIO | None = disk.create(self._path)
        except OSError as error:
            raise storage_error(error, "write to the repository") from error

    def write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        try:
            disk.write(self._file, data)
            self._unsynced += len(data)
            if self._unsynced > _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
                self._unsynced = 0
                sync = partial(os.fdatasync, self._file.fileno())
                self._syncing = _background(os.getpid()).start(sync)
        except OSError as error:
            self.abort()
            raise storage_error(error, "write to the repository") from error

    def publish(self, name: str) -> None:
        assert self._file is not None
        try:
            if self._syncing is not None:
                self._syncing.result()
            disk.sync(self._file)
            self._file.close()
            self._backend.publish(self._path, name)
        except FileExistsError as error:
            raise ConflictError(f"{name} exists already") from error
        except OSError as error:
            raise storage_error(error, f"publish {name}") from error
        finally:
            self.abort()

    def abort(self) -> None:
        if self._file is not None:
            if self._syncing is not None:
                wait([self._syncing])  # otherwise it might sync another file of the same number
            # A failing close or unlink leaves debris in tmp/, which gc deletes.
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                disk.unlink(self._path)
            self._file = None
