"""The LMDB file of an index: one environment of it in a process, and a new file where it is rotten.

    <name>-<host>-<boot>-<number>.lmdb

A file is never repaired, only followed by the next number.  Each start of a machine begins its own:
nothing is synced, so that after a power cut its pages may be of any age, and LMDB trusts them; and
two machines on one file system must not share one, whose locks they do not see.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from pathlib import Path
from threading import Lock
from typing import Any

import lmdb
from blake3 import blake3

from ckptvcs.store.host import boot_id, host_name

_FIRST_MAP_BYTES = 1 << 24
_LOCK_BYTES = 1 << 16
_META = struct.Struct("<40xI92xQ")  # of LMDB 0.9: page size, last page used
_DIGITS = 8  # of the hashes of a host and of its start

_open: dict[Path, tuple[tuple[int, int, int], lmdb.Environment]] = {}

opening = Lock()
"""To be held while an environment, and the databases in it, are opened.  LMDB knows other users of
a file by locks that a process does not see of itself: the second of two threads would make the
mutex anew that the first one holds.
"""
os.register_at_fork(
    before=opening.acquire, after_in_parent=opening.release, after_in_child=opening.release
)


def _short(text: str) -> str:
    return blake3(text.encode()).hexdigest()[:_DIGITS]


def newest_file(name: Path) -> Path:
    """The index file to use: of this start of this machine, the one with the highest number.

    Raises:
        OSError: the folder cannot be listed: to take another file then would split the index.
    """
    prefix = f"{name.name}-{_short(host_name())}-{_short(boot_id())}-"
    own = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.lmdb\Z")
    numbers = [0]
    with contextlib.suppress(FileNotFoundError):
        numbers += [int(m[1]) for entry in os.scandir(name.parent) if (m := own.match(entry.name))]
    return name.with_name(f"{prefix}{max(numbers)}.lmdb")


def next_file(path: Path) -> Path:
    """The index file that follows one that is rotten, which is deleted; whoever has it open goes on
    with what he has until he writes.

    Raises:
        OSError: it cannot be deleted.
    """
    stem, _, number = path.stem.rpartition("-")
    following = path.with_name(f"{stem}-{int(number) + 1}.lmdb")
    # First: nobody may find none, and begin with the old number again; without any room they must.
    with contextlib.suppress(OSError):
        following.touch()
    _delete(path)
    return following


def _delete(path: Path) -> None:
    for name in (path, path.with_name(path.name + "-lock")):
        name.unlink(missing_ok=True)


def delete_older(path: Path) -> None:
    """Delete the index files of earlier starts of this machine, which nobody can have open."""
    name, host, boot, _ = path.stem.rsplit("-", 3)
    other = re.compile(re.escape(f"{name}-{host}-") + r"([0-9a-f]+)-[0-9]+\.lmdb\Z")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            found = other.match(entry.name)
            if found and found[1] != boot:
                _delete(Path(entry.path))


def environment(path: Path) -> lmdb.Environment:
    """The one environment of a file in this process; a forked child opens its own.  The caller
    holds `opening`.

    Raises:
        lmdb.Error, OSError: it is rotten, or the file system refuses.
    """
    known = _open.get(path)
    if known and known[0] == _identity(path):
        return known[1]
    # A file that was deleted stays in memory, and on its disk, as long as it is mapped.
    gone = [name for name, (then, _) in _open.items() if then[1:] != _identity(name)[1:]]
    for other in gone:
        del _open[other]
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_length(path)
    _reserve(path.with_name(path.name + "-lock"))
    options: dict[str, Any] = {
        "subdir": False, "map_size": max(_FIRST_MAP_BYTES, _file_size(path)), "max_dbs": 8,
        "max_readers": 512, "readahead": False, "metasync": False, "sync": False,
    }  # fmt: skip
    if int(lmdb.__version__.partition(".")[0]) >= 3:
        options["lib_version"] = 0
    opened = lmdb.open(str(path), **options)
    _open[path] = (_identity(path), opened)
    return opened


def close(path: Path) -> None:
    """Close the environment of a file, if this process has one."""
    known = _open.pop(path, None)
    if known is not None and known[0][0] == os.getpid():
        known[1].close()


def is_current(path: Path, opened: lmdb.Environment) -> bool:
    """Whether an environment is still that of the file of this name, for this process."""
    known = _open.get(path)
    return known is not None and known[1] is opened and known[0] == _identity(path)


def _identity(path: Path) -> tuple[int, int, int]:
    """This process and this very file: a repository may be deleted and made again."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return (os.getpid(), 0, 0)
    return (os.getpid(), status.st_dev, status.st_ino)


def _check_length(path: Path) -> None:
    """LMDB maps its file and trusts it: reading behind the end of a cut one kills the process.

    Raises:
        lmdb.CorruptedError: the file is shorter than its meta pages say.
    """
    size = _file_size(path)
    if not size:
        return
    with path.open("rb") as file:
        head = file.read(_META.size)
        if len(head) < _META.size:
            raise lmdb.CorruptedError("the index is cut off")
        page, last = _META.unpack(head)
        file.seek(page)
        second = file.read(_META.size)
        if len(second) == _META.size:
            last = max(last, _META.unpack(second)[1])
    if not 512 <= page <= 1 << 16 or (last + 1) * page > size:
        raise lmdb.CorruptedError("the index is cut off")


def _reserve(lock: Path) -> None:
    """Give the lock file real blocks: LMDB maps it, and a map without room kills the process.

    Raises:
        OSError: the disk is full.
    """
    if not lock.exists():
        with lock.open("xb") as file:
            try:
                file.write(bytes(_LOCK_BYTES))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                lock.unlink(missing_ok=True)
                raise


def _file_size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
