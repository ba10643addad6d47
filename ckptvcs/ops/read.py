"""Read the states and tensors of commits as Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckptvcs.decode import trajectory
from ckptvcs.decode.part_reader import PartReader
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId


def state(repository: Repository, revision: str | int) -> Any:
    """Return the committed nested object with its tensors; see `Repo.checkout`."""
    name = repository.resolve(revision)
    return repository.read_again(lambda: PartReader(repository.restorer(name)).state())


def tensor(repository: Repository, name: str, at: str | int) -> Any:
    """Return one tensor of a commit; see `Repo.tensor`."""
    reader = PartReader(repository.restorer(repository.resolve(at)))
    full, window = trajectory.find_tensor(reader.schema, name)
    return reader.tensors({full: window})[full]


def states(
    repository: Repository, names: Sequence[ObjectId], select: str | Sequence[str] | None
) -> Iterator[tuple[LogEntry, Any]]:
    """Yield the states of some commits; see `Repo.trajectory`."""
    globs = [select] if isinstance(select, str) else select
    return _with_entries(repository, trajectory.states(repository.catalog, names, globs))


def series(
    repository: Repository, names: Sequence[ObjectId], name: str
) -> Iterator[tuple[LogEntry, Any]]:
    """Yield one tensor of some commits; see `Repo.series`."""
    return _with_entries(repository, trajectory.series(repository.catalog, names, name))


def _with_entries(
    repository: Repository, values: Iterable[tuple[ObjectId, Any]]
) -> Iterator[tuple[LogEntry, Any]]:
    tags = repository.history.tags()

    def with_entry(pair: tuple[ObjectId, Any]) -> tuple[LogEntry, Any]:
        return repository.entry(pair[0], tags=tags.get(pair[0], ())), pair[1]

    # A loop would keep each value in memory while the next one is decoded.
    return map(with_entry, values)
