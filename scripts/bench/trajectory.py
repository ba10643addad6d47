"""Measure a walk over all commits of a run, and reading one tensor of a deep commit.

python -m scripts.bench.trajectory RUNS --csv FILE [--mb 302]

Trajectory: near commits of a real run. The script restores each commit with the decoded weights of
its parent (the minimal cost of a delta), then all commits in one walk, then each by a checkout. A
walk decodes each slice once and should take at most 1.3 times the sum of the minimal costs.

One tensor: a synthetic state of 300 tensors at depth 8. The script times a checkout without the
cache, a second one with it, one tensor, and one tensor of all commits.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ckptvcs.codec import frame
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.words import Words, word_type
from ckptvcs.decode import chain
from ckptvcs.decode.chain import DecodedTable
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.decode.part_reader import PartReader
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.object_store import ObjectStore

RUN = "gpt-b0.95"
TENSORS = 300
DEPTH = 8
ROUNDS = 3

Row = dict[str, Any]


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count decoded slices and bytes of frames that are read."""
    work = {"slices": 0, "bytes": 0}
    decode, read = frame.decode_slice, ObjectStore.read_region

    def decode_slice(*args: Any, **options: Any) -> Any:
        work["slices"] += 1
        return decode(*args, **options)

    def read_region(store: ObjectStore, name: ObjectId, offset: int, length: int) -> bytes:
        work["bytes"] += length
        return read(store, name, offset, length)

    with (
        mock.patch.object(chain, "decode_slice", decode_slice),
        mock.patch.object(ObjectStore, "read_region", read_region),
    ):
        yield work


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forget(repo: Repo) -> Repo:
    """Delete the cache and return a new handle of the repository."""
    shutil.rmtree(repo.folder / "cache" / "bases", ignore_errors=True)
    return Repo.open(repo.root)


class DecodedParent(DecodedTable):
    """The decoded weights of a commit."""

    def __init__(self, repo: Repo, name: ObjectId) -> None:
        reader = handle(repo).restorer(name)
        self.values = reader.commit.parts["model"].values
        infos = reader.schema.tensors
        self._words = [
            data.view(word_type(infos[number].type.word))
            for number, data in reader.tensors(reader.schema.stored("model"))
        ]

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        return self._words[tensor][number * SLICE_WORDS :][:SLICE_WORDS]

    def has(self, tensor: int) -> bool:
        return True


def single(repo: Repo, before: ObjectId | None, name: ObjectId) -> float:
    """Time restoring a commit if the weights of its parent are decoded."""
    base = None if before is None else DecodedParent(repo, before)

    def materials(values: ObjectId) -> DecodedParent | None:
        return base if base is not None and base.values == values else None

    return timed(
        lambda: PartReader(Restorer(handle(repo).catalog, name, decoded=materials)).state()
    )


def walk(repo: Repo) -> list[float]:
    """Return the seconds of each step of a walk."""
    seconds: list[float] = []
    steps = repo.trajectory()
    while True:
        started = time.perf_counter()
        if next(steps, None) is None:
            return seconds
        seconds.append(time.perf_counter() - started)


def one_by_one(repo: Repo, ids: list[ObjectId]) -> None:
    for name in ids:
        repo.checkout(name)


def trajectory(run: Path, scratch: Path) -> list[Row]:
    """Compare a walk with single deltas and with checkouts, on a real run."""
    repo = Repo.init(scratch / "run")
    paths = sorted(run.glob("step*.pt"), key=lambda path: int(path.stem[4:]))
    paths = [path for path in paths if int(path.stem[4:]) % 50 == 0]
    for path in paths:
        repo.commit_path(path, message=path.stem)
    ids = [entry.id for entry in repo.log()][::-1]
    singles, walks, alone = [], [], []
    for _ in range(ROUNDS):
        opened = forget(repo)
        singles.append(sum(single(opened, b, n) for b, n in zip([None, *ids], ids, strict=False)))
        walks.append(sum(walk(forget(repo))))
        opened = forget(repo)
        alone.append(timed(partial(one_by_one, opened, ids)))
    with counted() as work:
        walk(forget(repo))
    bundles = {
        bundle
        for name in ids
        for part in handle(repo).catalog.commit(name).parts.values()
        for bundle in handle(repo).catalog.recipe(part.values).bundles
    }
    held = sum(len(row.slices) for name in bundles for row in handle(repo).catalog.bundle(name))
    return [
        {"what": f"single deltas, {len(ids)} commits", "seconds": statistics.median(singles)},
        {
            "what": "one walk",
            "seconds": statistics.median(walks),
            "ratio": statistics.median(w / s for w, s in zip(walks, singles, strict=True)),
            "slices": work["slices"],
            "bytes": work["bytes"],
        },
        {
            "what": "separate checkouts",
            "seconds": statistics.median(alone),
            "ratio": statistics.median(a / s for a, s in zip(alone, singles, strict=True)),
        },
        {"what": "slices of all commits", "slices": held},
    ]


def one_tensor(size: int, scratch: Path) -> list[Row]:
    """Compare a checkout with reading one tensor, on a synthetic state."""
    torch.manual_seed(0)
    repo = Repo.init(scratch / "wide")
    side = round((size / 4 / TENSORS) ** 0.5)
    weights = {f"layers.{n}.weight": torch.randn(side, side) * 0.02 for n in range(TENSORS)}
    for step in range(DEPTH + 1):
        repo.commit({"model": weights}, step=step)
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape), alpha=2e-5)
    assert handle(repo).catalog.commit(repo.resolve("HEAD")).depth == DEPTH
    name = f"layers.{TENSORS // 2}.weight"
    whole, again, one, next_one, line = [], [], [], [], []
    for _ in range(ROUNDS):
        opened = forget(repo)
        whole.append(timed(partial(opened.checkout, "HEAD")))
        again.append(timed(partial(opened.checkout, "HEAD")))
        opened = forget(repo)
        one.append(timed(partial(opened.tensor, name)))
        next_one.append(timed(partial(opened.tensor, "layers.7.weight")))
        line.append(timed(lambda: list(forget(repo).series(name))))
    with counted() as all_work:
        forget(repo).checkout("HEAD")
    with counted() as work:
        forget(repo).tensor(name)
    size_bytes = 4 * side * side * TENSORS
    rows: list[Row] = [
        {
            "what": f"checkout, {TENSORS} tensors, {size_bytes:,} bytes, depth {DEPTH}",
            "seconds": statistics.median(whole),
            **all_work,
        },
        {"what": "second checkout, with the cache", "seconds": statistics.median(again)},
        {"what": "one tensor", "seconds": statistics.median(one), **work},
        {"what": "another tensor", "seconds": statistics.median(next_one)},
        {"what": f"one tensor of all {DEPTH + 1} commits", "seconds": statistics.median(line)},
    ]
    for row in rows:
        row["ratio"] = row["seconds"] / statistics.median(whole)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--mb", type=float, default=302)
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as scratch:
        rows = one_tensor(int(options.mb * 1e6), Path(scratch))
        rows += trajectory(options.runs / RUN, Path(scratch))
    for row in rows:
        row |= {key: round(row[key], 4) for key in ("seconds", "ratio") if key in row}
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("what", "seconds", "ratio", "slices", "bytes"))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        sys.stdout.write("  ".join(f"{value}" for value in row.values()) + "\n")


if __name__ == "__main__":
    main()
