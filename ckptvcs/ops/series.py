"""Statistics of tensors along a history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptvcs.decode.part_reader import PartReader, Window, windows
from ckptvcs.decode.trajectory import Trajectory, find_tensor
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.log import LogEntry
from ckptvcs.history.schema import Schema, View
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.tensor import read_numbers, summarize
from ckptvcs.store.ids import ObjectId
from ckptvcs.text import is_glob, name_test

STATISTICS = ("norm", "mean", "std", "min", "max", "absmax", "rms", "zeros", "not_finite")

Statistics = Mapping[str, Mapping[str, float | None]]
"""The statistics of each tensor, by its name."""


def statistics(
    repository: Repository, names: Sequence[ObjectId], pattern: str, chosen: Sequence[str]
) -> Iterator[tuple[LogEntry, Statistics]]:
    """Yield statistics of the tensors of some commits; see `Repo.statistics`."""
    for name in chosen:
        if name not in STATISTICS:
            raise InvalidInputError(
                f"unknown statistic '{name}'", hint=f"use one of {', '.join(STATISTICS)}"
            )
    catalog = repository.catalog
    wanted: dict[ObjectId, dict[str, Window]] = {}
    missing = NotFoundError(f"no tensor matches '{pattern}'", hint="run 'ckpt ls' to list them")
    for schema in dict.fromkeys(catalog.commit(name).schema for name in names):
        try:
            wanted[schema] = _choose(catalog.schema(schema), pattern)
        except NotFoundError as error:
            missing = error
    having = [name for name in names if wanted.get(catalog.commit(name).schema)]
    if not having:
        raise missing
    tags = repository.history.tags()

    def measure(found: tuple[ObjectId, PartReader]) -> tuple[LogEntry, Statistics]:
        name, reader = found
        tensors = wanted[catalog.commit(name).schema]
        values = {full: _measure(reader, window, chosen) for full, window in tensors.items()}
        return repository.entry(name, tags=tags.get(name, ())), values

    return map(measure, Trajectory(catalog, wanted.__getitem__).readers(having))


def _choose(schema: Schema, pattern: str) -> dict[str, Window]:
    """Return the tensors that a glob matches, each under one name, or the one of that name."""
    if not is_glob(pattern):
        full, window = find_tensor(schema, pattern)
        return {full: window}
    wants = name_test(pattern)
    found: dict[tuple[int, View], tuple[str, Window]] = {}
    for name, (number, view) in windows(schema).items():
        if wants(name):
            found.setdefault((number, replace(view, name="")), (name, (number, view)))
    return dict(found.values())


def _measure(reader: PartReader, window: Window, chosen: Sequence[str]) -> dict[str, float | None]:
    numbers = read_numbers(reader, window)
    found = summarize(numbers)
    finite = numbers.size - int(found["not_finite"] or 0)
    low, high, norm = found["min"], found["max"], found["norm"]
    found["absmax"] = None if low is None or high is None else max(-low, high)
    found["rms"] = None if norm is None else norm / math.sqrt(finite)
    return {name: found[name] for name in chosen}
