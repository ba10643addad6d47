"""Import a folder of checkpoints: one verified commit for each.

look      list the checkpoints, and find those that the history already contains
commit    commit the others by step, and verify each commit immediately
remove    if asked to, delete the originals that the repository can restore

`run` commits all, and `remove` deletes all that it may.  `run_and_remove` does both for one
checkpoint after another: the disk never gets fuller than by the first commit.

Checkpoints are recognized by their hashes.  An interrupted import therefore continues, and a copy
of a checkpoint is not committed again.  HEAD does not move to a new branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ckptvcs.checkpoint.survey import Found, survey
from ckptvcs.errors import (
    CkptError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from ckptvcs.gc.fading import Faded
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import LogEntry
from ckptvcs.history.refs import check_name
from ckptvcs.ops import archiving
from ckptvcs.ops.commit import CommitResult, commit_path
from ckptvcs.ops.gc import archive_directly, collect
from ckptvcs.ops.import_branches import Branch, Branching, placed
from ckptvcs.ops.import_estimate import Estimate, Forecast, Group, forecast
from ckptvcs.ops.originals import Contents, Keeper, Removal
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.disk import is_full, real_path
from ckptvcs.store.ids import ObjectId

_WINDOW = 4  # segments of commits that keep their exact patches until they are archived
_PASSES = 3  # over each checkpoint: read, encode, verify


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
        removal: What happened to the source files.
        forecast: The estimated commit of a checkpoint that is not committed.
    """

    found: Found
    action: str = "commit"
    id: ObjectId | None = None
    branch: str | None = None
    same_as: str | None = None
    notes: tuple[str, ...] = ()
    problem: CkptError | None = None
    removal: Removal = field(default_factory=Removal)
    forecast: Forecast | None = None

    def fail(self, problem: CkptError) -> None:
        """Mark the checkpoint as failed."""
        self.action, self.problem = "failed", problem


Watch = Callable[[ImportItem], None]
"""Called with each item when it is done."""


