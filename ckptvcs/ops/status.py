"""Status: how the files on disk differ from HEAD, and which checkpoints beside them are new.

A file with the committed size and modification time that did not change after its commit is not
read.  Any other file is hashed once: the cache remembers the hash with the size, the times and the
inode of the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from ckptvcs.checkpoint.conventions import TAKEN_SUFFIXES, TEMPORARY, TENSOR_SUFFIXES
from ckptvcs.checkpoint.layout import unreadable
from ckptvcs.files.names import safe_path
from ckptvcs.hashing import hasher
from ckptvcs.history.commit import Commit, FileEntry
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId

_BLOCK = 1 << 22
_MOST_ENTRIES = 10_000  # of a folder, or of the cache
_MOST_BYTES = 1 << 22  # of the cache


@dataclass(frozen=True)
class Status:
    """The position of HEAD, and the differences of the files on disk.

    Attributes:
        branch: The branch that HEAD follows; None if HEAD is detached.
        head: The commit of HEAD; None in an empty repository.
        step: The training step of that commit, if known.
        changes: For each differing file `missing`, `changed` or `near`, and its path.
        uncommitted: The checkpoints in the folder of HEAD's checkpoint that no commit contains.
    """

    branch: str | None
    head: ObjectId | None
    step: int | None
    changes: tuple[tuple[str, Path], ...]
    uncommitted: tuple[Path, ...] = ()


def status(repository: Repository, *, verify: bool) -> Status:
    """Compare the files on disk with HEAD; see `Repo.status`."""
    head, name = repository.head(), repository.revisions.head()
    branch = head.branch if head else None
    if name is None:
        return Status(branch, None, None, ())
    commit = repository.catalog.commit(name)
    hashes = _Hashes(repository.cache / "hashes.json", trust=not verify)
    files = _Files(repository, name, hashes)
    changes, uncommitted = tuple(files.changes()), tuple(sorted(files.uncommitted()))
    hashes.save()
    return Status(branch, name, commit.step, changes, uncommitted)


class _Hashes:
    """The hashes of files, with the marks of the files when they were hashed."""

    def __init__(self, path: Path, *, trust: bool) -> None:
        self.trust = trust
        self._path, self._known, self._changed = path, dict[str, list[object]](), False
        # The cache is not part of the history: whatever is wrong with it, files are hashed again.
        with suppress(OSError, ValueError, RecursionError):
            with path.open("rb") as file:
                found = json.loads(file.read(_MOST_BYTES))
            if isinstance(found, dict):
                self._known = {k: v for k, v in found.items() if isinstance(v, list)}

    def of(self, path: Path, seen: os.stat_result) -> str:
        """Return the BLAKE3 hash of a file.  Raises OSError."""
        mark: list[object] = [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]
        known = self._known.get(str(path))
        if self.trust and known is not None and known[:-1] == mark and isinstance(known[-1], str):
            return known[-1]
        digest = hasher(threads=True)
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        found = digest.hexdigest()
        self._known.pop(str(path), None)
        self._known[str(path)] = [*mark, found]
        self._changed = True
        return found

    def save(self) -> None:
        """Write the newest hashes to the cache, if it can be written."""
        if self._changed:
            newest = dict([*self._known.items()][-_MOST_ENTRIES:])
            temporary = self._path.with_name(f".{os.urandom(8).hex()}")
            with suppress(OSError):
                try:
                    temporary.write_text(json.dumps(newest), "utf-8")
                    temporary.replace(self._path)
                finally:
                    temporary.unlink(missing_ok=True)


class _Files:
    """The files on disk, compared with a commit."""

    def __init__(self, repository: Repository, name: ObjectId, hashes: _Hashes) -> None:
        commit = repository.catalog.commit(name)
        self._repository, self._hashes = repository, hashes
        self._name, self._commit = name, commit
        # The path may come from a foreign repository, so it is checked.
        self._below = PurePosixPath() if commit.path == "." else safe_path(commit.path)
        self._top = repository.root if commit.inside else Path.cwd()

    def changes(self) -> Iterator[tuple[str, Path]]:
        """Yield the files that differ from the commit: `missing`, `changed` or `near`."""
        home = self._top / self._below
        for file in self._commit.files:
            if file.skeleton is None:
                continue
            path = home / safe_path(file.path) if self._commit.source == "directory" else home
            try:
                kind = self._change(path, file)
            except OSError as error:
                raise unreadable(path, error) from error
            if kind:
                yield kind, path

    def _change(self, path: Path, file: FileEntry) -> str:
        is_state = self._commit.source == "state"  # Python committed it, and wrote no file
        if not path.is_file():
            return "" if is_state else "missing"
        seen = path.stat()
        if seen.st_size != file.size:
            return "changed"
        if is_state:
            return self._change_of_state(self._hashes.of(path, seen), file)
        if self._hashes.trust and _is_committed(seen, file, self._commit):
            return ""
        digest = self._hashes.of(path, seen)
        if digest == file.hash:
            return ""
        return "near" if self._was_written(digest) else "changed"

    def _change_of_state(self, digest: str, file: FileEntry) -> str:
        """Return how a file with this hash differs from a committed state, which has no hash."""
        restorer = self._repository.restorer(self._name)
        if restorer.digest(file) != digest:
            return "changed"
        return "" if restorer.exact else "near"

    def _was_written(self, digest: str) -> bool:
        """Return whether a checkout wrote the near form with this hash."""
        return (self._repository.cache / "written" / digest).exists()

    def uncommitted(self) -> Iterator[Path]:
        """Yield the checkpoints beside that of the commit which no commit contains."""
        if self._commit.source == "state" or not self._below.parts:
            return
        folder = self._top / self._below.parent
        commits: dict[str, list[Commit]] = {}
        sizes: set[int] = set()
        for commit in self._repository.revisions.visible().values():
            commits.setdefault(commit.path, []).append(commit)
            sizes.update(file.size for file in commit.files)
        with suppress(OSError), os.scandir(folder) as entries:
            for _, entry in zip(range(_MOST_ENTRIES), entries, strict=False):
                if TEMPORARY.fullmatch(entry.name) or entry.name == self._below.name:
                    continue
                name = (self._below.parent / entry.name).as_posix()
                with suppress(OSError):
                    if self._is_new(Path(entry.path), name, commits, sizes):
                        yield Path(entry.path)

    def _is_new(
        self, path: Path, name: str, commits: Mapping[str, list[Commit]], sizes: set[int]
    ) -> bool:
        """Return whether a path is a checkpoint that no commit contains.  Raises OSError."""
        seen = path.lstat()
        if stat.S_ISDIR(seen.st_mode):
            committed = any(made.source == "directory" for made in commits.get(name, ()))
            return self._commit.source == "directory" and not committed and _holds_tensors(path)
        if not stat.S_ISREG(seen.st_mode) or not path.name.lower().endswith(TAKEN_SUFFIXES):
            return False
        if self._hashes.trust:
            for made in commits.get(name, ()):
                if any(_is_committed(seen, file, made) for file in made.files):
                    return False
        if seen.st_size not in sizes:
            return True
        digest = self._hashes.of(path, seen)
        found = self._repository.catalog.store.find(b"file:" + digest.encode())
        hidden = self._repository.catalog.dropped().commits
        return not (set(found) - hidden or self._was_written(digest))


def _is_committed(seen: os.stat_result, file: FileEntry, commit: Commit) -> bool:
    """Return whether a file has the committed size and time, and did not change since."""
    made = datetime.fromisoformat(commit.time).timestamp()
    same = (seen.st_size, seen.st_mtime_ns) == (file.size, file.mtime_ns)
    return same and seen.st_ctime_ns <= made * 1e9


def _holds_tensors(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        names = [entry.name for _, entry in zip(range(_MOST_ENTRIES), entries, strict=False)]
    return any(name.lower().endswith(TENSOR_SUFFIXES) for name in names)
