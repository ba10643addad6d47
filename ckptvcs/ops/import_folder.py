"""Import: a folder of checkpoints -> one commit for each, proven, and only then no originals.

    look      what is in the folder, and which of it is in the history already
    commit    the others, by step; each is proven as soon as it is there
    remove    those originals, one by one, that can be had again, if that is asked for

Content is told by its hashes, so that an import which was interrupted goes on where it stopped, and
a copy of a checkpoint is not committed again.  HEAD stays on its branch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ckptvcs.checkpoint.survey import Found, survey
from ckptvcs.errors import CkptError, CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.files.removal import Originals
from ckptvcs.history.log import LogEntry
from ckptvcs.history.refs import check_name
from ckptvcs.ops.commit import commit_path
from ckptvcs.ops.originals import Contents, Keeper, Removal
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import ObjectId

_AFTER_ALL = 1 << 62  # above every step


@dataclass
class ImportItem:
    """A checkpoint of an imported folder, and its state.

    Attributes:
        found: The checkpoint on disk.
        action: `commit` (not done yet), `committed`, `known` (already in the history) or `failed`.
        id: The commit that contains the checkpoint; None before it is known.
        branch: The branch of a new commit.
        same_as: The name of an earlier checkpoint of the folder with the same content.
        notes: Warnings for the user.
        problem: The error, if `action` is `failed`.
        gone: What happened to the source files.
    """

    found: Found
    action: str = "commit"
    id: ObjectId | None = None
    branch: str | None = None
    same_as: str | None = None
    notes: tuple[str, ...] = ()
    problem: CkptError | None = None
    gone: Removal = field(default_factory=Removal)

    def fail(self, problem: CkptError) -> None:
        """Mark the checkpoint as failed."""
        self.action, self.problem = "failed", problem


Watch = Callable[[ImportItem], None]
"""Called with each item when all that was to be done with it is done."""


@dataclass
class _Line:
    """A branch as an import sees it: what goes to it must be above its step, and has a step,
    unless it is `loose`.
    """

    branch: str | None
    step: int
    loose: bool

    def takes(self, step: int | None) -> bool:
        return self.loose if step is None else step > self.step


class Importer:
    """Imports the checkpoints of one folder; see `Repo.import_folder`."""

    def __init__(
        self,
        repo: Repository,
        folder: Path,
        *,
        pattern: str | None = None,
        branch: str | None = None,
        codec: str | None = None,
    ) -> None:
        """Look at the folder; see `ckptvcs.checkpoint.survey`.

        Raises:
            NotFoundError: there is no such folder, or no checkpoint in it.
            InvalidInputError: it is a checkpoint itself, or part of the repository; no such codec.
        """
        self.repo, self.folder, self._codec = repo, folder, codec
        self._keeper = Keeper(repo, codec)
        self._wanted = check_name(branch, "branch") if branch else None
        found, self.left_out = survey(folder, pattern, real_path(repo.folder))
        self.items = [ImportItem(one) for one in found]
        for item in self.items:
            if item.found.problem is not None:
                item.fail(item.found.problem)
        self._contents = Contents(repo)
        self._first: dict[ObjectId, str] = {}  # the first of this folder that is this commit

    # -- in ----------------------------------------------------------------------------------------

    def look(self, progress: Progress) -> None:
        """Find the checkpoints that the history already contains.

        Files are read only if their size matches a commit.

        Args:
            progress: Called with the number of bytes that were read since its last call.
        """
        for item in self.items:
            if item.action == "commit":
                self._recognise(item, progress)

    def _recognise(self, item: ImportItem, progress: Progress) -> None:
        try:
            known = self._contents.find(item.found, progress)
        except CkptError as error:
            item.fail(error)
            return
        if known is not None:
            item.action, item.id = "known", known
            first = self._first.setdefault(known, item.found.name)
            item.same_as = first if first != item.found.name else None

    def run(self, progress: Progress, watch: Watch) -> None:
        """Commit the new checkpoints, and verify each commit by restoring it.

        A checkpoint that fails gets its error as `problem`; the import continues.

        Args:
            progress: Called with the number of bytes that were processed since its last call.
            watch: Called with each item when it is done.

        Raises:
            ConflictError: Another writer moved the branch meanwhile.
            BusyError: gc is deleting.
            StorageError: The disk is full or fails; earlier commits are kept.
        """
        lines = self._lines()
        for item in self.items:
            half = _Half(item.found.size_bytes, progress)
            if item.action == "commit":  # an earlier one of this folder may hold the same
                self._recognise(item, quiet)  # the bar has no bytes for this
            if item.action == "commit":
                self._commit(item, lines, half)
            half.fill(1)
            if item.id is not None:
                self._prove(item, half)
            half.fill(2)
            watch(item)

    def _commit(self, item: ImportItem, lines: list[_Line], progress: Progress) -> None:
        found = item.found
        line = next((line for line in lines if line.takes(found.step)), None)
        if line is None:
            if not self._own(lines[0]):
                lines.clear()  # this run is another one than that of the branch
            loose = found.step is None
            line = _Line(self._side_branch(), _AFTER_ALL if loose else -1, loose)
            lines.append(line)
        try:
            made = commit_path(
                self.repo,
                found.path,
                message=found.name,
                step=found.step,
                codec=self._codec,
                branch=line.branch,
                files=found.files,
                progress=progress,
            )
        except (InvalidInputError, NotFoundError, CorruptionError) as error:
            item.fail(error)
            return
        line.branch = made.branch
        line.step = line.step if made.commit.step is None else made.commit.step
        item.action, item.id = "committed", made.id
        item.branch, item.notes = made.branch, made.notes
        self._first[made.id] = found.name
        self._contents.add(made.id, made.commit)

    def _prove(self, item: ImportItem, progress: Progress) -> None:
        assert item.id is not None
        try:
            self._keeper.is_exact(item.id, progress)
        except (CorruptionError, NotFoundError) as error:
            item.fail(error)

    # -- where it goes -----------------------------------------------------------------------------

    def _lines(self) -> list[_Line]:
        """The branches that may be committed to, in order of preference: those that end with a
        checkpoint of this folder, or else the one that was asked for, or HEAD's.
        """
        steps = {item.id: item.found.step for item in self.items if item.id is not None}
        main = self._main()
        lines = [main] if self._own(main) else []
        for name in self.repo.refs.names("heads"):
            tip = self.repo.revisions.branch(name)
            side = name != main.branch and re.fullmatch(rf"{re.escape(self._stem())}-[0-9]+", name)
            if side and tip in steps:
                step = steps[tip]
                lines.append(_Line(name, _AFTER_ALL if step is None else step, step is None))
        return lines or [main]

    def _main(self) -> _Line:
        head = self.repo.head()
        branch = self._wanted or (head.branch if head else "main")
        tip = self.repo.revisions.branch(branch) if branch else None
        if tip is None and self._wanted:  # a new branch begins at HEAD
            tip = self.repo.revisions.head()
        line = self.repo.catalog.line(tip) if branch else iter(())
        step = next((commit.step for _, commit in line if commit.step is not None), -1)
        loose = all(item.found.step is None for item in self.items)
        return _Line(branch, step, loose)

    def _own(self, line: _Line) -> bool:
        """Whether a branch ends with a checkpoint of this folder."""
        tip = self.repo.revisions.branch(line.branch) if line.branch else None
        return tip is not None and any(item.id == tip for item in self.items)

    def _stem(self) -> str:
        head = self.repo.head()
        branch = self._wanted or (head.branch if head else None) or "main"
        return re.sub(r"-[0-9]+\Z", "", branch)

    def _side_branch(self) -> str:
        """A branch that is not there yet: a commit to it leaves HEAD where it is."""
        taken = set(self.repo.refs.names("heads"))
        number = 2
        while f"{self._stem()}-{number}" in taken:
            number += 1
        return f"{self._stem()}-{number}"

    # -- out ---------------------------------------------------------------------------------------

    def entry(self, item: ImportItem) -> LogEntry | None:
        """The commit of an item as it is now: it may have faded since it was made."""
        return None if item.id is None else self.repo.entry(item.id)

    def totals(self) -> tuple[int, int]:
        """Bytes of all commits that items are, each counted once: as committed, and on disk."""
        names = {item.id for item in self.items if item.id is not None}
        entries = [self.repo.entry(name) for name in names]
        return sum(e.commit.raw_bytes for e in entries), sum(e.stored_bytes for e in entries)

    def why_kept(self, item: ImportItem, *, accept_near: bool) -> str | None:
        """Why the originals of an item may not be removed; None if they may, as far as can be told
        without reading them.
        """
        if item.problem is not None:
            return item.problem.message
        if item.id is None:
            return "it is not committed"
        return self._keeper.why_kept(item.id, accept_near=accept_near)

    def remove(self, *, accept_near: bool, progress: Progress, watch: Watch) -> None:
        """Delete the originals of what is kept exactly, or with `accept_near` at least near; see
        `Keeper.remove`.

        Raises:
            BusyError: gc is sweeping.
        """
        with self._keeper.at_work(), Originals(self.folder) as originals:
            for item in self.items:
                item.gone.kept = self.why_kept(item, accept_near=accept_near)
                if item.id is not None and item.gone.kept is None:
                    item.gone = self._keeper.remove(
                        item.id, item.found.top, originals, progress, accept_near=accept_near
                    )
                watch(item)


class _Half:
    """Bytes of an item, shown as dealt with when they are both committed and proven."""

    def __init__(self, size_bytes: int, progress: Progress) -> None:
        self._size, self._progress = size_bytes, progress
        self._done = self._shown = 0

    def __call__(self, count: int) -> None:
        self._done = min(self._done + count, 2 * self._size)
        self._progress(self._done // 2 - self._shown)
        self._shown = self._done // 2

    def fill(self, halves: int) -> None:
        """All of so many halves is done, whatever was counted."""
        self(max(0, halves * self._size - self._done))