class Importer:
    """Imports the checkpoints of one folder; see `Repo.import_folder`.

    Attributes:
        items: The checkpoints.
        skipped: The other entries of the folder.
        faded: The commits of other checkpoints that became near with the new ones.
    """

    def __init__(
        self,
        repo: Repository,
        folder: Path,
        *,
        pattern: str | None = None,
        branch: str | None = None,
        codec: str | None = None,
    ) -> None:
        """List the checkpoints of the folder; see `ckptvcs.checkpoint.survey`.

        Raises:
            NotFoundError: The folder does not exist, or contains no checkpoint.
            InvalidInputError: The folder is a checkpoint or a part of the repository, or the codec
                does not exist.
        """
        self.repo, self.folder, self._codec = repo, folder, codec
        self._keeper = Keeper(repo, codec)
        found, self.skipped = survey(folder, pattern, real_path(repo.folder))
        self.items = [ImportItem(checkpoint) for checkpoint in found]
        wanted = check_name(branch, "branch") if branch else None
        self._branching = Branching(repo, self.items, wanted)
        for item in self.items:
            if item.found.problem is not None:
                item.fail(item.found.problem)
        self._contents = Contents(repo)
        self._first: dict[ObjectId, str] = {}  # the first name of each commit
        self.faded: list[Faded] = []

    # -- commit ------------------------------------------------------------------------------------

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
            commit = self._contents.find(item.found, progress)
        except CkptError as error:
            item.fail(error)
            return
        if commit is not None:
            item.action, item.id = "known", commit
            first = self._first.setdefault(commit, item.found.name)
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
        branches = self._branching.present()
        for item in self.items:
            self._add(item, branches, progress)
            watch(item)

    def _add(self, item: ImportItem, branches: list[Branch], progress: Progress) -> None:
        """Commit an item that is new, and verify its commit."""
        counted = _ItemProgress(item.found.size_bytes, progress)
        try:
            self._commit_new(item, branches, counted)
        except StorageError as error:
            if is_full(error):
                error.hint = "add --delete-originals, which frees room for the next commit"
            raise
        if item.id is not None:
            self._prove(item, item.id, counted)
        counted.fill(_PASSES)

    def run_and_remove(self, *, accept_near: bool, progress: Progress, watch: Watch) -> None:
        """Commit and verify one checkpoint, delete its originals, and go on to the next one.

        Checkpoints that the history already contains come first, because they need no room.  On a
        full disk, the caches are deleted.  With `accept_near`, the only exact patches that are
        written are those of the newest commits, which keep them.  Without it, each commit that is
        exact only through its exact patch is pinned.  The other rules are those of `Keeper.remove`.

        A checkpoint that fails gets its error as `problem`; the import continues.

        Args:
            accept_near: Also delete originals whose commit is only near.
            progress: Called with the number of bytes that were processed since its last call.
            watch: Called with each item when it is done.

        Raises:
            ConflictError: Another writer moved the branch meanwhile.
            BusyError: gc is deleting.
            StorageError: The disk is full or fails; finished checkpoints stay committed.
        """
        branches = self._branching.present()
        for item in sorted(self.items, key=lambda item: item.action == "commit"):
            counted = _ItemProgress(item.found.size_bytes, progress)
            self._commit_new(item, branches, counted, fades=accept_near)
            item.removal.keep_reason = self.why_kept(item, accept_near=accept_near)
            if item.id is not None and item.removal.keep_reason is None:
                self._remove_one(item, item.id, accept_near=accept_near, progress=counted)
            elif item.id is not None:
                self._prove(item, item.id, counted)
            counted.fill(_PASSES)
            watch(item)

    def run_archived(
        self, *, delete: bool, accept_near: bool, progress: Progress, watch: Watch
    ) -> None:
        """Commit and verify the checkpoints, and archive them from their exact form.

        The settings `archive-every` and `archive-lag` apply.  The newest commits stay exact or
        near, by `keep-exact` and `archive-after`.  A few commits at a time keep the exact patches
        that the archiving needs.  Commits from before the import stay as they are.

        Args:
            delete: Delete the originals that `accept_near` allows, once they are archived.
            accept_near: Also delete originals whose commit is only near or archived.
            progress: Called with the number of bytes that were processed since its last call.
            watch: Called with each item when it is done.

        Raises:
            ConflictError: Another writer moved the branch meanwhile.
            BusyError: gc is deleting.
            StorageError: The disk is full or fails; earlier commits are kept.
        """
        config = self.repo.config
        rule = archiving.rule_of(config)
        self.repo.held_exact = (_WINDOW + 1) * rule.every + rule.after
        branches, waiting = self._branching.present(), list[ImportItem]()

        def settle() -> list[ImportItem]:
            new = [item.id for item in self.items if item.action == "committed" and item.id]
            if new:
                archive_directly(self.repo, set(new))
            archived = self.repo.catalog.archived()
            done = [item for item in waiting if item.id in archived or item.id is None]
            for item in done:
                self._finish(item, delete=delete, accept_near=accept_near, watch=watch)
            return [item for item in waiting if item not in done]

        try:
            for item in self.items:
                self._add(item, branches, progress)
                waiting.append(item)
                if len(waiting) > _WINDOW * rule.every + rule.after:
                    waiting = settle()
            waiting = settle()
        finally:
            self.repo.held_exact = 0
        collect(self.repo, Policy())  # patches that were kept for the archiving
        for item in waiting:
            self._finish(item, delete=delete, accept_near=accept_near, watch=watch)

    def _finish(self, item: ImportItem, *, delete: bool, accept_near: bool, watch: Watch) -> None:
        """Verify the final form of a commit, and delete its originals if that is allowed."""
        if item.id is not None and item.problem is None:
            item.removal.keep_reason = self.why_kept(item, accept_near=accept_near)
            if delete and item.removal.keep_reason is None:
                self._remove_one(item, item.id, accept_near=accept_near, progress=quiet)
            else:
                self._prove(item, item.id, quiet)
        watch(item)

    def _prove(self, item: ImportItem, commit: ObjectId, progress: Progress) -> None:
        try:
            self._keeper.is_exact(commit, progress)
        except (CorruptionError, NotFoundError) as error:
            item.fail(error)

    def _remove_one(
        self, item: ImportItem, commit: ObjectId, *, accept_near: bool, progress: Progress
    ) -> None:
        """Delete the originals of an item; on a full disk, give up the caches and try again."""

        def attempt() -> CkptError | None:
            item.removal.error = None
            try:
                with self._keeper.removing(
                    self.folder, accept_near=accept_near, progress=progress
                ) as remove:
                    return remove(commit, item.found.top, item.removal).error
            except StorageError as error:  # no room for a lease
                if not is_full(error):
                    raise
                return error

        error = attempt()
        if isinstance(error, StorageError) and is_full(error):
            self.repo.make_room(error)
            error = attempt()
            if isinstance(error, StorageError) and is_full(error):
                raise error
        if isinstance(error, CorruptionError | NotFoundError):
            item.fail(error)

    def _commit_new(
        self,
        item: ImportItem,
        branches: list[Branch],
        progress: _ItemProgress,
        *,
        fades: bool = False,
    ) -> None:
        """Commit an item that is new; with `fades`, without an exact patch that would expire."""
        if item.action == "commit":  # this run may have committed the same content
            self._recognise(item, quiet)  # not part of the total of the progress bar
        if item.action == "commit":
            self._commit(item, branches, progress, fades=fades)
        progress.fill(2)

    def _commit(
        self, item: ImportItem, branches: list[Branch], progress: Progress, *, fades: bool
    ) -> None:
        found = item.found
        branch = self._branching.branch_for(found.step, branches)
        request = Request(found.name, found.step, codec=self._codec, branch=branch.name)
        request.fades = fades and self._branching.will_fade(item, branch, branches)
        try:
            result = self._commit_in_room(found, request, progress, may_fade=fades)
        except (InvalidInputError, NotFoundError, CorruptionError) as error:
            item.fail(error)
            return
        branch.name, branch.tip = result.branch, result.id
        branch.advance(result.commit.step)
        self.faded += [row for row in result.faded if row.id not in self._first]
        item.action, item.id = "committed", result.id
        item.branch, item.notes = result.branch, result.notes
        self._first[result.id] = found.name
        self._contents.add(result.id, result.commit)

    def _commit_in_room(
        self, found: Found, request: Request, progress: Progress, *, may_fade: bool
    ) -> CommitResult:
        """Commit; on a full disk without the caches, and if it `may_fade` without a patch."""
        commit = partial(commit_path, self.repo, found.path, files=found.files, progress=progress)
        tip = self._tip(request)
        try:
            return commit(request)
        except StorageError as error:
            self.repo.make_room(error)
            if self._tip(request) != tip:  # the commit was made
                raise
        try:
            return commit(request)
        except StorageError as error:
            if not (is_full(error) and may_fade) or request.fades or self._tip(request) != tip:
                raise
        return commit(replace(request, fades=True))

    def _tip(self, request: Request) -> ObjectId | None:
        head = self.repo.head()
        name = request.branch or (head.branch if head else None)
        return self.repo.revisions.branch(name) if name else self.repo.revisions.head()

    # -- results -----------------------------------------------------------------------------------

    def entry(self, item: ImportItem) -> LogEntry | None:
        """Return the commit of an item; its exact patch may have expired since the commit."""
        return None if item.id is None else self.repo.entry(item.id)

    def totals(self) -> tuple[int, int, int]:
        """Return the bytes of the commits, each counted once.

        Returns:
            The bytes as committed, those on disk without exact patches, and the exact patches that
            stay when newer commits are made.
        """
        names = {item.id for item in self.items if item.id is not None}
        entries = [self.repo.entry(name) for name in names]
        return (
            sum(entry.commit.raw_bytes for entry in entries),
            sum(entry.stored_bytes for entry in entries),
            sum(entry.exact_bytes for entry in entries if entry.exact_lasts),
        )

    def estimate(
        self, *, delete: bool, accept_near: bool, progress: Progress = quiet
    ) -> Estimate | None:
        """Estimate the commits of the new checkpoints, without changing the repository.

        This sets the `forecast` of each item that is not committed yet, and why its originals would
        stay.  Two checkpoints of each branch are encoded in a temporary directory.

        Args:
            delete: Whether originals would be deleted.
            accept_near: Also those whose commit is only near.
            progress: Called with the number of bytes that were processed since its last call.

        Returns:
            None if nothing is new, or if no temporary directory has room.
        """
        ends = self._branching.present()
        groups: dict[int, tuple[ObjectId | None, list[Found]]] = {}
        new = [item for item in self.items if item.action == "commit"]
        for item, end in zip(new, placed((item.found.step for item in new), ends), strict=True):
            groups.setdefault(id(end), (end.tip, []))[1].append(item.found)
        rows = [Group(tip, members) for tip, members in groups.values()]
        pins = delete and not accept_near
        done = forecast(self.repo, rows, self._codec, pins=pins, progress=progress)
        if done is None:
            return None
        for item in new:
            item.forecast = done[1][item.found.name]
            if delete and not (accept_near or item.forecast.exact_lasts):
                item.removal.keep_reason = "its commit would not stay exact"
        return done[0]

    def near_known(self) -> int:
        """Return how many known checkpoints stay near, although the codec is lossless."""
        if self.repo.config.codec_of(self._codec).settings is not None:
            return 0
        known = [self.entry(item) for item in self.items if item.action == "known"]
        return sum(entry is not None and not entry.exact for entry in known)

    def why_kept(self, item: ImportItem, *, accept_near: bool) -> str | None:
        """Return why the originals of an item cannot be deleted, without reading them.

        None means that nothing is known to prevent it.
        """
        if item.problem is not None:
            return item.problem.message
        if item.id is None:
            return "it is not committed"
        step, known = item.found.step, self.repo.catalog.commit(item.id).step
        if step != known and step is not None and known is not None:
            return f"its content is committed as step {known} only"
        return self._keeper.why_kept(item.id, accept_near=accept_near)

    def remove(self, *, accept_near: bool, progress: Progress, watch: Watch) -> None:
        """Delete the originals whose commit is exact, or with `accept_near` at least near.

        See `Keeper.remove`.

        Raises:
            BusyError: gc is deleting.
        """
        with self._keeper.removing(
            self.folder, accept_near=accept_near, progress=progress
        ) as remove_one:
            for item in self.items:
                item.removal.keep_reason = self.why_kept(item, accept_near=accept_near)
                if item.id is not None and item.removal.keep_reason is None:
                    item.removal = remove_one(item.id, item.found.top)
                watch(item)


class _ItemProgress:
    """Progress of one item: a byte counts a third when it is read, encoded and verified."""

    def __init__(self, size_bytes: int, progress: Progress) -> None:
        self._size, self._progress = size_bytes, progress
        self._done = self._shown = 0

    def __call__(self, count: int) -> None:
        self._done = min(self._done + count, _PASSES * self._size)
        self._progress(self._done // _PASSES - self._shown)
        self._shown = self._done // _PASSES

    def reading(self, count: int) -> None:
        """Count bytes of the first pass."""
        self(count)

    def fill(self, passes: int) -> None:
        """Complete the given number of passes, whatever was counted."""
        self(max(0, passes * self._size - self._done))
