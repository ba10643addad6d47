"""Watch a folder: commit the checkpoints that a trainer writes there.

look      list the checkpoints, and since when each is unchanged
settle    wait until a checkpoint seems complete: nobody writes to it
commit    commit by step; recognize by content what the history has from before a restart
remove    if asked to, delete all originals but the newest few, once they can be restored

All state is in the history: a restarted watch continues where the last one ended.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.checkpoint.conventions import HF_FIRST, HF_LAST, is_alias
from ckptvcs.checkpoint.survey import Found, candidates, survey
from ckptvcs.errors import BusyError, CkptError, ConflictError, InvalidInputError, NotFoundError
from ckptvcs.ops.commit import commit_path
from ckptvcs.ops.lines import Lines
from ckptvcs.ops.originals import Contents, Keeper, Removal
from ckptvcs.ops.provenance import capture_beside
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import ObjectId

_TRIES = 3  # looks at a checkpoint that the system refuses to read
_LASTING = frozenset(
    {
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
    }
)

Signature = tuple[tuple[str, int, int, int], ...]
"""For each file: path, size in bytes, mtime in ns, inode."""


@dataclass(frozen=True)
class WatchEvent:
    """Something that happened to a watched checkpoint, or to the folder.

    Attributes:
        name: The name of the checkpoint, or the folder.
        step: The training step, if known.
        id: The new commit, if one was made.
        raw_bytes: The size of the checkpoint, in bytes.
        notes: Warnings for the user.
        problem: The error, if the checkpoint cannot be committed.
        removal: What happened to the source files, if they were due for deletion.
    """

    name: str
    step: int | None
    id: ObjectId | None = None
    raw_bytes: int = 0
    notes: tuple[str, ...] = ()
    problem: CkptError | None = None
    removal: Removal | None = None


@dataclass(frozen=True)
class _Taken:
    """A checkpoint that needs no more work; `id` is its commit, if it has one.

    `turn` counts the looks that processed something.
    """

    signature: Signature
    turn: int
    found: Found | None = None
    id: ObjectId | None = None


class Watcher:
    """Watches one folder and commits its checkpoints; see `Repo.watch`."""

    def __init__(
        self,
        repo: Repository,
        folder: Path,
        *,
        pattern: str | None = None,
        codec: str | None = None,
        branch: str | None = None,
        settle: float = 2.0,
        keep_local: int | None = None,
        accept_near: bool = False,
    ) -> None:
        """Watch `folder`; `Repo.watch` describes the arguments.

        Raises:
            InvalidInputError: The folder is part of the repository, the codec does not exist, or a
                number is out of range.
        """
        if real_path(folder).is_relative_to(real_path(repo.folder)):
            raise InvalidInputError(f"{folder} is part of the repository itself")
        if keep_local is not None and keep_local < 1:
            raise InvalidInputError(
                "keep_local must be at least 1: training needs the newest checkpoint"
            )
        self._repo, self._folder, self._pattern = repo, folder, pattern
        self._codec, self._lines = codec, Lines(repo, branch)
        self._settle, self._keep_local, self._accept_near = settle, keep_local, accept_near
        self._keeper = Keeper(repo, codec)
        self._contents: Contents | None = None
        self._since: dict[str, tuple[Signature, float]] = {}
        self._files: Mapping[str, Sequence[str]] = {}  # the folder entries of each checkpoint
        self._written: set[str] = set()  # entries that a process has open for writing
        self._done: dict[str, _Taken] = {}
        self._order: list[str] = []  # names of committed checkpoints, oldest first
        self._turn = 0
        self._told: dict[str, str] = {}
        self._refused: Counter[tuple[str, Signature]] = Counter()

    def look(self) -> Iterator[WatchEvent]:
        """Look once, and commit the checkpoints that have settled.

        Yields:
            An event for each commit, problem and deletion.

        Raises:
            InvalidInputError: The folder cannot be read, and a retry would not help.
            StorageError: The repository cannot be written.
        """
        try:
            settled = self._settled()
            self._turn += bool(settled)
            checkpoints = self._checkpoints(settled)
        except InvalidInputError as error:
            if not _may_pass(error):
                raise
            yield from self._report(self.name, None, error)
            return
        self._told.pop(self.name, None)
        for found in checkpoints:
            yield from self._commit(found, settled[found.name])
        if settled:
            self._order = self._by_age()
        if self._keep_local is not None:
            yield from self._remove(self._keep_local)

    @property
    def name(self) -> str:
        """The name of the folder in events."""
        return str(self._folder)

    @property
    def waiting(self) -> frozenset[str]:
        """The folder entries that are or may become checkpoints, and are not committed."""
        return frozenset(
            entry
            for name, (signature, _) in self._since.items()
            if not self._is_done(name, signature)
            for entry in self._files[name]
        )

    @property
    def unsettled(self) -> frozenset[str]:
        """The entries that changed within the last `settle` seconds."""
        now = time.monotonic()
        return frozenset(
            entry
            for name, (_, since) in self._since.items()
            if now - since < self._settle
            for entry in self._files[name]
        )

    @property
    def written(self) -> frozenset[str]:
        """The waiting entries that a process has open for writing."""
        return self.waiting & self._written

    # -- look ----------------------------------------------------------------------------------

    def _settled(self) -> dict[str, Signature]:
        """Return the new checkpoints that nobody changes: unchanged for a while, and not open."""
        now, here = time.monotonic(), dict(self._signatures())
        self._since = {
            name: before
            if (before := self._since.get(name)) and before[0] == signature
            else (signature, now)
            for name, signature in here.items()
        }
        self._done = {name: row for name, row in self._done.items() if name in here}
        settled = {
            name: signature
            for name, (signature, since) in self._since.items()
            if now - since >= self._settle and not self._is_done(name, signature)
        }
        if settled:
            self._written = set(_open_for_writing(self._folder))
            settled = {
                name: signature
                for name, signature in settled.items()
                if self._written.isdisjoint(self._files[name])
            }
        return settled

    def _is_done(self, name: str, signature: Signature) -> bool:
        return name in self._done and self._done[name].signature == signature

    def _signatures(self) -> Iterator[tuple[str, Signature]]:
        self._files = candidates(self._folder, self._pattern, real_path(self._repo.folder))
        for name, entries in self._files.items():
            files: dict[str, os.stat_result] = {}
            for entry in entries:
                files |= _files(self._folder / entry, entry)
            if f"{name}/{HF_FIRST}" in files and f"{name}/{HF_LAST}" not in files:
                continue
            yield (
                name,
                tuple(
                    (path, status.st_size, status.st_mtime_ns, status.st_ino)
                    for path, status in sorted(files.items())
                ),
            )

    def _checkpoints(self, settled: dict[str, Signature]) -> list[Found]:
        """Return the checkpoints among the settled entries, by step."""
        if not settled:
            return []
        try:
            found, _ = survey(self._folder, self._pattern, real_path(self._repo.folder))
        except NotFoundError:
            found = []
        names = {checkpoint.name for checkpoint in found}
        for name in settled.keys() - names:  # not a checkpoint, until it changes
            self._done[name] = _Taken(settled[name], self._turn)
        return [checkpoint for checkpoint in found if checkpoint.name in settled]

    # -- commit --------------------------------------------------------------------------------

    def _commit(self, found: Found, signature: Signature) -> Iterator[WatchEvent]:
        try:
            contents = self._history()
            contents.forget(found.name)
            commit = contents.find(found)
            if commit is None:
                if found.problem is not None:
                    raise found.problem
                branch, stays = self._lines.branch_for(found.name)
                request = Request(found.name, found.step, {}, self._codec, branch, stays)
                request.origin = capture_beside(self._repo.commit_config())
                result = commit_path(self._repo, found.path, request, files=found.files)
                self._lines.add(found.name, result)
                contents.add(result.id, result.commit)
                commit = result.id
                yield WatchEvent(
                    found.name, result.commit.step, result.id, found.size_bytes, result.notes
                )
        except (BusyError, ConflictError) as error:  # try again at the next look
            self._contents = None  # another process works, or the commit was made after all
            yield from self._report(found.name, found.step, error)
            return
        except (InvalidInputError, NotFoundError) as error:
            self._refused[found.name, signature] += 1
            if _may_pass(error) and self._refused[found.name, signature] < _TRIES:
                return  # try again at the next look
            self._done[found.name] = _Taken(signature, self._turn, found)
            yield from self._report(found.name, found.step, found.problem or error)
            return
        self._done[found.name] = _Taken(signature, self._turn, found, commit)
        self._refused.clear()

    def _history(self) -> Contents:
        """Return the content of the history; read it if another process may have changed it."""
        if self._contents is None:
            self._contents = Contents(self._repo)
            self._lines.learn(self._since)
        return self._contents

    def _report(self, name: str, step: int | None, error: CkptError) -> Iterator[WatchEvent]:
        if self._is_news(name, error.message):
            yield WatchEvent(name, step, problem=error)

    def _is_news(self, name: str, text: str) -> bool:
        """Return whether the last report about a checkpoint was another one."""
        before, self._told[name] = self._told.get(name), text
        return text != before

    # -- remove --------------------------------------------------------------------------------

    def _by_age(self) -> list[str]:
        """Return the names of the committed checkpoints, oldest first.

        They are in the order in which the watch saw them, before that in the order of commits.
        Files that are overwritten again and again (`last.pt`) are left out.
        """
        commits = {
            name: taken.id
            for name, taken in self._done.items()
            if taken.id is not None and not is_alias(name)
        }
        if self._keep_local is None or len(commits) <= self._keep_local:
            return list(commits)
        order = {commit: at for at, commit in enumerate(self._lines.by_age(commits.values()))}
        return sorted(commits, key=lambda name: (self._done[name].turn, order[commits[name]]))

    def _remove(self, count: int) -> Iterator[WatchEvent]:
        """Delete the originals of all committed checkpoints but the newest `count`."""
        removable = []
        committed = [
            (taken.found, taken.id)
            for name in self._order
            if (taken := self._done.get(name)) and taken.found is not None and taken.id is not None
        ]
        for found, commit in committed[:-count]:
            kept = self._keeper.why_kept(commit, accept_near=self._accept_near)
            if kept is None:
                removable.append((found, commit))
            elif self._is_news(found.name, kept):
                yield WatchEvent(found.name, found.step, commit, removal=Removal(keep_reason=kept))
        if not removable:
            return
        try:
            with self._keeper.removing(self._folder, accept_near=self._accept_near) as remove:
                for found, commit in removable:
                    done = remove(commit, found.top)
                    if self._is_news(found.name, done.keep_reason or "") or not done.keep_reason:
                        yield WatchEvent(found.name, found.step, commit, removal=done)
        except BusyError:
            return  # try again at the next look


def _may_pass(error: CkptError) -> bool:
    """Return whether the system refused, for a reason that may disappear until the next look."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno not in _LASTING


def _files(path: Path, name: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the regular files at or below a path by name; links are not followed."""
    stack = [(path, name)]
    while stack:
        path, name = stack.pop()
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield name, status
            elif stat.S_ISDIR(status.st_mode):
                stack += [(below, f"{name}/{below.name}") for below in path.iterdir()]
        except OSError:
            continue  # it was deleted, or access is denied


def _open_for_writing(folder: Path) -> Iterator[str]:
    """Yield the names in a folder that a process of this user writes to, also below them.

    Only Linux lists the open files of processes.
    """
    root = real_path(folder)
    for process in _listed(Path("/proc")):
        for handle in _listed(process / "fd") if process.name.isdecimal() else ():
            try:
                target = handle.readlink()
                if root not in target.parents:
                    continue
                about = (process / "fdinfo" / handle.name).read_text("ascii")
            except OSError:
                continue  # the process ended
            flags = re.search(r"^flags:\s*([0-7]+)$", about, re.MULTILINE)
            if flags and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY:
                yield target.relative_to(root).parts[0]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []  # another user's process, or a system without /proc
