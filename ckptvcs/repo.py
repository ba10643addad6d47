"""Repo: all operations on a repository.

Each method is one call into `ops/` or `background/`; the modules there load on first use, so that
`log`, `show` and `status` start without numpy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ckptvcs import ops
from ckptvcs.errors import CkptError, after
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.history_reader import PathLike
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.sharing import Sharing
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ckptvcs.background.client import Client
    from ckptvcs.background.process import Done
    from ckptvcs.checkpoint.open import Checkpoint
    from ckptvcs.ops.commit import CommitResult
    from ckptvcs.ops.import_folder import Importer
    from ckptvcs.ops.repair import Repaired
    from ckptvcs.ops.request import Request
    from ckptvcs.ops.watch import Watcher

_log = logging.getLogger("ckptvcs")


class Repo(Sharing):
    """A repository that is open for reading and writing.

    A `Repo` continues on the branch of its last commit, even if a checkout in another process moves
    HEAD.  If you use `commit_async`, use the `Repo` in a `with` block, or call `close`.

    Example:
        >>> with Repo.init("runs/exp1") as repo:
        ...     repo.commit({"model": model.state_dict()}, step=2000)
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._branch: str | None = None
        self._background: Client | None = None

    @classmethod
    def init(cls, path: PathLike = ".", *, codec: str | None = None) -> Self:
        """Create a repository in `path`/.ckpt, or open the existing one.

        Args:
            path: The directory for the repository.
            codec: The value of the setting `codec`; None uses `near` for a new repository.

        Returns:
            The open repository.

        Raises:
            InvalidInputError: The codec is not known, or the existing repository has another codec.
            StorageError: The directory cannot be written.
        """
        return cls(Repository.init(path, codec=codec).folder)

    def wait(self) -> None:
        """Wait until all background commits are done.

        Raises:
            CkptError: A background commit failed.
        """
        if self._background is not None and self._background.is_ours:
            self._background.wait()

    def close(self) -> None:
        """Wait until all background commits are done, and stop the worker process.

        Raises:
            CkptError: A background commit failed.
        """
        client, self._background = self._background, None
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
            step: The training step; None reads it from the state, if the state has one.  With
                `model` or `optimizer`, the state gets it under the key `step`.
            message: The message of the commit.
            metrics: Metrics by name, such as `{"loss": 2.31}`.
            codec: The codec for this commit; None uses the setting `codec`.

        Returns:
            The new commit.

        Raises:
            InvalidInputError: An argument is not valid, or the state has a value of an unsupported
                type; the message names its path.
            ConflictError: Another writer moved the branch meanwhile.
            BusyError: gc is sweeping and does not finish within a minute.
            CorruptionError: An object that the commit depends on is missing or damaged.
            StorageError: The disk is full, or fails.
            CkptError: An earlier background commit failed; this commit was not started.

        Example:
            >>> entry = repo.commit(model=model, optimizer=optimizer, step=2000)
        """
        request = ops.request.Request(message, step, metrics or {}, codec)
        gather = ops.request.gather_state
        return self._commit(
            partial(gather, state, model, optimizer, extra, step=request.step), request
        )

    def _commit(self, take: Callable[[], Checkpoint], request: Request) -> LogEntry:
        """Commit the checkpoint that `take` returns to the branch of this `Repo`."""
        self.wait()
        origin = ops.provenance.capture_beside(self._repository.commit_config())
        request = replace(request, checkpoint=take(), branch=self._branch, origin=origin)
        result = ops.commit.commit_checkpoint(self._repository, request)
        for note in result.notes:
            _log.warning("%s", note)
        self._branch = result.branch
        with after(f"commit {result.id[:8]} was made"):
            return self._repository.entry(result.id, branch=result.branch)

    def move_head(self, revision: str | int) -> str | None:
        """Point HEAD to a commit, or to a branch whose newest commit it is; commit there next.

        Args:
            revision: The commit or branch.

        Returns:
            The branch that HEAD follows; None if HEAD is detached.

        Raises:
            NotFoundError: `revision` names no commit.
            InvalidInputError: `revision` names several commits.
            CkptError: An earlier background commit failed; HEAD did not move.
            BusyError: gc is sweeping, or another process deletes originals and does not finish.
        """
        self.wait()
        name = self.resolve(revision)
        self._branch = ops.refs.move_head(self._repository, name, str(revision))
        return self._branch

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

        Commits are made in the order of the calls.  A commit is durable as soon as its future is
        done.  At most one copy waits while another is compressed; a further call blocks and logs a
        warning.  If memory for the copy is missing, the call commits directly.  The future raises
        the error of a failed commit, and so does the next call of `commit_async`, `commit`, `wait`
        or `close`.

        Args:
            state: As for `commit`.
            model: As for `commit`.
            optimizer: As for `commit`.
            extra: As for `commit`.
            step: As for `commit`.
            message: As for `commit`.
            metrics: As for `commit`.
            codec: As for `commit`.

        Returns:
            A future of the new commit.

        Raises:
            InvalidInputError: The state or an argument is not valid.
            CkptError: An earlier background commit failed; this commit was not started.
        """
        from ckptvcs.background.client import Client  # noqa: PLC0415

        if self._background is None or not self._background.is_ours:
            self._background = Client(self._repository)
        self._background.raise_failed()
        config = self._repository.commit_config()
        config.codec_of(codec)
        request = ops.request.Request(message, step, metrics or {}, codec)
        gather = ops.request.gather_state
        take = partial(gather, state, model, optimizer, extra, step=request.step)
        request.origin = ops.provenance.capture_later(config)
        return self._background.commit(
            take, request, lambda: self._branch, self._follow, lambda: self._commit(take, request)
        )

    def _follow(self, done: Done) -> LogEntry:
        """Continue on the branch of a background commit, and return its log entry."""
        self._branch = done.branch
        with after(f"commit {done.name[:8]} was made"):
            self._repository.catalog.store.refresh()
            return self._repository.entry(ObjectId(done.name), branch=done.branch)

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
            names: The names of the optimizer parameters: for each pair of a file and a path inside
                it, one list for each parameter group.
            files: Commit only these files of the directory; empty commits all.
            head_stays: Do not move HEAD if the commit starts a branch because its step is not above
                the last one.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The new commit, and notes about it.

        Raises:
            NotFoundError: `path` does not exist.
            InvalidInputError: `path` contains no complete checkpoint, an argument is not valid, or
                the files changed meanwhile.
            ConflictError: Another writer moved the branch meanwhile.
            BusyError: gc is sweeping and does not finish within a minute.
            CorruptionError: An object that the commit depends on is missing or damaged.
            StorageError: The disk is full, or fails.
        """
        self.wait()
        request = ops.request.Request(message, step, metrics or {}, codec, branch, head_stays)
        request.origin = ops.provenance.capture_beside(self._repository.commit_config())
        return ops.commit.commit_path(
            self._repository, path, request, raw=raw, names=names, files=files, progress=progress
        )

    def import_folder(
        self,
        folder: PathLike,
        *,
        pattern: str | None = None,
        branch: str | None = None,
        codec: str | None = None,
    ) -> Importer:
        """Return an importer for a folder of checkpoints; this changes nothing yet.

        Args:
            folder: The folder that contains the checkpoints.
            pattern: A glob for the names of the checkpoints; None takes all.
            branch: The branch to commit to; None uses the branch of HEAD.
            codec: The codec for the commits; None uses the setting `codec`.

        Returns:
            The importer; its methods `look`, `run` and `remove` compare, commit and delete the
            checkpoints, and `run_and_remove` commits and deletes one after another.

        Raises:
            NotFoundError: The folder does not exist, or contains no checkpoint.
            InvalidInputError: The folder is a checkpoint or part of the repository.
        """
        return ops.import_folder.Importer(
            self._repository, Path(folder), pattern=pattern, branch=branch, codec=codec
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

        Args:
            folder: The folder that the trainer writes to.
            pattern: A glob for the names of the checkpoints; None takes all.
            codec: The codec for the commits; None uses the setting `codec`.
            branch: The branch to commit to; None uses the branch of HEAD.
            settle: A checkpoint is complete after this many seconds without a change.
            keep_local: Delete the source files of all but the newest N checkpoints; None keeps all.
            accept_near: Also delete source files whose commit is only near.

        Returns:
            The watcher; each call of its method `look` commits the complete checkpoints.

        Raises:
            InvalidInputError: The folder is part of the repository, or an argument is not valid.
        """
        return ops.watch.Watcher(
            self._repository,
            Path(folder),
            pattern=pattern,
            codec=codec,
            branch=branch,
            settle=settle,
            keep_local=keep_local,
            accept_near=accept_near,
        )

    def repair(self, source: PathLike | None = None, *, drop: bool = False) -> Repaired:
        """Repair a damaged repository.

        Args:
            source: Another repository to copy lost objects from.
            drop: Drop the commits that cannot be repaired.

        Returns:
            The repaired objects, refs and files, and the dropped commits.

        Raises:
            BusyError: Another process uses the repository.
            NotFoundError: `source` contains no repository.
            StorageError: The repository cannot be written.
        """
        report = self.repair_at(self.folder, source, drop=drop)
        self._repository = Repository(self.folder)
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

        Returns:
            As for `repair`.

        Raises:
            NotFoundError: `path` or `source` contains no repository.
            CorruptionError: The repository cannot be opened even after the repair.
            UnsupportedVersionError: A newer version of ckptvcs wrote the repository.
        """
        copy = None if source is None else Repository.locate(source)
        return ops.repair.repair(Repository.locate(path), copy, drop=drop)


def client(repo: Repo) -> Client:
    """Return the client of the background process, which a `commit_async` started.  For tests."""
    assert repo._background is not None
    return repo._background
