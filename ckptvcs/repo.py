"""Repo: one repository, and everything that can be done with it.

repo = Repo.init("runs/exp1")
repo.commit({"model": model.state_dict()}, step=2000, metrics={"loss": 2.31})
state = repo.checkout(2000)

Each method is one call into `ops/` or `background/`, which are loaded when they are called: `log`,
`show` and `status` start without numpy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ckptvcs import ops
from ckptvcs.errors import CkptError, InvalidInputError, after
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.config import Value, get_setting, set_setting
from ckptvcs.ops.reader import PathLike, Reader
from ckptvcs.ops.repository import CONFIG, Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ckptvcs.background.client import Client
    from ckptvcs.background.process import Done
    from ckptvcs.checkpoint.open import Checkpoint
    from ckptvcs.checkpoint.state import Copies
    from ckptvcs.gc.collect import GcPlan
    from ckptvcs.history.reflog import Undone
    from ckptvcs.ops.commit import CommitResult
    from ckptvcs.ops.import_folder import Importer
    from ckptvcs.ops.refs import DeletedBranch
    from ckptvcs.ops.repair import Repaired
    from ckptvcs.ops.watch import Watcher

_log = logging.getLogger("ckptvcs")
_NOTHING: Any = object()
_NO_RULES = Policy()


class Repo(Reader):
    """An open repository.  Holds its own branch: a checkout elsewhere does not move it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._branch: str | None = None
        self.background: Client | None = None

    @classmethod
    def init(cls, path: PathLike = ".", *, codec: str | None = None) -> Self:
        """Make a repository in DIR/.ckpt, or open the one that is there.  `codec` becomes its
        setting; without it commits are near.

        Raises:
            InvalidInputError: there is no such codec, or the repository there has another.
            StorageError: it cannot be written.
        """
        return cls(Repository.init(path, codec=codec).folder)

    def wait(self) -> None:
        """Wait for commits in the background.  Raises what one of them failed with."""
        if self.background is not None and self.background.is_ours:
            self.background.wait()

    def close(self) -> None:
        """The same, at the end."""
        client, self.background = self.background, None
        if client is not None and client.is_ours:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What failed in the background was logged; it must not hide what ended the `with`.
        with contextlib.suppress(*([CkptError] if kind else [])):
            self.close()

    def commit(
        self,
        state: object = _NOTHING,
        *,
        model: Any = None,
        optimizer: Any = None,
        extra: Mapping[str, object] | None = None,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
    ) -> LogEntry:
        """Commit a nested state of plain types, tensors and numpy arrays; or a module of torch and
        its optimizer (or a list or dict of them), with what is `extra` beside them: then it is
        known of each moment which weight it belongs to.

        Raises:
            InvalidInputError: the state holds something else; the message names its path.
            ConflictError: another writer moved the branch meanwhile.
        """
        from ckptvcs.checkpoint.state import STATE_FILE  # noqa: PLC0415

        self.wait()
        made = ops.commit.commit_checkpoint(
            self.repository,
            _take(state, model, optimizer, extra),
            STATE_FILE,
            inside=True,
            step=step,
            message=message,
            metrics=metrics or {},
            codec=codec,
            branch=self._branch,
        )
        for note in made.notes:
            _log.warning("%s", note)
        self._branch = made.branch
        with after(f"commit {made.id[:8]} was made"):
            return self.repository.entry(made.id, branch=made.branch)

    def commit_async(
        self,
        state: object = _NOTHING,
        *,
        model: Any = None,
        optimizer: Any = None,
        extra: Mapping[str, object] | None = None,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
    ) -> Future[LogEntry]:
        """The same, as soon as the state is copied: it is coded while training goes on.

        Commits are made in the order of the calls.  One copy may wait while another is coded; then
        a call waits, and logs that it does.  A call without room for a copy makes the commit at
        once.  The copy stays until its commit is made: what fails is tried again from it.  A commit
        that still fails is raised by its future and by the next call of this or of `commit`, `wait`
        or `close`.  A commit is safe from the end of the process once its future is done.

        Raises:
            InvalidInputError: the state holds what cannot be committed, or what is said of it is
                wrong.
            CkptError: an earlier commit failed; this one was not begun.
        """
        from ckptvcs.background.client import Client  # noqa: PLC0415

        if self.background is None or not self.background.is_ours:
            self.background = Client(self.repository)
        self.background.raise_failed()
        self.repository.commit_config().codec_of(codec)
        said = ops.request.plain(step, message, metrics or {}, codec)
        return self.background.commit(
            lambda copies: _take(state, model, optimizer, extra, copies),
            said,
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
        """Know of a commit that another process has made."""
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
        """Commit a checkpoint file or a directory of files; `names` are those of the parameters of
        its optimizers, by file and place there, if they are known.  With `files` it is these of the
        directory that are committed.  Where `head_stays`, HEAD does not follow to a branch that has
        to be started since the step is not above that of the line.

        Raises:
            NotFoundError, InvalidInputError: there is no complete checkpoint at `path`.
            ConflictError: another writer moved the branch meanwhile.
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
        """Look at a folder of checkpoints; `look`, `run` and `remove` of what is returned compare,
        commit, and delete originals.

        Raises:
            NotFoundError: there is no such folder, or no checkpoint in it.
            InvalidInputError: it is a checkpoint itself, or part of the repository; no such codec.
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
        """Watch a folder that a trainer writes to: each `look` of what is returned commits what is
        complete, and yields what happened.  A checkpoint is complete after `settle` seconds without
        a change.  Of the originals the newest `keep_local` stay (None: all).

        Raises:
            InvalidInputError: the folder is part of the repository; or there is no such codec.
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
        """Point HEAD at a commit, or at a branch whose newest commit it is; return that branch."""
        return ops.refs.move_head(self.repository, self.resolve(revision), str(revision))

    def branch(self, name: str, revision: str | int = "HEAD") -> ObjectId:
        """Start a branch at a commit; return its id.

        Raises:
            ConflictError: the branch exists.
        """
        return ops.refs.create_branch(self.repository, name, revision)

    def delete_branch(self, name: str) -> DeletedBranch:
        """Delete a branch; its commits stay until the next gc.

        Raises:
            NotFoundError: there is no such branch.
            ConflictError: HEAD is on it.
        """
        return ops.refs.delete_branch(self.repository, name)

    def tag(self, name: str, revision: str | int = "HEAD") -> ObjectId:
        """Give a commit a name that stays; return its id.

        Raises:
            ConflictError: the tag exists.
        """
        return ops.refs.create_tag(self.repository, name, revision)

    def delete_tag(self, name: str) -> ObjectId:
        """Delete a tag; return the id of the commit that it named.  Raises NotFoundError."""
        return ops.refs.delete_tag(self.repository, name)

    def pin(self, revision: str | int = "HEAD", *, pinned: bool = True) -> bool:
        """Keep a commit and its exact form whatever the rules say, or no longer; return whether
        that is new.  What has faded already does not come back.
        """
        return ops.refs.set_pin(self.repository, self.resolve(revision), pinned=pinned)

    def gc(
        self,
        policy: Policy = _NO_RULES,
        *,
        sweep: bool = True,
        rekey: bool = False,
        progress: Progress = quiet,
    ) -> GcPlan:
        """Drop what the rules do not keep, let fade what the settings do not keep, and delete what
        nothing reaches; tiny packs are merged.  What was done, and the sizes that it made on disk,
        which `stats` shows.

        `rekey` merges deltas across commits that were dropped, and bounds every chain by the
        settings.  Without `sweep` it is only said what goes: until the next sweep `undo` takes it
        back.  A full disk is no hindrance, but for what rekeying takes.

        Raises:
            BusyError: a writer is at work.
            CorruptionError: something that is needed is missing: nothing was deleted.
            InvalidInputError: the rules keep nothing at all.
            StorageError: the disk fails.
        """
        return ops.gc.collect(self.repository, policy, sweep=sweep, rekey=rekey, progress=progress)

    def undo(self) -> Undone:
        """Take back the last move of HEAD's branch, or the last drop of its commits.

        Raises:
            NotFoundError: there is nothing to take back.
            ConflictError: what it was about has been swept; or another writer moved the branch.
        """
        return ops.undo.undo(self.repository)

    def repair(self, source: PathLike | None = None, *, drop: bool = False) -> Repaired:
        """Save what can be saved, with what the repository at `source` has; `drop` what cannot.

        Raises:
            BusyError: somebody is at work.
            NotFoundError: there is no repository at `source`.
            StorageError: it cannot be written.
        """
        done = self.repair_at(self.folder, source, drop=drop)
        self.repository = Repository(self.folder)
        return done

    @staticmethod
    def repair_at(
        path: PathLike, source: PathLike | None = None, *, drop: bool = False
    ) -> Repaired:
        """The same for a repository that may be too damaged to be opened.

        Raises:
            NotFoundError: there is no repository at `path`, or at `source`.
            CorruptionError, UnsupportedVersionError: it cannot be opened even so.
        """
        copy = None if source is None else Repository.locate(source)
        return ops.repair.repair(Repository.locate(path), copy, drop=drop)

    def rebuild_index(self) -> int:
        """Rebuild the index from the packs; return how many there are."""
        return self.repository.catalog.store.rebuild()

    def configure(self, key: str, value: str | None) -> Value:
        """Change a setting, durably; None gives it its default back.  Its value from then on.

        Raises:
            InvalidInputError: there is no such setting, or it does not take that value.
        """
        return get_setting(
            set_setting(self.folder / CONFIG, self.repository.backend, key, value), key
        )


def _take(
    state: object,
    model: Any,
    optimizer: Any,
    extra: Mapping[str, object] | None,
    copies: Copies | None = None,
) -> Checkpoint:
    """A state, or that of a model and its optimizer, as a checkpoint."""
    from ckptvcs.checkpoint.state import STATE_FILE, state_checkpoint  # noqa: PLC0415
    from ckptvcs.checkpoint.torch_objects import gather  # noqa: PLC0415

    if (state is _NOTHING) == (model is None and optimizer is None):
        raise InvalidInputError("commit either a state, or a model and its optimizer")
    if state is not _NOTHING and extra is not None:
        raise InvalidInputError("pass either a state or extra, not both")
    if state is not _NOTHING:
        return state_checkpoint(state, None, copies)
    gathered, names = gather(model, optimizer, extra, STATE_FILE)
    return state_checkpoint(gathered, names, copies)
