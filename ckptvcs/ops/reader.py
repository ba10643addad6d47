"""Reader: what can be done with a repository without changing its history.

Each method is one call into `ops/`, whose modules are loaded when they are first used: `log` and
`show` start without numpy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ckptvcs import ops
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import Bound, LogEntry
from ckptvcs.ops.config import KEYS, Value, get_setting
from ckptvcs.ops.repository import FOLDER, Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

if TYPE_CHECKING:
    from ckptvcs.gc.collect import GcPlan
    from ckptvcs.history.reflog import ReflogEvent
    from ckptvcs.history.refs import Generation
    from ckptvcs.ops.bisect import Bisection, Judge, Watch
    from ckptvcs.ops.checkout import CheckedOut
    from ckptvcs.ops.diff import Comparison
    from ckptvcs.ops.export import Exported
    from ckptvcs.ops.refs import NamedCommit
    from ckptvcs.ops.show import Status, TensorEntry
    from ckptvcs.ops.stats import Stats
    from ckptvcs.ops.tensor import TensorView
    from ckptvcs.ops.verify import VerifyReport

PathLike = str | os.PathLike[str]

_NO_RULES = Policy()


class Reader:
    """An open repository, to be read."""

    def __init__(self, folder: Path) -> None:
        self.repository = Repository(folder)

    @classmethod
    def open(cls, path: PathLike) -> Self:
        """Open the repository DIR or DIR/.ckpt.

        Raises:
            NotFoundError: there is none.
            UnsupportedVersionError: a newer program wrote it.
        """
        return cls(Repository.locate(path))

    @staticmethod
    def locate(path: PathLike | None = None) -> Path:
        """Return the folder of the repository DIR or DIR/.ckpt; without a path, of the working
        directory or of the nearest one above it.

        Raises:
            NotFoundError: there is none.
        """
        return Repository.locate_above(Path.cwd()) if path is None else Repository.locate(path)

    @staticmethod
    def exists(path: PathLike) -> bool:
        """Whether DIR/.ckpt is a repository."""
        return Repository.exists(Path(path) / FOLDER)

    @property
    def folder(self) -> Path:
        """DIR/.ckpt."""
        return self.repository.folder

    @property
    def root(self) -> Path:
        """DIR, the folder that committed paths are relative to."""
        return self.repository.root

    def resolve(self, revision: str | int) -> ObjectId:
        """The id of the commit that a revision names; an int is a step.

        Raises:
            NotFoundError, InvalidInputError: it names none, or several.
        """
        return self.repository.resolve(revision)

    def log(
        self, limit: int | None = None, *, revision: str | None = None, all_branches: bool = False
    ) -> list[LogEntry]:
        """Commits, newest first: HEAD's line (or that of `revision`), or those of all branches."""
        start = None if revision is None else self.resolve(revision)
        return self.repository.history.entries(limit, start=start, all_branches=all_branches)

    def line(
        self,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        *,
        revision: str | int | None = None,
    ) -> list[LogEntry]:
        """Commits of a line, oldest first, chosen as `trajectory` chooses them."""
        names = self.repository.history.line(start, stop, every, revision=revision)
        return [self.repository.entry(name) for name in names]

    def graph(
        self, limit: int | None = None, *, revision: str | None = None
    ) -> list[tuple[str, LogEntry | None]]:
        """The commits of all branches (or the line of `revision`) as the rows of a graph: what is
        drawn, and the commit beside it, if any.  `limit` counts commits.
        """
        start = None if revision is None else self.resolve(revision)
        return self.repository.history.graph(limit, start=start)

    def labels(self) -> dict[ObjectId, tuple[str, ...]]:
        """What is said of commits at a tip: `HEAD -> main`, `side`, `tag: v1`, `pinned`."""
        return self.repository.history.names()

    def show(self, revision: str | int = "HEAD") -> LogEntry:
        """One commit, with its tags and the branch whose newest commit it is."""
        name, history = self.resolve(revision), self.repository.history
        tags = history.tags().get(name, ())
        return self.repository.entry(name, branch=history.branch_at(name), tags=tags)

    def entry(
        self, name: ObjectId, *, branch: str | None = None, tags: tuple[str, ...] = ()
    ) -> LogEntry:
        """A commit by its id, as the log shows it, with the branch and the tags that are given."""
        return self.repository.entry(name, branch=branch, tags=tags)

    def tensors(self, revision: str | int = "HEAD") -> list[TensorEntry]:
        """The stored tensors of a commit, with their roles and errors."""
        return ops.show.tensors(self.repository, self.resolve(revision))

    def forms(self, revision: str | int = "HEAD") -> list[str]:
        """How each of `tensors` comes back: `exact`, `near` or `dropped`."""
        return ops.show.forms(self.repository, self.resolve(revision))

    def status(self) -> Status:
        """Where HEAD is, and how the checked-out files differ from it."""
        return ops.show.status(self.repository)

    def diff(
        self,
        a: str | int = "HEAD~1",
        b: str | int = "HEAD",
        *,
        only: str | None = None,
        progress: Progress = quiet,
    ) -> Comparison:
        """What lies between two commits, of all parts or of one.

        Raises:
            NotFoundError, InvalidInputError: there is no such commit, or no such part.
        """
        return ops.diff.diff(self.repository, a, b, only, progress)

    def branches(self) -> list[NamedCommit]:
        """The branches that have a commit, by name."""
        return ops.refs.branches(self.repository)

    def tags(self) -> list[NamedCommit]:
        """The tags, by name."""
        return ops.refs.tags(self.repository)

    def pins(self) -> list[LogEntry]:
        """The pinned commits, by id."""
        return ops.refs.pins(self.repository)

    def head(self) -> Generation | None:
        """What HEAD is at: a `branch`, or a `commit`."""
        return self.repository.head()

    def reflog(self, branch: str | None = None) -> list[ReflogEvent]:
        """What happened to a branch (HEAD's), newest first."""
        return ops.undo.events(self.repository, branch)

    def plan_gc(self, policy: Policy = _NO_RULES) -> GcPlan:
        """What `gc` would drop, fade and delete now.  What rekeying frees is not known before it is
        done.

        Raises:
            CorruptionError: something that is needed is missing.
            InvalidInputError: the rules keep nothing at all.
        """
        return ops.gc.plan(self.repository, policy)

    def stats(self) -> Stats:
        """Sizes on disk."""
        return ops.stats.measure(self.repository)

    def setting(self, key: str) -> Value:
        """One setting.  Raises InvalidInputError: there is none of this name."""
        return get_setting(self.repository.config, key)

    def settings(self) -> dict[str, Value]:
        """Every setting by its name.

        Raises:
            InvalidInputError: they cannot be read.
        """
        config = self.repository.config
        return {key: get_setting(config, key) for key in KEYS}

    def checkout(self, revision: str | int = "HEAD", *, into: Any = None) -> Any:
        """The state of a commit: the nested object that was committed, with its tensors.

        Tensors of torch come back as such (which imports torch); unknown classes come back as
        inert records and are never executed.  A directory comes back as a dict of its files.
        The state is also loaded `into` a module, a module and its optimizers, or objects with
        `load_state_dict` by the keys that their states have.

        Raises:
            NotFoundError: there is no such commit, or it lacks what is to be loaded.
            InvalidInputError: what is to be loaded does not fit; nothing was loaded then.
            CorruptionError: it does not decode to its recorded hashes.
        """
        state = ops.read.state(self.repository, revision)
        if into is not None:
            from ckptvcs.checkpoint.torch_objects import scatter  # noqa: PLC0415

            scatter(state, into)
        return state

    def checkout_files(
        self,
        revision: str | int,
        output: PathLike | None = None,
        *,
        force: bool = False,
        exact: bool = False,
        progress: Progress = quiet,
        announce: Callable[[Path], object] = lambda _: None,
    ) -> CheckedOut:
        """Write the files of a commit; HEAD stays where it is (see `move_head`).  `announce` is
        told where, before anything is written.

        Raises:
            ConflictError: they were to be `exact`, and are not, or not any more; or a file would be
                overwritten that no commit holds.
        """
        return ops.checkout.checkout_files(
            self.repository,
            self.resolve(revision),
            _path(output),
            force=force,
            exact=exact,
            progress=progress,
            announce=announce,
        )

    def checkout_part(
        self,
        revision: str | int,
        part: str,
        output: PathLike | None = None,
        *,
        force: bool = False,
        exact: bool = False,
        announce: Callable[[Path], object] = lambda _: None,
    ) -> CheckedOut:
        """Write one part of a commit (`model`, `optimizer` or `rest`) as .safetensors or as a
        torch.save file; without `output` beside where the commit belongs.

        Raises:
            ConflictError: it was to be `exact`, and is not, or not any more; or a file is in the
                way.
        """
        return ops.checkout.checkout_part(
            self.repository,
            self.resolve(revision),
            part,
            _path(output),
            force=force,
            exact=exact,
            announce=announce,
        )

    def export(
        self,
        revision: str | int,
        path: PathLike,
        *,
        form: str | None = None,
        only: str | None = None,
        force: bool = False,
        progress: Progress = quiet,
    ) -> Exported:
        """Write a commit, or one part of it, in the format `form` (`pt` or `safetensors`; None: as
        it was committed).

        Raises:
            NotFoundError, InvalidInputError: there is no such commit, part or format.
            ConflictError: a file is in the way, and `force` is not given.
        """
        return ops.export.export(
            self.repository,
            revision,
            Path(path),
            form=form,
            only=only,
            force=force,
            progress=progress,
        )

    def export_line(
        self,
        folder: PathLike,
        *,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        revision: str | int | None = None,
        form: str | None = None,
        only: str | None = None,
        force: bool = False,
        progress: Progress = quiet,
    ) -> list[Exported]:
        """Write each commit of a line, as `trajectory` chooses them, into a folder, named by its
        step; each frame is decoded once.

        Raises:
            NotFoundError, InvalidInputError: no commit lies between; no such part or format.
            ConflictError: a file is in the way, and `force` is not given.
        """
        return ops.export.export_line(
            self.repository,
            Path(folder),
            start=start,
            stop=stop,
            every=every,
            revision=revision,
            form=form,
            only=only,
            force=force,
            progress=progress,
        )

    def average(
        self,
        start: Bound,
        stop: Bound,
        path: PathLike,
        *,
        every: int | None = None,
        force: bool = False,
        progress: Progress = quiet,
    ) -> list[ObjectId]:
        """Write the mean of the weights of a line of commits, all else as in the last of them;
        return their ids.

        Raises:
            NotFoundError: no commit lies between.
            InvalidInputError: a weight is not in all of them, in the same shape and type.
            ConflictError: a file is in the way, and `force` is not given.
        """
        return ops.average.average(
            self.repository, start, stop, Path(path), every=every, force=force, progress=progress
        )

    def trajectory(
        self,
        select: str | Sequence[str] | None = None,
        *,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:
        """The states of a line of commits, oldest first, each with its entry in the log.

        A state is what `checkout` gives; with `select`, a glob or several over the names of tensors
        (`model.*`, as `ckpt show --json` has them), a flat dict of those, and nothing else is read.
        Only the frames since the commit before are decoded, and one state is in memory, besides
        those that the caller keeps.  The next is decoded from it: a tensor that the caller changes
        in place costs a walk down its whole chain.

        The line is HEAD's, or that of `revision`, or of `stop` where that is a revision.  `start`
        and `stop`, both included, are steps (bounds, which need not be those of commits) or
        revisions on the line; `every` leaves only commits whose step is a multiple of it.

        Raises:
            NotFoundError: a revision names nothing, or nothing on the line; no tensor of any of
                the commits is selected.
            InvalidInputError: a revision names several commits; `every` is below 1.
            CorruptionError: while it is walked: a tensor does not decode to its recorded hash.
        """
        return ops.read.states(self.repository, select, start, stop, every, revision)

    def tensor(self, name: str, at: str | int = "HEAD") -> Any:
        """One tensor of a commit, as `checkout` gives it; nothing else is read or decoded.

        `name` is as `ckpt show --json` has it, or the end of that behind a dot or a colon, if one
        tensor alone is meant: `layers.0.weight` for `model.layers.0.weight`.

        Raises:
            NotFoundError, InvalidInputError: there is no such commit or tensor, or several.
            CorruptionError: it does not decode to its recorded hash.
        """
        return ops.read.tensor(self.repository, name, at)

    def tensor_view(self, where: str) -> TensorView:
        """The tensor `REV:TENSOR`, with what is known of it: values as numpy has them, statistics,
        fidelity.  Raises as `tensor`.
        """
        return ops.tensor.TensorView(self.repository, where)

    def series(
        self,
        name: str,
        *,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:
        """One tensor along a line, of those commits that have it; as `trajectory` and `tensor`."""
        return ops.read.series(self.repository, name, start, stop, every, revision)

    def bisect(
        self,
        good: str | int,
        bad: str | int,
        judge: Judge | None = None,
        watch: Watch | None = None,
        *,
        command: Sequence[str] | None = None,
        nan: bool = False,
        metric: str | None = None,
        above: float | None = None,
        below: float | None = None,
    ) -> Bisection:
        """The first bad commit between two.  Bad is what `judge` says; or what the exit code of a
        `command` says; or weights that are not finite (`nan`); or a `metric` above or below a
        bound.  `watch` is told of each verdict.

        Raises:
            InvalidInputError: `good` is no ancestor of `bad`, or they are not what their names say.
        """
        if judge is None:
            judge = ops.bisect.choose_judge(self.repository, command, metric, above, below, nan=nan)
        return ops.bisect.search(self.repository, good, bad, judge, watch or (lambda *_: None))

    def verify(self, progress: Progress = quiet, *, subset: str | None = None) -> VerifyReport:
        """Prove that everything can be read.  A `subset` of `5%`, `10G` or `15m` is what was
        checked longest ago.

        Raises:
            InvalidInputError: there is no such subset.
        """
        return ops.verify.verify(self.repository, progress, subset=subset)

    @staticmethod
    def why_unopened(path: PathLike, error: CkptError) -> CorruptionError | None:
        """The damage for which a repository could not be opened, which raised `error`; None if it
        is of a newer program, as it says.
        """
        return ops.verify.why_unopened(Repository.locate(path), error)


def _path(output: PathLike | None) -> Path | None:
    return None if output is None else Path(output)
