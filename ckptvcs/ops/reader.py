"""Reader: all operations that do not change the history.

Each method is one call into `ops/`; the modules there load on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptvcs import ops
from ckptvcs.history.log import Bound
from ckptvcs.ops.history_reader import PathLike
from ckptvcs.ops.tensor_reader import TensorReader
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

if TYPE_CHECKING:
    from ckptvcs.ops.bisect import Bisection, Judge, Watch
    from ckptvcs.ops.checkout import CheckedOut
    from ckptvcs.ops.export import Exported
    from ckptvcs.ops.resume import Resumed
    from ckptvcs.ops.verify import VerifyReport


class Reader(TensorReader):
    """A repository that is open for reading; `Repo` adds the methods that write.

    A *revision* is a step (an `int`), a tag, a branch, an id prefix, `HEAD`, `latest`,
    `latest-good` (see `resume`), `best:METRIC:min`, or one of these followed by `~N`.

    Example:
        >>> reader = Reader.open("runs/exp1")
        >>> [entry.step for entry in reader.log(limit=3)]
    """

    def checkout(self, revision: str | int = "HEAD", *, into: Any = None) -> Any:
        """Return the state of a commit: the committed nested object with its tensors.

        Torch tensors are returned as torch tensors (this imports torch).  Instances of unknown
        classes become inert records, so that their code never runs.

        Args:
            revision: The commit to read.
            into: Also load the state into this module, into a module and its optimizers, or into a
                dict of objects that have `load_state_dict`.  If the state does not fit, no object
                is changed.

        Returns:
            The nested object; for a directory, a dict of its files.

        Raises:
            NotFoundError: The commit does not exist, or lacks a key that `into` needs.
            InvalidInputError: A shape or a type differs from `into`.
            CorruptionError: A tensor does not decode to its recorded hash.

        Example:
            >>> reader.checkout(2000, into={"model": model, "optimizer": optimizer})
        """
        state = ops.read.state(self._repository, revision)
        if into is not None:
            from ckptvcs.checkpoint.torch_objects import scatter  # noqa: PLC0415

            scatter(state, into)
        return state

    def resume(self, into: Any = None, *, check: bool = False) -> Resumed | None:
        """Return the newest commit of HEAD's line that proves itself, to continue the run from it.

        A commit proves itself if all values are finite, none of its parts was dropped, and every
        tensor decodes to its recorded hash.  A warning says why a newer commit was skipped, and
        whether the commit is only near.

        Args:
            into: Also load the state into these objects, as `checkout` does.
            check: Also find out what the state lacks to continue bit for bit: random state,
                scheduler or data position.

        Returns:
            The commit with its state, step, metrics and extra entries; None if the repository has
            no commits, so that the run starts from the beginning.

        Raises:
            CorruptionError: There are commits, but none proves itself.
            NotFoundError: Only other branches have commits, or the state lacks a key that `into`
                needs.
            InvalidInputError: A shape or a type differs from `into`.

        Example:
            >>> resumed = repo.resume(into={"model": model, "optimizer": optimizer}, check=True)
            >>> start = resumed.step if resumed else 0
        """
        return ops.resume.resume(self._repository, into, check=check)

    def checkout_files(
        self,
        revision: str | int,
        output: PathLike | None = None,
        *,
        force: bool = False,
        exact: bool = False,
        require: str | None = None,
        near: bool = False,
        progress: Progress = quiet,
        announce: Callable[[Path], object] = quiet,
    ) -> CheckedOut:
        """Write the files of a commit to disk; does not move HEAD (see `Repo.move_head`).

        Args:
            revision: The commit to write.
            output: The file or directory to write; None uses the path that the commit recorded.
            force: Overwrite files whose content is in no commit.
            exact: The same as `require="exact"`.
            require: Refuse a commit that can only be restored in a form farther off than this:
                `exact` or `near`.
            near: Write the near form even if the commit is exact now; `output` is required.
            progress: Called with the number of bytes that were read or written since its last call.
            announce: Called with the target path before the first byte is written.

        Returns:
            The written files and their fidelity.

        Raises:
            NotFoundError: The commit does not exist.
            InvalidInputError: `near` is set without `output`, or the commit has no near form.
            ConflictError: A file would be lost, or the commit is not as `require` asks.
            CorruptionError: A file does not have its recorded hash; no file was replaced.
        """
        name, target = self.resolve(revision), None if output is None else Path(output)
        return ops.checkout.checkout_files(
            self._repository,
            name,
            target,
            progress,
            announce,
            force=force,
            require="exact" if exact else require,
            near=near,
        )

    def checkout_part(
        self,
        revision: str | int,
        part: str,
        output: PathLike | None = None,
        *,
        force: bool = False,
        exact: bool = False,
        require: str | None = None,
        announce: Callable[[Path], object] = quiet,
    ) -> CheckedOut:
        """Write one part of a commit as .safetensors, or as a file of `torch.save`.

        Args:
            revision: The commit to write.
            part: `model`, `optimizer` or `rest`.
            output: The file to write; None writes beside the path that the commit recorded.
            force: Overwrite an existing file.
            exact: The same as `require="exact"`.
            require: Refuse a part that can only be restored in a form farther off than this:
                `exact` or `near`.
            announce: Called with the target path before the first byte is written, if `output` is
                None.

        Returns:
            The written file and its fidelity.

        Raises:
            NotFoundError: The commit or the part does not exist.
            InvalidInputError: `output` is a directory.
            ConflictError: The file exists and `force` is not set, or the part is not as `require`
                asks.
        """
        name, target = self.resolve(revision), None if output is None else Path(output)
        return ops.checkout.checkout_part(
            self._repository,
            name,
            part,
            target,
            announce,
            force=force,
            require="exact" if exact else require,
        )

    def suffix_fits(self, revision: str | int, path: PathLike) -> bool:
        """Return whether the committed files can be written to a path as they are.

        Args:
            revision: The commit.
            path: The file or directory to write.

        Returns:
            False if the suffix of `path` names the other format of weights, torch or safetensors.

        Raises:
            NotFoundError: The commit does not exist.
            InvalidInputError: The suffix names neither a format nor the committed file.
        """
        commit = self._repository.catalog.commit(self.resolve(revision))
        return ops.export.suffix_fits(commit, Path(path))

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
        """Write a commit, or one part of it, as a file.

        Args:
            revision: The commit to write.
            path: The file to write, or the directory if the commit is a directory.
            form: `pt` or `safetensors`; None keeps the committed format.
            only: Write only `model`, `optimizer` or `rest`.
            force: Overwrite an existing file.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The commit and the written file.

        Raises:
            NotFoundError: The commit or the part does not exist.
            InvalidInputError: The format or the part is not known.
            ConflictError: The file exists and `force` is not set.
        """
        names, paths = [self.resolve(revision)], [ops.export.file_path(Path(path), form)]
        self.suffix_fits(names[0], paths[0])
        return ops.export.export(self._repository, names, paths, only, progress, force=force)[0]

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
        """Write each commit of a first-parent history into a folder, named by step.

        Args:
            folder: The folder to write to.
            start: As for `line`.
            stop: As for `line`.
            every: As for `line`.
            revision: As for `line`.
            form: `pt` or `safetensors`; None keeps the committed format.
            only: Write only `model`, `optimizer` or `rest`.
            force: Overwrite existing files.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The commits and the written files, oldest first.

        Raises:
            NotFoundError: The range contains no commit.
            InvalidInputError: The format or the part is not known.
            ConflictError: A file exists and `force` is not set.
        """
        names = self._line(start, stop, every, revision)
        paths = ops.export.file_paths(self._repository, names, Path(folder), form, only)
        return ops.export.export(self._repository, names, paths, only, progress, force=force)

    def average(
        self,
        start: Bound,
        stop: Bound,
        path: PathLike,
        *,
        every: int | None = None,
        best: str | None = None,
        last: int | None = None,
        weights: Sequence[float] | None = None,
        like: str | None = None,
        force: bool = False,
        progress: Progress = quiet,
    ) -> list[ObjectId]:
        """Write the mean of the weights of several commits.

        Everything except the float weights is taken from the last commit.

        Args:
            start: As for `line`.
            stop: As for `line`.
            path: The file or directory to write.
            every: As for `line`.
            best: Only the best commits by a metric: `METRIC`, `METRIC:N`, `METRIC:max` or
                `METRIC:max:N`.
            last: Only this number of the newest commits.
            weights: A weight for each commit, oldest first; they are divided by their sum.
            like: Weigh the commits as `decay_weights` says: `linear`, `cosine` or `inverse-sqrt`.
            force: Overwrite an existing file.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The ids of the averaged commits, oldest first.

        Raises:
            NotFoundError: The range contains no commit.
            InvalidInputError: A weight does not have the same shape and type in all commits, or an
                argument is not valid.
            ConflictError: The file exists and `force` is not set.
        """
        chosen = ops.average.choose(self.line(start, stop, every), best, last)
        factors = ops.average.factors(len(chosen), weights, like)
        names = [entry.id for entry in chosen]
        return ops.average.average(
            self._repository.catalog, names, factors, Path(path), progress, force=force
        )

    @staticmethod
    def decay_weights(like: str, count: int) -> list[float]:
        """Return the weights of checkpoints whose mean emulates a decay of the learning rate.

        Args:
            like: The decay: `linear`, `cosine` or `inverse-sqrt` (1 minus the root of the time).
            count: The number of checkpoints, at equal distances.

        Returns:
            A weight for each checkpoint, oldest first; their sum is 1.  Those of `linear` are
            equal.

        Raises:
            InvalidInputError: No decay has this name.
        """
        return ops.average.decay_weights(like, count)

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
        """Find the first bad commit between a good one and a bad one.

        Pass exactly one test: `judge`, `command`, `nan` or `metric`.

        Args:
            good: A commit that passes the test, an ancestor of `bad`.
            bad: A commit that fails the test.
            judge: Returns the `Verdict` of a commit.
            watch: Called with each commit, its verdict, and the number of remaining candidates.
            command: A command and its arguments; `{}` is replaced by the path of the restored
                checkpoint.  Exit code 0 is good, 125 skips, any other code up to 127 is bad.
            nan: A commit is bad if one of its weights is not finite.
            metric: The name of a metric that is compared with a bound.
            above: A commit is bad if the metric is above this value.
            below: A commit is bad if the metric is below this value.

        Returns:
            The first bad commit, or several candidates if commits between them were skipped.

        Raises:
            NotFoundError: `good` or `bad` does not exist.
            InvalidInputError: `good` is not an ancestor of `bad`, one of them has the other
                verdict, or the command cannot be run.

        Example:
            >>> reader.bisect(1000, 9000, metric="loss", above=3.0).first_bad
        """
        if judge is None:
            judge = ops.bisect.choose_judge(
                self._repository, command, metric, above, below, nan=nan
            )
        first, last = self.resolve(good), self.resolve(bad)
        return ops.bisect.search(self._repository, first, last, judge, watch)

    def verify(self, progress: Progress = quiet, *, subset: str | None = None) -> VerifyReport:
        """Check that every commit can be restored, bit for bit.

        Damage is returned in the report, not raised.

        Args:
            progress: Called with the number of bytes that were read or written since its last call.
            subset: Check only a share (`5%`), a size (`10G`) or a time (`15m`), least recently
                checked data first; None checks everything.

        Returns:
            The numbers of checked items, and the damage.

        Raises:
            InvalidInputError: `subset` is not valid.
        """
        return ops.verify.verify(self._repository, progress, subset=subset)
