"""Repo: one repository, and everything that can be done with it.

Each method is one call into `ops/` or `background/`.  These load on their first call, so that
`log`, `show` and `status` start without numpy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ckptvcs import ops
from ckptvcs.errors import CkptError, after
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.config import Value, get_setting, set_setting
from ckptvcs.ops.history_reader import NO_RULES, PathLike
from ckptvcs.ops.reader import Reader
from ckptvcs.ops.repository import CONFIG, Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ckptvcs.background.client import Client
    from ckptvcs.background.process import Done
    from ckptvcs.gc.collect import GcPlan
    from ckptvcs.history.reflog import Undone
    from ckptvcs.ops.commit import CommitResult
    from ckptvcs.ops.import_folder import Importer
    from ckptvcs.ops.refs import DeletedBranch
    from ckptvcs.ops.repair import Repaired
    from ckptvcs.ops.watch import Watcher

_log = logging.getLogger("ckptvcs")


class Repo(Reader):
    """An open repository that can be read and changed.

    A `Repo` remembers the branch of its last commit: a checkout in another process does not move
    it. Use it in a `with` block, or call `close`, if you use `commit_async`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._branch: str | None = None
        self.background: Client | None = None

    @classmethod
    def init(cls, path: PathLike = ".", *, codec: str | None = None) -> Self:
        """Create a repository in `path`/.ckpt, or open the existing one.

        Args:
            path: The directory for the repository.
            codec: The value of the setting `codec`; None uses `near` for a new repository.

        Raises:
            InvalidInputError: The codec is not known, or the existing repository has another codec.
            StorageError: The directory cannot be written.
        """
        return cls(Repository.init(path, codec=codec).folder)

    def wait(self) -> None:
        """Wait until all background commits are done; raises the CkptError of a failed one."""
        if self.background is not None and self.background.is_ours:
            self.background.wait()

    def close(self) -> None:
        """Wait until all background commits are done, and stop the worker process; see `wait`."""
        client, self.background = self.background, None
        if client is not None and client.is_ours:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A background failure was logged; it must not hide the error that ended the `with`.
        with contextlib.suppress(*([CkptError] if kind else [])):
            self.close()

    def commit(
        self,
        state: object = ...,
        *,
        model: Any = None,
        optimizer: Any = None,
        extra: Mapping[str, object] | None = None,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
    ) -> LogEntry:
        """Commit a state, or a model and its optimizers.

        Args:
            state: A nested structure of plain types, torch tensors and numpy arrays.
            model: A torch module.  Pass `model` and `optimizer` instead of `state` to record which
                weight each optimizer moment belongs to.
            optimizer: A torch optimizer, or a list or dict of optimizers.
            extra: Further entries beside `model` and `optimizer`, such as a scheduler state.
            step: The training step; None reads it from the state, if the state has one.
            message: The message of the commit.
            metrics: Metrics by name, such as `{"loss": 2.31}`.
            codec: The codec for this commit; None uses the setting `codec`.

        Returns:
            The new commit.

        Raises:
            InvalidInputError: The state has a value of another type; the message names its path.
            ConflictError: Another writer moved the branch meanwhile.
            CkptError: An earlier background commit failed; nothing was committed.

        Example:
            >>> entry = repo.commit(model=model, optimizer=optimizer, step=2000)
        """
        from ckptvcs.checkpoint.state import STATE_FILE  # noqa: PLC0415

        self.wait()
        result = ops.commit.commit_checkpoint(
            self.repository,
            ops.request.gather_state(state, model, optimizer, extra),
            STATE_FILE,
            inside=True,
            step=step,
            message=message,
            metrics=metrics or {},
            codec=codec,
            branch=self._branch,
        )
        for note in result.notes:
            _log.warning("%s", note)
        self._branch = result.branch
        with after(f"commit {result.id[:8]} was made"):
            return self.repository.entry(result.id, branch=result.branch)

    def commit_async(
        self,
        state: object = ...,
        *,
        model: Any = None,
        optimizer: Any = None,
        extra: Mapping[str, object] | None = None,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
    ) -> Future[LogEntry]:
        """Copy a state and commit it in the background while training continues.

        Commits are made in the order of the calls.  At most one copy waits while another is
        compressed; a further call blocks and logs a warning.  If memory for the copy is missing,
        the call commits directly.  A failed commit is raised by its future, and by the next call of
        this method, `commit`, `wait` or `close`.  A commit is durable as soon as its future is
        done.

        Args:
            state: As for `commit`.
            model: As for `commit`.
            optimizer: As for `commit`.
            extra: As for `commit`.
            step: The training step; None reads it from the state, if the state has one.
            message: The message of the commit.
            metrics: Metrics by name, such as `{"loss": 2.31}`.
            codec: The codec for this commit; None uses the setting `codec`.

        Returns:
            A future of the new commit.

        Raises:
            InvalidInputError: The state or an argument is not valid.
            CkptError: An earlier commit failed; this one was not started.
        """
        from ckptvcs.background.client import Client  # noqa: PLC0415

        if self.background is None or not self.background.is_ours:
            self.background = Client(self.repository)
        self.background.raise_failed()
        self.repository.commit_config().codec_of(codec)
        fields = ops.request.plain(step, message, metrics or {}, codec)
        return self.background.commit(
            lambda copies: ops.request.gather_state(state, model, optimizer, extra, copies),
            fields,
            lambda: self._branch,
            self._follow,
            lambda: self.commit(
                state,
                model=model,
                optimizer=optimizer,
                extra=extra,
                step=step,
                message=message,
                metrics=metrics,
                codec=codec,
            ),
        )

    def _follow(self, made: Done) -> LogEntry:
        """Take over a commit of the worker process."""
        self._branch = made.branch
        with after(f"commit {made.name[:8]} was made"):
            self.repository.catalog.store.refresh()
            return self.repository.entry(ObjectId(made.name), branch=made.branch)

    def commit_path(
        self,
        path: PathLike,
        *,
        message: str,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
        branch: str | None = None,
        raw: bool = False,
        names: dict[tuple[str, str], list[list[str | None]]] | None = None,
        files: Sequence[str] = (),
        head_stays: bool = False,
        progress: Progress = quiet,
    ) -> CommitResult:
        """Commit a checkpoint file, or a directory of files.

        Args:
            path: The file or directory.
            message: The message of the commit.
            step: The training step; None reads it from the checkpoint, the message or the file
                name.
            metrics: Metrics by name.
            codec: The codec for this commit; None uses the setting `codec`.
            branch: The branch to commit to; None uses the branch of HEAD.
            raw: Store the bytes without parsing the file.
            names: Parameter names of the optimizers, by file and by path in the file, for each
                group.
            files: Commit only these files of the directory; empty commits all.
            head_stays: Do not move HEAD to a branch that is started because the step is not above
                the last one.
            progress: Called with the number of bytes that were read or written since its last call.

        Raises:
            NotFoundError: `path` does not exist.
            InvalidInputError: `path` contains no complete checkpoint.
            ConflictError: Another writer moved the branch meanwhile.
        """
        self.wait()
        return ops.commit.commit_path(
            self.repository,
            path,
            message=message,
            step=step,
            metrics=metrics,
            codec=codec,
            branch=branch,
            raw=raw,
            names=names,
            files=files,
            head_stays=head_stays,
            progress=progress,
        )

    def import_folder(
        self,
        folder: PathLike,
        *,
        pattern: str | None = None,
        branch: str | None = None,
        codec: str | None = None,
    ) -> Importer:
        """Return an importer for a folder of checkpoints.

        Its methods `look`, `run` and `remove` compare, commit and delete the checkpoints.

        Args:
            folder: The folder that contains the checkpoints.
            pattern: A glob for the names of the checkpoints; None takes all.
            branch: The branch to commit to; None uses the branch of HEAD.
            codec: The codec for the commits; None uses the setting `codec`.

        Raises:
            NotFoundError: The folder does not exist, or contains no checkpoint.
            InvalidInputError: The folder is a checkpoint or part of the repository.
        """
        return ops.import_folder.Importer(
            self.repository, Path(folder), pattern=pattern, branch=branch, codec=codec
        )

    def watch(
        self,
        folder: PathLike,
        *,
        pattern: str | None = None,
        codec: str | None = None,
        branch: str | None = None,
        settle: float = 2.0,
        keep_local: int | None = None,
        accept_near: bool = False,
    ) -> Watcher:
        """Return a watcher for a folder that a trainer writes to.

        Each call of `look` of the watcher commits the checkpoints that are complete, and yields
        events.

        Args:
            folder: The folder that the trainer writes to.
            pattern: A glob for the names of the checkpoints; None takes all.
            codec: The codec for the commits; None uses the setting `codec`.
            branch: The branch to commit to; None uses the branch of HEAD.
            settle: A checkpoint is complete after this many seconds without a change.
            keep_local: Delete the source files of all but the newest N checkpoints; None keeps all.
            accept_near: Also delete source files whose commit is only near.

        Raises:
            InvalidInputError: The folder is part of the repository, or an argument is not valid.
        """
        return ops.watch.Watcher(
            self.repository,
            Path(folder),
            pattern=pattern,
            codec=codec,
            branch=branch,
            settle=settle,
            keep_local=keep_local,
            accept_near=accept_near,
        )

    def move_head(self, revision: str | int) -> str | None:
        """Point HEAD to a commit, or to a branch whose newest commit it is.

        Returns:
            The branch that HEAD follows; None if HEAD is detached.

        Raises:
            NotFoundError: `revision` names no commit.
        """
        return ops.refs.move_head(self.repository, self.resolve(revision), str(revision))

    def branch(self, name: str, revision: str | int = "HEAD") -> ObjectId:
        """Create a branch, and return the id of its commit.

        Args:
            name: The name of the new branch.
            revision: The commit that the branch points to.

        Raises:
            ConflictError: The branch exists.
            InvalidInputError: The name is not valid.
        """
        return ops.refs.create_branch(self.repository, name, revision)

    def delete_branch(self, name: str) -> DeletedBranch:
        """Delete a branch; its commits are kept until the next gc.

        Raises:
            NotFoundError: The branch does not exist.
            ConflictError: HEAD is on the branch.
        """
        return ops.refs.delete_branch(self.repository, name)

    def tag(self, name: str, revision: str | int = "HEAD") -> ObjectId:
        """Create a tag, and return the id of its commit.

        Args:
            name: The name of the new tag.
            revision: The commit that the tag points to.

        Raises:
            ConflictError: The tag exists.
            InvalidInputError: The name is not valid.
        """
        return ops.refs.create_tag(self.repository, name, revision)

    def delete_tag(self, name: str) -> ObjectId:
        """Delete a tag, and return the id of its commit.

        Raises:
            NotFoundError: The tag does not exist.
        """
        return ops.refs.delete_tag(self.repository, name)

    def pin(self, revision: str | int = "HEAD", *, pinned: bool = True) -> bool:
        """Pin a commit, so that gc keeps it and its exact form; or unpin it.

        An exact patch that has expired is not restored.

        Args:
            revision: The commit to pin.
            pinned: False removes the pin.

        Returns:
            Whether the pin changed.
        """
        return ops.refs.set_pin(self.repository, self.resolve(revision), pinned=pinned)

    def gc(
        self,
        policy: Policy = NO_RULES,
        *,
        sweep: bool = True,
        rekey: bool = False,
        progress: Progress = quiet,
    ) -> GcPlan:
        """Drop the commits that no rule keeps, and delete unreferenced data.

        gc also lets exact patches expire that the settings do not keep, and merges tiny packs.  It
        works on a full disk, except with `rekey`.

        Args:
            policy: The retention rules; the default keeps every commit.
            sweep: False only records the drops: `undo` can revert them until the next sweep.
            rekey: Re-encode deltas across dropped commits, and limit each chain as the settings
                say.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The dropped commits and the freed sizes, in bytes on disk.

        Raises:
            BusyError: Another process is writing.
            CorruptionError: An object that a commit needs is missing; nothing was deleted.
            InvalidInputError: The rules keep no commit at all.
            StorageError: The disk fails.

        Example:
            >>> repo.gc(ckptvcs.Policy(last=20, every=10_000)).freed_bytes
        """
        return ops.gc.collect(self.repository, policy, sweep=sweep, rekey=rekey, progress=progress)

    def undo(self) -> Undone:
        """Revert the last move of HEAD's branch, or the last drop of its commits.

        Raises:
            NotFoundError: There is no change to revert.
            ConflictError: The change was swept, or another writer moved the branch.
        """
        return ops.undo.undo(self.repository)

    def repair(self, source: PathLike | None = None, *, drop: bool = False) -> Repaired:
        """Repair a damaged repository.

        Args:
            source: Another repository to copy lost objects from.
            drop: Drop the commits that cannot be repaired.

        Raises:
            BusyError: Another process uses the repository.
            NotFoundError: `source` contains no repository.
            StorageError: The repository cannot be written.
        """
        report = self.repair_at(self.folder, source, drop=drop)
        self.repository = Repository(self.folder)
        return report

    @staticmethod
    def repair_at(
        path: PathLike, source: PathLike | None = None, *, drop: bool = False
    ) -> Repaired:
        """Repair a repository that may be too damaged to open.

        Args:
            path: The directory of the repository.
            source: As for `repair`.
            drop: As for `repair`.

        Raises:
            NotFoundError: `path` or `source` contains no repository.
            CorruptionError: The repository cannot be opened even after the repair.
            UnsupportedVersionError: A newer version of ckptvcs wrote the repository.
        """
        copy = None if source is None else Repository.locate(source)
        return ops.repair.repair(Repository.locate(path), copy, drop=drop)

    def rebuild_index(self) -> int:
        """Rebuild the index from the packs, and return the number of packs."""
        return self.repository.catalog.store.rebuild()

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
            set_setting(self.folder / CONFIG, self.repository.backend, key, value), key
        )
