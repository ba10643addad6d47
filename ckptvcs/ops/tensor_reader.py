"""TensorReader: the tensors of commits and their differences.

Each method is one call into `ops/`; the modules there load on first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckptvcs import ops
from ckptvcs.history.log import Bound, LogEntry
from ckptvcs.ops.history_reader import HistoryReader
from ckptvcs.parallel import Progress, quiet

if TYPE_CHECKING:
    from ckptvcs.ops.diff import Comparison
    from ckptvcs.ops.series import Statistics
    from ckptvcs.ops.tensor import TensorView


class TensorReader(HistoryReader):
    """The methods of `Reader` that read tensors."""

    def diff(
        self,
        a: str | int = "HEAD~1",
        b: str | int = "HEAD",
        *,
        only: str | None = None,
        name: str | None = None,
        progress: Progress = quiet,
    ) -> Comparison:
        """Compare two commits, tensor by tensor.

        Args:
            a: The older commit.
            b: The newer commit.
            only: Compare only `model`, `optimizer` or `rest`; None compares all parts.
            name: Compare only tensors that match this glob (`*` also matches dots), or whose names
                contain this text.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The differences of metadata and of tensors.

        Raises:
            NotFoundError: A commit does not exist, or neither commit has the part or the name.
            CorruptionError: A tensor does not decode to its recorded hash.

        Example:
            >>> comparison = reader.diff(1000, 2000, only="model")
            >>> comparison.tensors[0].info.name, comparison.tensors[0].sums.relative
        """
        return ops.diff.diff(self._repository, a, b, only, name, progress)

    def diff_near(
        self,
        revision: str | int = "HEAD",
        *,
        only: str | None = None,
        name: str | None = None,
        progress: Progress = quiet,
    ) -> Comparison:
        """Compare a commit with its near form, which remains when its exact patch is deleted.

        Args:
            revision: A commit that is exact now.
            only: As for `diff`.
            name: As for `diff`.
            progress: As for `diff`.

        Returns:
            The differences; A is the exact form, and B the near form.

        Raises:
            NotFoundError: The commit does not exist, or has no such part or name.
            InvalidInputError: The commit has no near form, or is only near now.
            CorruptionError: A tensor does not decode to its recorded hash.
        """
        return ops.diff.diff_near(self._repository, revision, only, name, progress)

    def trajectory(
        self,
        select: str | Sequence[str] | None = None,
        *,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:
        """Yield the states of a first-parent history, oldest first.

        Each state is decoded from the previous one; only one is kept in memory.  If the caller
        changes a tensor in place, the tensor is decoded again from its whole delta chain.

        Args:
            select: One or several globs over tensor names, such as `model.*`.  Each state is then a
                flat dict of these tensors, and no other tensor is read.  None yields the same
                states as `checkout`.
            start: As for `line`.
            stop: As for `line`.
            every: As for `line`.
            revision: As for `line`.

        Yields:
            Each commit with its state.

        Raises:
            NotFoundError: A revision names no commit of this history, or `select` matches no
                tensor.
            InvalidInputError: A revision names several commits, or `every` is below 1.
            CorruptionError: During iteration: a tensor does not decode to its recorded hash.

        Example:
            >>> for entry, state in reader.trajectory("model.*.weight", every=1000):
            ...     print(entry.step, {name: tensor.norm() for name, tensor in state.items()})
        """
        names = self._line(start, stop, every, revision)
        return ops.read.states(self._repository, names, select)

    def tensor(self, name: str, at: str | int = "HEAD") -> Any:
        """Return one tensor of a commit; no other tensor is decoded.

        Args:
            name: The name of the tensor in `tensors`, or an unambiguous end of it after a dot or a
                colon: `layers.0.weight` for `model.layers.0.weight`.
            at: The commit to read.

        Returns:
            A torch tensor, or a numpy array if one was committed.

        Raises:
            NotFoundError: The commit or the tensor does not exist.
            InvalidInputError: Several commits or tensors match.
            CorruptionError: The tensor does not decode to its recorded hash.
        """
        return ops.read.tensor(self._repository, name, at)

    def tensor_view(self, where: str) -> TensorView:
        """Return one tensor with its values as numpy, its statistics and its fidelity.

        Args:
            where: `REV:TENSOR`; the tensor is named as in `tensor`.

        Raises:
            NotFoundError: The commit or the tensor does not exist.
            InvalidInputError: Several commits or tensors match.
        """
        return ops.tensor.TensorView(self._repository, where)

    def series(
        self,
        name: str,
        *,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:
        """Yield one tensor along a first-parent history, oldest first.

        Args:
            name: As for `tensor`.
            start: As for `line`.
            stop: As for `line`.
            every: As for `line`.
            revision: As for `line`.

        Yields:
            Each commit that has the tensor, with the tensor.

        Raises:
            NotFoundError: A revision names no commit of this history, or no commit has the tensor.
            InvalidInputError: Several tensors match, or `every` is below 1.
        """
        names = self._line(start, stop, every, revision)
        return ops.read.series(self._repository, names, name)

    def statistics(
        self,
        pattern: str,
        stats: Sequence[str] = ("norm",),
        *,
        start: Bound = None,
        stop: Bound = None,
        every: int | None = None,
        revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Statistics]]:
        """Yield statistics of tensors along a first-parent history, oldest first.

        This does not import torch.  Entries that are not finite count in `not_finite` only.

        Args:
            pattern: A glob for the names (`*` also matches dots), or a name as in `tensor`.
            stats: Any of `norm`, `mean`, `std`, `min`, `max`, `absmax`, `rms`, `zeros` and
                `not_finite`.
            start: As for `line`.
            stop: As for `line`.
            every: As for `line`.
            revision: As for `line`.

        Yields:
            Each commit that has such tensors, with the statistics of each tensor by its name.  A
            statistic is None if no entry is finite.

        Raises:
            NotFoundError: A revision names no commit of this history, or no tensor matches.
            InvalidInputError: A statistic is not known, or several tensors have this name.

        Example:
            >>> for entry, values in reader.statistics("model.*weight"):
            ...     print(entry.step, {name: one["norm"] for name, one in values.items()})
        """
        names = self._repository.history.line(start, stop, every, revision=revision)
        return ops.series.statistics(self._repository, names, pattern, stats)
