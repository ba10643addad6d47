"""Watch: checkpoints are committed as any trainer writes them to a folder.

    look      what is there, and since when it is as it is
    settle    nobody writes to it any more: as far as can be told, it is complete
    commit    by step; what the history has already, from before a restart, is known by its content
    remove    originals beyond the newest few, where that is asked for and they can be had again

Nothing is remembered outside the history: a watch that is started again finds its place.
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
from ckptvcs.files.removal import Originals
from ckptvcs.ops.commit import commit_path
from ckptvcs.ops.originals import Contents, Keeper, Removal
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.series import Lines
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import ObjectId

_TRIES = 3  # looks at what the system refuses to read
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
"""Of each file: its path, size, time of change and number."""


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
        gone: What happened to the source files, if they were due for deletion.
    """

    name: str
    step: int | None
    id: ObjectId | None = None
    raw_bytes: int = 0
    notes: tuple[str, ...] = ()
    problem: CkptError | None = None
    gone: Removal | None = None


@dataclass(frozen=True)
class _Taken:
    """A checkpoint that was dealt with as it is: the commit that has it, if one has; `turn` counts
    the looks that took something.
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
        """A checkpoint is taken when it has not changed for `settle` seconds; `keep_local` is how
        many of the newest stay in the folder (None: all).

        Raises:
            InvalidInputError: the folder is part of the repository; no such codec; a bad number.
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
        self._files: Mapping[str, Sequence[str]] = {}  # the entries that each name stands for
        self._written: set[str] = set()  # entries that somebody has open to write
        self._done: dict[str, _Taken] = {}
        self._order: list[str] = []  # of what is done, the oldest first
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
            there = self._found(settled)
        except InvalidInputError as error:
            if not _may_pass(error):
                raise
            yield from self._tell(self.name, None, error)
            return
        self._told.pop(self.name, None)
        for found in there:
            yield from self._take(found, settled[found.name])
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
            if name not in self._done or self._done[name].signature != signature
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

    # -- what is there -------------------------------------------------------------------------

    def _settled(self) -> dict[str, Signature]:
        """What is new and has not changed for a while, and nobody has open to write."""
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
            if now - since >= self._settle
            and (name not in self._done or self._done[name].signature != signature)
        }
        if settled:
            self._written = set(_open_for_writing(self._folder))
            settled = {
                name: one
                for name, one in settled.items()
                if self._written.isdisjoint(self._files[name])
            }
        return settled

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

    def _found(self, settled: dict[str, Signature]) -> list[Found]:
        """The checkpoints among what has settled, by step."""
        if not settled:
            return []
        try:
            found, _ = survey(self._folder, self._pattern, real_path(self._repo.folder))
        except NotFoundError:
            found = []
        names = {one.name for one in found}
        for name in settled.keys() - names:  # no checkpoint, and none as long as it is like this
            self._done[name] = _Taken(settled[name], self._turn)
        return [one for one in found if one.name in settled]

    # -- in ------------------------------------------------------------------------------------

    def _take(self, found: Found, signature: Signature) -> Iterator[WatchEvent]:
        try:
            contents = self._known()
            contents.forget(found.name)
            known = contents.find(found, lambda _: None)
            if known is None:
                if found.problem is not None:
                    raise found.problem
                branch, head_stays = self._lines.branch_for(found.name)
                made = commit_path(
                    self._repo,
                    found.path,
                    message=found.name,
                    step=found.step,
                    codec=self._codec,
                    branch=branch,
                    files=found.files,
                    head_stays=head_stays,
                )
                self._lines.add(found.name, made)
                contents.add(made.id, made.commit)
                known = made.id
                yield WatchEvent(
                    found.name, made.commit.step, made.id, found.size_bytes, made.notes
                )
        except (BusyError, ConflictError) as error:  # until the next look
            self._contents = None  # somebody else is at work, or a commit was made all the same
            yield from self._tell(found.name, found.step, error)
            return
        except (InvalidInputError, NotFoundError) as error:
            self._refused[found.name, signature] += 1
            if _may_pass(error) and self._refused[found.name, signature] < _TRIES:
                return  # until the next look
            self._done[found.name] = _Taken(signature, self._turn, found)
            yield from self._tell(found.name, found.step, found.problem or error)
            return
        self._done[found.name] = _Taken(signature, self._turn, found, known)
        self._refused.clear()

    def _known(self) -> Contents:
        """What the history has."""
        if self._contents is None:
            self._contents = Contents(self._repo)
            self._lines.learn(self._since)
        return self._contents

    def _tell(self, name: str, step: int | None, error: CkptError) -> Iterator[WatchEvent]:
        if self._told.get(name) != error.message:
            self._told[name] = error.message
            yield WatchEvent(name, step, problem=error)

    # -- out -----------------------------------------------------------------------------------

    def _by_age(self) -> list[str]:
        """The names of what is in the history, the oldest first: as it came while it was watched,
        before that by the order of commits.  What is written again and again (`last.pt`) is not
        among them.
        """
        held = {
            name: taken.id
            for name, taken in self._done.items()
            if taken.id is not None and not is_alias(name)
        }
        if self._keep_local is None or len(held) <= self._keep_local:
            return list(held)
        places = {commit: at for at, commit in enumerate(self._lines.by_age(held.values()))}
        return sorted(held, key=lambda name: (self._done[name].turn, places[held[name]]))

    def _remove(self, count: int) -> Iterator[WatchEvent]:
        """Remove the originals of all but the newest `count` that are in the history."""
        able = []
        held = [
            (taken.found, taken.id)
            for name in self._order
            if (taken := self._done.get(name)) and taken.found is not None and taken.id is not None
        ]
        for found, made in held[:-count]:
            kept = self._keeper.why_kept(made, accept_near=self._accept_near)
            if kept is None:
                able.append((found, made))
            elif self._told.get(found.name) != kept:
                self._told[found.name] = kept
                yield WatchEvent(found.name, found.step, made, gone=Removal(kept=kept))
        if not able:
            return
        try:
            with self._keeper.at_work(), Originals(self._folder) as originals:
                for found, made in able:
                    gone = self._keeper.remove(
                        made, found.top, originals, lambda _: None, accept_near=self._accept_near
                    )
                    if gone.kept is None or self._told.get(found.name) != gone.kept:
                        self._told[found.name] = gone.kept or ""
                        yield WatchEvent(found.name, found.step, made, gone=gone)
        except BusyError:
            return  # until the next look


def _may_pass(error: CkptError) -> bool:
    """Whether it is the system that has refused, for a reason that may be gone at the next look."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno not in _LASTING


def _files(path: Path, name: str) -> Iterator[tuple[str, os.stat_result]]:
    """The regular files at or below a path, by their names; nothing is followed."""
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
            continue  # it is gone again, or nobody may look at it


def _open_for_writing(folder: Path) -> Iterator[str]:
    """The names in a folder that a process of this user writes to, or to something below: where the
    system tells (Linux).
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
                continue  # it has ended
            flags = re.search(r"^flags:\s*([0-7]+)$", about, re.MULTILINE)
            if flags and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY:
                yield target.relative_to(root).parts[0]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []  # somebody else's, or there is no such thing on this system
