"""Repo: one repository, and everything that can be done with it.

repo = Repo.init("runs/exp1")
repo.commit({"model": model.state_dict()}, step=2000, metrics={"loss": 2.31})
state = repo.checkout(2000)
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ckptvcs.care import Care, quiet
from ckptvcs.errors import CkptError, ConflictError, InvalidInputError, MissingObjectError, after
from ckptvcs.history.log import Bound, LogEntry
from ckptvcs.history.refs import Refs
from ckptvcs.opened import CACHE
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.reserve import keep_reserve

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ckptvcs.background import Background
    from ckptvcs.checkout import CheckedOut, WorkTree
    from ckptvcs.checkpoint.open import Checkpoint
    from ckptvcs.checkpoint.roles import Names
    from ckptvcs.checkpoint.staging import Staging
    from ckptvcs.committing import Announce, Result
    from ckptvcs.compare import Comparison
    from ckptvcs.decode.commit_reader import Restorer
    from ckptvcs.encode.shards import Shard, Ticket
    from ckptvcs.encode.source import Progress
    from ckptvcs.files.targets import Target
    from ckptvcs.search import Bisection, Judge, Watch
    from ckptvcs.worker import Worker

# The methods that touch tensors import what they need when they are called: `log`, `show` and
# `status` start without numpy.

T = TypeVar("T")
_log = logging.getLogger("ckptvcs")
_NOTHING: Any = object()


def _take(
    state: object, model: Any, optimizer: Any, extra: Mapping[str, object] | None,
    staging: Staging | None = None,
) -> Checkpoint:  # fmt: skip
    """A state, or that of a model and its optimizer, as a checkpoint."""
    from ckptvcs.checkpoint.state import STATE_FILE, state_checkpoint  # noqa: PLC0415
    from ckptvcs.checkpoint.torch_objects import gather  # noqa: PLC0415  see above

    if (state is _NOTHING) == (model is None and optimizer is None):
        raise InvalidInputError("commit either a state, or a model and its optimizer")
    if state is not _NOTHING and extra is not None:
        raise InvalidInputError("what is extra to a state belongs into it")
    names: Names = {}
    if state is _NOTHING:
        state, names = gather(model, optimizer, extra, STATE_FILE)
    return state_checkpoint(state, names, staging)


class Repo(Care):
    """An open repository.  Holds its own branch: a checkout elsewhere does not move it."""

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
        self.wait()
        checkpoint = _take(state, model, optimizer, extra)
        return self._commit_state(checkpoint, step, message, metrics or {}, codec)

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
        from ckptvcs.checkpoint.parcel import pack, unpack  # noqa: PLC0415  see above
        from ckptvcs.checkpoint.state import STATE_FILE  # noqa: PLC0415
        from ckptvcs.request import plain_message, plain_metrics, plain_step  # noqa: PLC0415
        from ckptvcs.worker import Done, NoWorkerError  # noqa: PLC0415

        background, worker = self._in_background()
        background.raise_failed()
        self.commit_config().codec_of(codec)
        said = {
            "path": STATE_FILE, "inside": True, "step": plain_step(step),
            "message": plain_message(message), "metrics": plain_metrics(metrics or {}),
            "codec": codec,
        }  # fmt: skip
        staging = background.stage()
        try:
            packed = pack(_take(state, model, optimizer, extra, staging), staging)
        except (MemoryError, OSError) as error:
            background.release(staging)
            _log.warning("there is no room for a copy (%s): training waits for a commit", error)
            return background.done(self.commit(
                state, model=model, optimizer=optimizer, extra=extra, step=step, message=message,
                metrics=metrics, codec=codec,
            ))  # fmt: skip
        except BaseException:
            background.release(staging)
            raise

        def commit() -> LogEntry:
            request: dict[str, Any] = {**said, "branch": self._branch}
            try:
                made = worker.commit(staging, packed, request)
            except NoWorkerError as error:
                _log.warning("%s: this process commits, beside the training", error)
                here = type(self).open(self.folder).commit_checkpoint
                result = here(unpack(packed, staging.memory), **request)
                made = Done(result.id, result.branch)
            self._branch = made.branch
            with after(f"commit {made.name[:8]} was made"):
                self.catalog.store.refresh()
                return self.entry(ObjectId(made.name), branch=made.branch)

        named = "without a step" if step is None else f"step {said['step']}"
        return background.submit(staging, commit, named)

    def wait(self) -> None:
        """Wait for commits in the background.  Raises what one of them failed with."""
        if self._background is not None and self._background[0].process == os.getpid():
            self._background[0].wait()

    def close(self) -> None:
        """The same, at the end."""
        background, self._background = self._background, None
        if background is not None and background[0].process == os.getpid():
            try:
                background[0].close()
            finally:
                background[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What failed in the background was logged; it must not hide what ended the `with`.
        with contextlib.suppress(*([CkptError] if kind else [])):
            self.close()

    def _in_background(self) -> tuple[Background[LogEntry], Worker]:
        from ckptvcs.background import Background  # noqa: PLC0415  see above
        from ckptvcs.worker import Worker  # noqa: PLC0415

        if self._background is None or self._background[0].process != os.getpid():
            self._background = Background(), Worker(self.folder, Refs(self._backend).completes)
        return self._background

    def _commit_state(
        self, checkpoint: Checkpoint, step: int | None, message: str,
        metrics: Mapping[str, float], codec: str | None,
    ) -> LogEntry:  # fmt: skip
        from ckptvcs.checkpoint.state import STATE_FILE  # noqa: PLC0415  see above

        result = self.commit_checkpoint(
            checkpoint, STATE_FILE, inside=True, step=step, message=message, metrics=metrics,
            codec=codec, branch=self._branch,
        )  # fmt: skip
        for note in result.notes:
            _log.warning("%s", note)
        self._branch = result.branch
        with after(f"commit {result.id[:8]} was made"):
            return self.entry(result.id, branch=result.branch)

    def commit_path(
        self,
        path: str | os.PathLike[str],
        *,
        message: str,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
        branch: str | None = None,
        raw: bool = False,
        names: Names | None = None,
        files: Sequence[str] = (),
        head_stays: bool = False,
        progress: Progress = quiet,
    ) -> Result:
        """Commit a checkpoint file or a directory of files; `names` are those of the parameters of
        its optimizers, by file and place there, if they are known.  With `files` it is these of the
        directory that are committed.  Where `head_stays`, HEAD does not follow to a branch that has
        to be started since the step is not above that of the line.

        Raises:
            NotFoundError, InvalidInputError: there is no complete checkpoint at `path`.
            ConflictError: another writer moved the branch meanwhile.
        """
        from ckptvcs.checkpoint.open import open_checkpoint  # noqa: PLC0415

        path, skip = Path(path), real_path(self.folder)
        if real_path(path).is_relative_to(skip):
            raise InvalidInputError(f"{path} is part of the repository itself")
        name, inside = self.naming(path)
        self.wait()
        checkpoint = open_checkpoint(path, raw=raw, skip=skip, names=names, only=files)
        return self.commit_checkpoint(
            checkpoint, name, inside=inside, step=step, message=message,
            metrics=metrics or {}, codec=codec, branch=branch, head_stays=head_stays,
            progress=progress,
        )  # fmt: skip

    def commit_checkpoint(
        self,
        checkpoint: Checkpoint,
        path: str,
        *,
        inside: bool,
        step: int | None,
        message: str,
        metrics: Mapping[str, float],
        codec: str | None,
        branch: str | None = None, head_stays: bool = False, progress: Progress = quiet,
        announce: Announce | None = None,
    ) -> Result:  # fmt: skip
        """Commit what has been opened already; see `Committer`."""
        from ckptvcs.committing import Committer, silent  # noqa: PLC0415
        from ckptvcs.request import Request  # noqa: PLC0415

        config = self.commit_config()
        spec = self.codec_for(codec, metrics, config)
        bases = self.folder / CACHE / "bases"
        if checkpoint.kind == "state" and self._held is None:
            from ckptvcs.decode.base_cache import HeldBase  # noqa: PLC0415  see above

            self._held = HeldBase()
        request = Request.of(
            checkpoint, path, inside=inside, message=message, step=step, metrics=metrics,
            spec=spec, branch=branch, head_stays=head_stays,
        )  # fmt: skip
        # A commit of another thread that is still at work replaces the base in memory.
        alone = self._holder.acquire(blocking=False)
        try:
            held = self._held if alone else None
            with checkpoint.kept_open():
                result = Committer(
                    self.catalog, self.refs, bases, config, progress, held, announce or silent,
                    rule=lambda: self.commit_config().exact_rule,
                ).commit(request)  # fmt: skip
        finally:
            if alone:
                self._holder.release()
        with after(f"commit {result.id[:8]} was made"):
            keep_reserve(self.folder / CACHE)
        return result

    def code_shard(self, ticket: Ticket, checkpoint: Checkpoint) -> Shard:
        """Code the share of this process in a commit of several; see `joining`."""
        from ckptvcs.decode.base_cache import HeldBase  # noqa: PLC0415  see above
        from ckptvcs.encode.shards import code_shard  # noqa: PLC0415

        self.catalog.store.refresh()  # who joins may have committed meanwhile
        self._held = self._held or HeldBase()
        alone = self._holder.acquire(blocking=False)
        try:
            held = self._held if alone else HeldBase()
            bases = self.folder / CACHE / "bases"
            return code_shard(self.catalog, bases, ticket, checkpoint, held)
        finally:
            if alone:
                self._holder.release()

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
        from ckptvcs.decode.part_reader import PartReader  # noqa: PLC0415

        name = self.resolve(revision)
        state = self._twice(lambda: PartReader(self.restorer(name)).state())
        if into is not None:
            from ckptvcs.checkpoint.torch_objects import scatter  # noqa: PLC0415

            scatter(state, into)
        return state

    def _twice(self, read: Callable[[], T]) -> T:
        """Read, once more where something was missing: another process may have let it fade, or
        moved it, meanwhile.
        """
        try:
            return read()
        except MissingObjectError:
            self.catalog.store.refresh()
            self.catalog.forget()
            return read()

    def trajectory(
        self, select: str | Sequence[str] | None = None, *, start: Bound = None, stop: Bound = None,
        every: int | None = None, revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:  # fmt: skip
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
        from ckptvcs.decode.trajectory import states  # noqa: PLC0415  see above

        globs = [select] if isinstance(select, str) else select
        names = self.history.line(start, stop, every, revision=revision)
        return self._with_entries(states(self.catalog, names, globs))

    def tensor(self, name: str, at: str | int = "HEAD") -> Any:
        """One tensor of a commit, as `checkout` gives it; nothing else is read or decoded.

        `name` is as `ckpt show --json` has it, or the end of that behind a dot or a colon, if one
        tensor alone is meant: `layers.0.weight` for `model.layers.0.weight`.

        Raises:
            NotFoundError, InvalidInputError: there is no such commit or tensor, or several.
            CorruptionError: it does not decode to its recorded hash.
        """
        from ckptvcs.decode.part_reader import PartReader  # noqa: PLC0415
        from ckptvcs.decode.trajectory import find_tensor  # noqa: PLC0415

        reader = PartReader(self.restorer(self.resolve(at)))
        full, window = find_tensor(reader.schema, name)
        return reader.tensors({full: window})[full]

    def series(
        self, name: str, *, start: Bound = None, stop: Bound = None, every: int | None = None,
        revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:  # fmt: skip
        """One tensor along a line, of those commits that have it; as `trajectory` and `tensor`."""
        from ckptvcs.decode.trajectory import series  # noqa: PLC0415

        names = self.history.line(start, stop, every, revision=revision)
        return self._with_entries(series(self.catalog, names, name))

    def _with_entries(
        self, found: Iterable[tuple[ObjectId, Any]]
    ) -> Iterator[tuple[LogEntry, Any]]:
        tags = self.history.tags()

        def named(pair: tuple[ObjectId, Any]) -> tuple[LogEntry, Any]:
            return self.entry(pair[0], tags=tags.get(pair[0], ())), pair[1]

        return map(named, found)  # a loop would hold a value while the next one is decoded

    def save_part(
        self, name: ObjectId, part: str, target: Path | Target, *, exact: bool = False
    ) -> str:
        """Write one part of a commit as .safetensors or as a torch.save file; its fidelity.

        Raises:
            ConflictError: it was to be `exact`, and is not, or not any more; or the file at
                `target` came, or was changed, while it was made.
        """
        from ckptvcs.decode.part_reader import PartReader  # noqa: PLC0415
        from ckptvcs.files.targets import looked  # noqa: PLC0415

        def save() -> str:
            restorer = self._reader(name, part, exact=exact)
            PartReader(restorer).save(part, at)
            return restorer.fidelity.get(part, "exact")  # small tensors alone always are

        with looked(target) as at:
            return self._twice(save)

    def _reader(self, name: ObjectId, part: str | None = None, *, exact: bool) -> Restorer:
        """What reads a commit, in the form that it has at this moment."""
        restorer = self.restorer(name)
        forms = [form for one, form in restorer.fidelity.items() if part in (None, one)]
        if exact and "near" in forms:
            raise ConflictError(
                f"commit {name[:8]} can only be restored in near form",
                hint="leave out --require exact to take it as it is",
            )
        return restorer

    def diff(
        self,
        a: str | int = "HEAD~1",
        b: str | int = "HEAD",
        *,
        only: str | None = None,
        progress: Progress = quiet,
    ) -> Comparison:
        """What lies between two commits, of all parts or of one; see `ckptvcs.compare`.

        Raises:
            NotFoundError, InvalidInputError: there is no such commit, or no such part.
        """
        from ckptvcs.compare import compare  # noqa: PLC0415

        left, right = self.resolve(a), self.resolve(b)
        return compare(
            self.catalog, (self.entry(left), self.restorer(left)),
            (self.entry(right), self.restorer(right)), only, progress,
        )  # fmt: skip

    def bisect(
        self, good: str | int, bad: str | int, judge: Judge,
        watch: Watch = lambda *_: None,
    ) -> Bisection:  # fmt: skip
        """The first bad commit between two; judges stand in `ckptvcs.search`.

        Raises:
            InvalidInputError: `good` is no ancestor of `bad`, or they are not what their names say.
        """
        from ckptvcs.search import bisect, line  # noqa: PLC0415

        names = line(self.catalog, self.resolve(good), self.resolve(bad))
        return bisect(names, self.entry, judge, watch)

    def worktree(self) -> WorkTree:
        """The files outside the store."""
        from ckptvcs.checkout import WorkTree  # noqa: PLC0415

        return WorkTree(self.catalog, self.root, self.folder / CACHE / "written")

    def checkout_files(
        self,
        name: ObjectId,
        output: Path | None = None,
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
        return self._twice(lambda: self.worktree().write(
            self._reader(name, exact=exact), output, progress, force=force, announce=announce
        ))  # fmt: skip
