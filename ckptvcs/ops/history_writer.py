"""HistoryWriter: the methods of `Repo` that change refs, retention and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptvcs import ops
from ckptvcs.errors import InvalidInputError
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import Bound
from ckptvcs.ops.config import Value, get_setting, set_setting, set_user_setting
from ckptvcs.ops.history_reader import NO_RULES
from ckptvcs.ops.reader import Reader
from ckptvcs.ops.repository import CONFIG
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

if TYPE_CHECKING:
    from ckptvcs.gc.collect import GcPlan
    from ckptvcs.history.note import Note
    from ckptvcs.history.reflog import Undone
    from ckptvcs.ops.each import Function, Visit, Watch
    from ckptvcs.ops.refs import DeletedBranch


class HistoryWriter(Reader):
    """The methods of `Repo` that commit nothing."""

    def branch(self, name: str, revision: str | int = "HEAD") -> ObjectId:
        """Create a branch, and return the id of its commit.

        Args:
            name: The name of the new branch.
            revision: The commit that the branch points to.

        Raises:
            NotFoundError: `revision` names no commit.
            ConflictError: The branch exists.
            InvalidInputError: The name is not valid.
        """
        return ops.refs.create_branch(self._repository, name, revision)

    def rename_branch(self, new: str, old: str | None = None) -> str:
        """Rename a branch, and return its old name.

        HEAD follows the branch if it was on it.  `reflog` lists the earlier moves under the old
        name.

        Args:
            new: The new name.
            old: The branch; None is the branch of HEAD.

        Raises:
            NotFoundError: The branch does not exist, or HEAD is detached.
            ConflictError: The new branch exists.
            InvalidInputError: The new name is not valid.
        """
        return ops.refs.rename_branch(self._repository, old, new)

    def delete_branch(self, name: str) -> DeletedBranch:
        """Delete a branch; its commits are kept until the next gc.

        Args:
            name: The name of the branch.

        Returns:
            The branch, and the commits that no other ref reaches.

        Raises:
            NotFoundError: The branch does not exist.
            ConflictError: HEAD is on the branch.
        """
        return ops.refs.delete_branch(self._repository, name)

    def tag(self, name: str, revision: str | int = "HEAD") -> ObjectId:
        """Create a tag, and return the id of its commit.

        Args:
            name: The name of the new tag.
            revision: The commit that the tag points to.

        Raises:
            NotFoundError: `revision` names no commit.
            ConflictError: The tag exists.
            InvalidInputError: The name is not valid.
        """
        return ops.refs.create_tag(self._repository, name, revision)

    def delete_tag(self, name: str) -> ObjectId:
        """Delete a tag, and return the id of its commit.

        Args:
            name: The name of the tag.

        Raises:
            NotFoundError: The tag does not exist.
        """
        return ops.refs.delete_tag(self._repository, name)

    def pin(self, revision: str | int = "HEAD", *, pinned: bool = True) -> bool:
        """Pin a commit, so that gc keeps it and its exact form; or unpin it.

        A pin does not restore an exact patch that has expired.

        Args:
            revision: The commit to pin.
            pinned: False removes the pin.

        Returns:
            Whether the pin changed.

        Raises:
            NotFoundError: `revision` names no commit.
            BusyError: gc is sweeping, or another process deletes originals and does not finish.
        """
        return ops.refs.set_pin(self._repository, self.resolve(revision), pinned=pinned)

    def note(
        self,
        revision: str | int,
        *,
        message: str | None = None,
        metrics: Mapping[str, float | None] | None = None,
        fields: Mapping[str, str | None] | None = None,
    ) -> Note:
        """Write a message, metrics or fields beside a commit.

        The commit and its id do not change.  For each name, the newest note counts, wherever a
        message or metrics are read: in `log`, `best:METRIC`, `keep-best` and the rules of gc.

        Args:
            revision: The commit.
            message: The new message; None leaves it.
            metrics: New metrics by name; None as a value removes a metric.
            fields: New texts by key; None as a value removes a field.

        Returns:
            The note.

        Raises:
            NotFoundError: `revision` names no commit, or a removed value does not exist.
            InvalidInputError: The note is empty or too large, a value is not valid, or the commit
                has too many notes.
            BusyError: gc is sweeping and does not finish within a minute.
            StorageError: The disk is full, or fails.

        Example:
            >>> repo.note(2000, metrics={"eval_loss": 2.31}, fields={"eval": "wikitext"})
        """
        return ops.note.write(
            self._repository, revision, message=message, metrics=metrics, fields=fields
        )

    def each(
        self,
        function: Function | None = None,
        start: Bound = None,
        stop: Bound = None,
        *,
        command: Sequence[str] | None = None,
        metrics: Sequence[str] = (),
        every: int | None = None,
        revision: str | int | None = None,
        only: str | None = None,
        form: str | None = None,
        jobs: int = 1,
        fail_fast: bool = False,
        watch: Watch | None = None,
    ) -> list[Visit]:
        """Call a function, or run a command, once on every commit of a range, oldest first.

        Each commit is written to a temporary path, and decoded from the one before it.  Metrics
        that are returned are stored at once with `note`.

        Args:
            function: Called with the commit and the path; returns metrics by name, or None.
            start: As for `line`.
            stop: As for `line`.
            command: A command, run without a shell instead of a function.  The path replaces `{}`,
                the step `{step}`, the id `{id}`.  It prints metrics as a line of JSON.
            metrics: Skip commits that have all of these metrics.
            every: As for `line`.
            revision: As for `line`.
            only: As for `export`.
            form: As for `export`.
            jobs: The number of calls at the same time, each in a thread.
            fail_fast: Begin no further call after the first failure.
            watch: Called with each result and the number of commits that are left.

        Returns:
            The results, oldest first.  A failure is in `error`, not raised.

        Raises:
            NotFoundError: The range contains no commit.
            InvalidInputError: An argument is not valid, or the program does not exist.
            StorageError: The disk is full, or fails.

        Example:
            >>> repo.each(lambda entry, path: {"eval_loss": evaluate(path)}, 1000, 9000)
        """
        if (function is None) == (command is None):
            raise InvalidInputError("pass either a function or a command")
        run = function or ops.command.MetricCommand(command or ())
        names = self._repository.history.line(start, stop, every, revision=revision)
        options = metrics, only, form, jobs, fail_fast, watch
        return ops.each.each(self._repository, run, names, *options)

    def gc(
        self,
        policy: Policy = NO_RULES,
        *,
        sweep: bool = True,
        now: bool = False,
        rekey: bool = False,
        archive: bool | None = None,
        progress: Progress = quiet,
    ) -> GcPlan:
        """Drop the commits that no rule keeps, and delete unreferenced data.

        The data of a dropped commit stays for the time of the setting `gc-grace`, and `undo` can
        restore the commit.  A later gc deletes the data.

        gc also deletes the exact patches that the settings do not keep, and merges tiny packs.  It
        works on a full disk, except with `rekey`.

        Args:
            policy: The retention rules; the default keeps every commit.
            sweep: False only records the drops, and deletes nothing.
            now: Delete the data of all dropped commits at once, without the grace period.
            rekey: Re-encode deltas that depend on deleted commits, and limit the length of each
                chain to the settings.
            archive: Archive old commits by the settings `archive-after`, `archive-every` and
                `archive-lag`. Commits that no rule of `policy` keeps are archived, not dropped.
                None archives if the setting `archive-after` is a number.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The decision about each commit, and the freed sizes in bytes on disk.

        Raises:
            BusyError: Another process is writing.
            CorruptionError: An object that a commit needs is missing; nothing was deleted.
            InvalidInputError: The rules keep no commit at all.
            StorageError: The disk fails.

        Example:
            >>> repo.gc(ckptvcs.Policy(last=20, every=10_000)).freed_bytes
        """
        return ops.gc.collect(
            self._repository,
            policy,
            sweep=sweep,
            now=now,
            rekey=rekey,
            archive=archive,
            progress=progress,
        )

    def drop(self, *revisions: str | int, now: bool = False, progress: Progress = quiet) -> GcPlan:
        """Drop single commits, anywhere in the history.

        A branch that ends with one of them goes back to the newest commit that stays.
        `undo` can restore them until the grace period ends.  The gc that then deletes their data
        re-encodes the deltas that depend on them, so that no other commit changes.

        Args:
            revisions: The commits, as revisions or ranges `A..B`.
            now: Delete their data at once. That of commits that were dropped before waits on.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The decision about each commit, and the sizes in bytes.

        Raises:
            BusyError: Another process is writing.
            ConflictError: A tag, a pin, the setting `keep-best` or a detached HEAD keeps one of
                the commits, or a branch would have no commit left.
            NotFoundError: A revision names no commit.
            StorageError: The disk fails.
        """
        names = self.select(revisions)
        return ops.gc.drop(self._repository, names, now=now, progress=progress)

    def undo(self) -> Undone:
        """Revert the last move of HEAD's branch, or the last drop of its commits.

        Returns:
            The reverted change, and the commit of the branch after it.

        Raises:
            NotFoundError: There is no change to revert.
            ConflictError: gc has deleted the commits of the change, or another writer moved the
                branch.
        """
        return ops.refs.undo(self._repository)

    def rebuild_index(self) -> int:
        """Rebuild the index from the packs, and return the number of packs."""
        return self._repository.catalog.store.rebuild()

    def configure(self, key: str, value: str | None) -> Value:
        """Change a setting, and return its new value.

        Args:
            key: The name of the setting, as in `settings`.
            value: The new value as text; None restores the default.

        Raises:
            InvalidInputError: No setting has this name, or the value is not valid.
            StorageError: The settings cannot be written.
        """
        return get_setting(
            set_setting(self.folder / CONFIG, self._repository.backend, key, value), key
        )

    @staticmethod
    def configure_user(key: str, value: str | None) -> None:
        """Change a setting in the user's file; settings of repositories take precedence.

        Args:
            key: The name of the setting, as in `settings`.
            value: The new value as text; None removes the setting.

        Raises:
            InvalidInputError: No setting has this name, the value is not valid, or the file cannot
                be read.
            StorageError: The file cannot be written.
        """
        set_user_setting(key, value)
