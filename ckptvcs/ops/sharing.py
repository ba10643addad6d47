"""Sharing: the methods of `Repo` that write and read bundle files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ckptvcs import ops
from ckptvcs.ops.history_reader import PathLike
from ckptvcs.ops.history_writer import HistoryWriter
from ckptvcs.parallel import Progress, quiet

if TYPE_CHECKING:
    from ckptvcs.ops.bundle import Bundled
    from ckptvcs.ops.fetch import Fetched


class Sharing(HistoryWriter):
    """The methods of `Repo` for commits that travel in one file."""

    def bundle(
        self,
        revisions: str | int | Sequence[str | int],
        path: PathLike,
        *,
        form: str | None = None,
        only: str | None = None,
        force: bool = False,
        progress: Progress = quiet,
    ) -> Bundled:
        """Write commits as one file that needs nothing else.

        Every commit is decoded from the file before the file gets its name.

        Args:
            revisions: The commits: a revision, a range `A..B`, or several of both.
            path: The file to write, usually with the suffix `.ckptz`.
            form: `exact` refuses commits that are not exact any more, and pins the others where the
                file is fetched; `near` leaves exact patches out; None takes what there is.
            only: Bundle only this part: `model`, `optimizer` or `rest`.
            force: Overwrite an existing file.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The file and its commits.

        Raises:
            NotFoundError: A revision names no commit, or a commit was dropped.
            InvalidInputError: An argument is not valid, or a commit is not exact any more.
            ConflictError: The file exists, or another program changed it meanwhile.
            CorruptionError: Stored data of the commits are missing or damaged.
            StorageError: The file cannot be written.

        Example:
            >>> repo.bundle(2000, "step-2000.ckptz").size_bytes
        """
        chosen = [revisions] if isinstance(revisions, (str, int)) else list(revisions)
        return ops.bundle.bundle(
            self._repository,
            chosen,
            Path(path),
            form=form,
            only=only,
            force=force,
            progress=progress,
        )

    @classmethod
    def clone(
        cls, path: PathLike, directory: PathLike | None = None, *, progress: Progress = quiet
    ) -> Self:
        """Make a repository of the commits of a bundle file.

        Everything in the file is checked and decoded first.

        Args:
            path: The bundle file.
            directory: The directory for the repository; None takes the name of the file without
                its suffix.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The open repository.

        Raises:
            NotFoundError: The file does not exist.
            ConflictError: The directory contains a repository.
            CorruptionError: The file is truncated or damaged, or is not a bundle file.
            UnsupportedVersionError: A newer version of ckptvcs wrote the file.
            StorageError: The directory cannot be written.
        """
        where = None if directory is None else Path(directory)
        return cls(ops.clone.clone(Path(path), where, progress))

    def fetch(
        self, path: PathLike, *, branch: str | None = None, progress: Progress = quiet
    ) -> Fetched:
        """Add the commits of a bundle file.

        Everything in the file is checked and decoded first.  An existing branch only moves forward.
        If it has other commits, the new ones go to a branch with another name, such as `main-2`.

        Args:
            path: The bundle file.
            branch: The branch for the commits; None uses the branches in the file.
            progress: Called with the number of bytes that were read or written since its last call.

        Returns:
            The new commits, those that were here already, and the refs.

        Raises:
            NotFoundError: The file does not exist.
            InvalidInputError: `branch` is not valid, or the file has several branches.
            ConflictError: `branch` has other commits, or another writer moved it meanwhile.
            BusyError: gc is sweeping, or another process does not finish.
            CorruptionError: The file is truncated or damaged, or is not a bundle file.
            UnsupportedVersionError: A newer version of ckptvcs wrote the file.
            StorageError: The disk is full, or fails.
        """
        return ops.fetch.fetch(self._repository, Path(path), branch, progress)
