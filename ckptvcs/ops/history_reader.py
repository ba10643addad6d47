"""HistoryReader: the commits, refs, sizes and settings of a repository.

No method here decodes a tensor, so that `log` and `show` start without numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ckptvcs import ops
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import Bound, LogEntry
from ckptvcs.ops.config import KEYS, Value, get_setting, user_settings
from ckptvcs.ops.repository import FOLDER, Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs.gc.collect import GcPlan
    from ckptvcs.history.note import Note
    from ckptvcs.history.provenance import Provenance
    from ckptvcs.history.reflog import ReflogEvent
    from ckptvcs.history.refs import Generation
    from ckptvcs.history.selection import Time
    from ckptvcs.ops.disk_usage import DiskUsage
    from ckptvcs.ops.log import Steps
    from ckptvcs.ops.refs import NamedCommit
    from ckptvcs.ops.show import TensorEntry
    from ckptvcs.ops.stats import Stats
    from ckptvcs.ops.status import Status

PathLike = str | os.PathLike[str]

NO_RULES = Policy()


class HistoryReader:
    """The methods of `Reader` that decode no tensor."""

    def __init__(self, folder: Path) -> None:
        self._repository = Repository(folder)

    @classmethod
    def open(cls, path: PathLike) -> Self:
        """Open the repository in a directory.

        Args:
            path: The directory that contains `.ckpt`, or `.ckpt` itself.

        Raises:
            NotFoundError: The directory contains no repository.
            UnsupportedVersionError: A newer version of ckptvcs wrote the repository.
        """
        return cls(Repository.locate(path))

    @staticmethod
    def locate(path: PathLike | None = None) -> Path:
        """Return the `.ckpt` folder of a repository.

        Args:
            path: The directory that contains `.ckpt`, or `.ckpt` itself.  None searches the working
                directory and then its parents.

        Raises:
            NotFoundError: No repository was found.
        """
        return Repository.locate(path)

    @staticmethod
    def exists(path: PathLike) -> bool:
        """Return whether the directory `path` contains a repository."""
        return Repository.exists(Path(path) / FOLDER)

    @property
    def folder(self) -> Path:
        """The `.ckpt` folder."""
        return self._repository.folder

    @property
    def root(self) -> Path:
        """The directory that contains `.ckpt`; the paths of commits are relative to it."""
        return self._repository.root

    def resolve(self, revision: str | int) -> ObjectId:
        """Return the id of the commit that a revision names.

        Args:
            revision: A revision; an `int` is a step.

        Raises:
            NotFoundError: No commit matches.
            InvalidInputError: Several commits match.
        """
        return self._repository.resolve(revision)

    def log(
        self,
        limit: int | None = None,
        *,
        revision: str | int | None = None,
        branch: str | None = None,
        all_branches: bool = False,
        start: Bound = None,
        stop: Bound = None,
        steps: Steps | None = None,
        since: Time | None = None,
        until: Time | None = None,
        metrics: Sequence[str] = (),
        sort: str | None = None,
        reverse: bool = False,
    ) -> list[LogEntry]:
        """Return commits, newest first.

        A time is a `datetime`, a text of ISO 8601 (local time unless it names a zone), or an age
        such as `3h` or `2 days ago`.

        Args:
            limit: The maximum number of commits, in the order of the result; None returns all.
            revision: Start at this commit; None starts at HEAD.
            branch: Start at the newest commit of this branch.
            all_branches: Return the commits of every branch instead of one first-parent history.
            start: As for `line`: the first step, or the first commit, included.
            stop: As for `line`: the last step, or the last commit, included.
            steps: Return only commits with a step between these two, both included.
            since: Return only commits made at this time or later.
            until: Return only commits made at this time or earlier; a date includes that day.
            metrics: Return only commits that pass all these tests, such as `loss<3`.  The operators
                are `<`, `<=`, `>`, `>=`, `=` and `!=`.
            sort: Sort by `step`, `time`, `size` or a metric, highest value first.
            reverse: Reverse the order.

        Raises:
            NotFoundError: `revision` or `branch` names no commit, or no commit has a metric.
            InvalidInputError: `revision` names several commits, or an argument is not valid.

        Example:
            >>> best = repo.log(1, metrics=["loss>0"], sort="loss", reverse=True)[0]
        """
        return ops.log.log(
            self._repository,
            limit,
            ops.log.select(steps, since, until, metrics, sort, reverse=reverse),
            revision=revision,
            branch=branch,
            all_branches=all_branches,
            start=start,
            stop=stop,
        )

    def line(
        self,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        *,
        revision: str | int | None = None,
    ) -> list[LogEntry]:
        """Return the commits of a first-parent history, oldest first.

        Args:
            start: The first step, or the first commit (included); None starts at the oldest commit.
            stop: The last step, or the last commit (included); None stops at the newest commit.
            every: Return only commits whose step is a multiple of this number.
            revision: The commit whose history is read; None reads that of `stop` or HEAD.

        Raises:
            NotFoundError: A revision names no commit, or no commit of this history.
            InvalidInputError: A revision names several commits, or `every` is below 1.
        """
        names = self._line(start, stop, every, revision)
        return [self._repository.entry(name) for name in names]

    def _line(
        self, start: Bound, stop: Bound, every: int | None, revision: str | int | None = None
    ) -> list[ObjectId]:
        return self._repository.history.line(start, stop, every, revision=revision)

    def graph(
        self, limit: int | None = None, *, revision: str | None = None
    ) -> list[tuple[str, LogEntry | None]]:
        """Return the commit graph as rows of text.

        Args:
            limit: The maximum number of commits; None returns all.
            revision: Draw only the history of this commit; None draws all branches.

        Returns:
            The text of each row, and the commit on that row or None.

        Raises:
            NotFoundError: `revision` names no commit.
        """
        start = None if revision is None else self.resolve(revision)
        return self._repository.history.graph(limit, start=start)

    def labels(self) -> dict[ObjectId, tuple[str, ...]]:
        """Return the labels of each commit: `HEAD -> main`, `side`, `tag: v1`, `pinned`."""
        return self._repository.history.names()

    def show(self, revision: str | int = "HEAD") -> LogEntry:
        """Return one commit with its tags and the branch that points to it.

        Args:
            revision: The commit to return.

        Raises:
            NotFoundError: `revision` names no commit.
            InvalidInputError: `revision` names several commits.
        """
        name, history = self.resolve(revision), self._repository.history
        tags = history.tags().get(name, ())
        return self._repository.entry(name, branch=history.branch_at(name), tags=tags)

    def entry(
        self, name: ObjectId, *, branch: str | None = None, tags: tuple[str, ...] = ()
    ) -> LogEntry:
        """Return one commit as the log shows it.

        Args:
            name: The full id of the commit.
            branch: The branch to list in the entry.
            tags: The tags to list in the entry.
        """
        return self._repository.entry(name, branch=branch, tags=tags)

    def notes(self, revision: str | int = "HEAD") -> list[Note]:
        """Return the notes of a commit, newest first.

        Args:
            revision: The commit to read.

        Raises:
            NotFoundError: `revision` names no commit.
        """
        return ops.note.notes(self._repository, revision)

    def is_best(self, revision: str | int = "HEAD") -> bool:
        """Return whether a commit is among the best that the setting `keep-best` keeps.

        Args:
            revision: The commit to test.

        Raises:
            NotFoundError: `revision` names no commit.
            InvalidInputError: The settings cannot be read.
        """
        return ops.note.is_best(self._repository, revision)

    def tensors(
        self,
        revision: str | int = "HEAD",
        pattern: str | None = None,
        *,
        only: str | None = None,
        small: bool = False,
    ) -> list[TensorEntry]:
        """Return the tensors of a commit, with their roles and errors.

        Args:
            revision: The commit to read.
            pattern: A glob for the names (`*` also matches dots), or a text that they contain.
            only: Return only tensors of `model`, `optimizer` or `rest`.
            small: Also return tensors that are so small that the file template contains them.

        Raises:
            NotFoundError: `revision` names no commit.

        Example:
            >>> {one.name: one.relative_error for one in repo.tensors(2000, "model.*weight")}
        """
        name = self.resolve(revision)
        return ops.show.tensors(self._repository, name, pattern, only, small=small)

    def forms(self, revision: str | int = "HEAD") -> list[str]:
        """Return the form of each tensor in `tensors`: `exact`, `near` or `dropped`.

        Args:
            revision: The commit to read.

        Raises:
            NotFoundError: `revision` names no commit.
        """
        return ops.show.forms(self._repository, self.resolve(revision))

    def provenance(self, revision: str | int = "HEAD") -> Provenance | None:
        """Return where a commit comes from: the code, the packages and the machine.

        Args:
            revision: The commit to read.

        Returns:
            The state of the process that made the commit; None if none was recorded.

        Raises:
            NotFoundError: `revision` names no commit.
            CorruptionError: The provenance is missing or damaged.
        """
        return self._repository.catalog.provenance(self.resolve(revision))

    def status(self, *, verify: bool = False) -> Status:
        """Return the position of HEAD, and how the files on disk differ from its commit.

        A file that did not change after its commit, according to its size and times, is not read.

        Args:
            verify: Read and hash all files.
        """
        return ops.status.status(self._repository, verify=verify)

    def branches(self) -> list[NamedCommit]:
        """Return the branches that point to a commit, sorted by name."""
        return ops.refs.branches(self._repository)

    def tags(self) -> list[NamedCommit]:
        """Return the tags, sorted by name."""
        return ops.refs.tags(self._repository)

    def pins(self) -> list[LogEntry]:
        """Return the pinned commits, newest first."""
        return ops.refs.pins(self._repository)

    def head(self) -> Generation | None:
        """Return the current version of HEAD: its `branch`, or its `commit` if HEAD is detached."""
        return self._repository.head()

    def newer(self, revision: str | int = "HEAD") -> dict[str, int]:
        """Return the branches that contain a commit, and the number of newer commits of each.

        Args:
            revision: The commit.

        Raises:
            NotFoundError: `revision` names no commit.
            InvalidInputError: `revision` names several commits.
        """
        return self._repository.history.newer(self.resolve(revision))

    def reflog(self, branch: str | None = None) -> list[ReflogEvent]:
        """Return the changes of a branch, newest first.

        Args:
            branch: The name of the branch; None reads the branch of HEAD.

        Raises:
            NotFoundError: The branch does not exist or has no commits, or HEAD is detached.
        """
        return ops.refs.events(self._repository, branch)

    def select(self, revisions: Iterable[str | int]) -> list[ObjectId]:
        """Return the ids of the commits that revisions and ranges name, each once.

        Args:
            revisions: Revisions, or ranges `A..B` of steps or revisions, both included.

        Raises:
            NotFoundError: A revision names no commit, or a range contains none.
            InvalidInputError: A revision is ambiguous.
        """
        return self._repository.history.select(revisions)

    def plan_gc(
        self,
        policy: Policy = NO_RULES,
        *,
        now: bool = False,
        archive: bool | None = None,
        progress: Progress = quiet,
    ) -> GcPlan:
        """Return the commits, exact patches and packs that `gc` would delete; changes nothing.

        The plan does not include the bytes that `gc(rekey=True)` frees.

        Args:
            policy: The retention rules; the default keeps every commit.
            now: Delete data without the grace period, as `gc(now=True)` does.
            archive: Archive old commits, as `gc` does with the same value.  Their archived forms
                are made in a temporary folder, and the sizes are those after all grace periods.
            progress: Called with the number of bytes that were read or written since its last call.

        Raises:
            CorruptionError: An object that a commit needs is missing.
            InvalidInputError: The rules keep no commit at all.
        """
        return ops.gc.plan(self._repository, policy, now=now, archive=archive, progress=progress)

    def stats(self) -> Stats:
        """Return the sizes of the repository on disk, in bytes."""
        return ops.stats.measure(self._repository)

    def disk_usage(self, revisions: Sequence[str | int] = (), *, by: str = "kind") -> DiskUsage:
        """Return what takes the space on disk, in bytes.

        A tensor that several commits share counts for the oldest of them.  Without revisions, the
        sum is that of `stored_bytes` and `cache_bytes` in `stats`.

        Args:
            revisions: Count only the bytes of these commits; empty counts everything.
            by: Group by `kind`, `commit`, `part`, `layer` or `tensor`.

        Raises:
            NotFoundError: A revision names no commit.
            InvalidInputError: A revision names several commits, or `by` is not known.

        Example:
            >>> {row.name: row.size_bytes for row in repo.disk_usage(by="layer").rows}
        """
        names = self.select(revisions)
        return ops.disk_usage.disk_usage(self._repository, names or None, by)

    def setting(self, key: str) -> Value:
        """Return the value of one setting.

        Args:
            key: The name of the setting, as in `settings`.

        Raises:
            InvalidInputError: No setting has this name, or the settings cannot be read.
        """
        return get_setting(self._repository.config, key)

    def settings(self) -> dict[str, Value]:
        """Return all settings by name.

        Raises:
            InvalidInputError: The settings cannot be read.
        """
        config = self._repository.config
        return {key: get_setting(config, key) for key in KEYS}

    def setting_origins(self) -> dict[str, str]:
        """Return where each setting comes from: `repository`, `user` or `default`.

        Raises:
            InvalidInputError: The settings cannot be read.
        """
        return self._repository.setting_origins()

    @staticmethod
    def user_settings() -> dict[str, Value]:
        """Return the settings of the user's file, which hold where a repository has no own ones.

        Raises:
            InvalidInputError: The file cannot be read.
        """
        values = user_settings()
        return {
            key: values[key.replace("-", "_")] for key in KEYS if key.replace("-", "_") in values
        }

    @staticmethod
    def why_unopened(path: PathLike, error: CkptError) -> CorruptionError | None:
        """Return the damage that prevents a repository from being opened.

        Args:
            path: The directory of the repository.
            error: The error that `open` raised.

        Returns:
            The damage; None if a newer version of ckptvcs wrote the repository.
        """
        return ops.verify.why_unopened(Repository.locate(path), error)


def handle(reader: HistoryReader) -> Repository:
    """Return the open repository behind a facade.  For the layers below it, and for tests."""
    return reader._repository
