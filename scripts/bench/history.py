"""Measure the history of a long run for several limits of the chain depth.

python -m scripts.bench.history RUNS --csv FILE [--picture FILE]

The script commits the 200 checkpoints of the long run (scripts.bench.runs) with default settings
except the depth. Sizes do not include exact patches. Checkouts run without the cache. Then
`gc --keep-every --rekey` drops nine of ten commits; the script compares the size of each merged
delta with the ten that it replaces, and verifies the repository.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ckptvcs.decode.chain import ChainReader
from ckptvcs.gc.retention import Policy
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.config import Config
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from scripts.bench.curves import pyplot
from scripts.bench.runs import LONG

DEPTHS = (4, 8, 16, 32, 64, 128)
EVERY = 50  # steps between kept commits; ten commits each
_CHECKOUTS = 8

Row = dict[str, Any]


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.stem.removeprefix("step"))


def commit_all(run: Path, place: Path, depth: int) -> Repo:
    """Commit every checkpoint of a run to a new repository."""
    repo = Repo.init(place)
    repo.configure("keyframe-depth", str(depth))
    if depth != Config.keyframe_depth:
        repo.configure("keyframe-bytes", "1000")
    repo.configure("keep-exact", "0")
    for path in sorted(run.glob("*.pt"), key=step_of):
        repo.commit_path(path, message="", step=step_of(path))
    return repo


def links(repo: Repo, entry: LogEntry) -> int:
    """Return the largest number of frames that decoding a weight of a commit needs."""
    values, reader = entry.commit.parts["model"].values, ChainReader(handle(repo).catalog)
    schema = handle(repo).catalog.schema(entry.commit.schema)
    rows = enumerate(schema.tensors[number] for number in schema.stored("model"))
    return max(len(reader.links(values, position, info)) for position, info in rows)


def checkout_seconds(repo: Repo, entries: list[LogEntry]) -> list[float]:
    """Time a checkout to memory of each entry, without the cache."""
    seconds = []
    for entry in entries:
        shutil.rmtree(repo.folder / "cache" / "bases", ignore_errors=True)
        fresh = Repo.open(repo.folder)
        start = time.perf_counter()
        fresh.checkout(f"id:{entry.id}")
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(repo: Repo, what: str) -> Row:
    """Return a row with the sizes and depths of a repository."""
    entries, stats = repo.log(), repo.stats()
    deep = [links(repo, entry) for entry in entries]
    seconds = checkout_seconds(repo, entries[:: max(1, len(entries) // _CHECKOUTS)])
    keyframes = sum(entry.commit.kind == "keyframe" for entry in entries)
    return {
        "what": what,
        "commits": len(entries),
        "keyframes": keyframes,
        "history MB": round(stats.history_bytes / 1e6, 2),
        "ratio": round(stats.raw_bytes / stats.history_bytes, 1),
        "deepest": max(deep),
        "mean depth": round(statistics.mean(deep), 1),
        "checkout s": round(statistics.median(seconds), 2),
        "slowest s": round(max(seconds), 2),
    }


def merged(repo: Repo) -> tuple[list[Row], float]:
    """Run gc; return the row after it, and the mean size of a merged delta over its ten deltas."""
    before = {entry.step or 0: entry.commit for entry in repo.log()}
    repo.gc(Policy(every=EVERY), rekey=True)
    store, shares = handle(repo).catalog.store, []
    for entry in repo.log():
        step = entry.step or 0
        replaced = [commit for at, commit in before.items() if step - EVERY < at <= step]
        if any(commit.kind == "keyframe" for commit in replaced):
            continue
        merged_bytes = 0
        for part in entry.commit.parts.values():
            recipe = handle(repo).catalog.recipe(part.values)
            merged_bytes += sum(
                store.places(bundle)[0].entry.record_bytes for bundle in recipe.bundles
            )
        shares.append(merged_bytes / sum(commit.data_bytes for commit in replaced))
    row = measure(repo, f"after gc --keep-every {EVERY} --rekey")
    damage = repo.verify().damage
    assert not damage, damage
    return [row], statistics.mean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    os.environ["CKPT_COMPILED"] = "1"
    rows: list[Row] = []
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as folder:
            repo = commit_all(options.runs / LONG, Path(folder), depth)
            rows.append(measure(repo, f"depth {depth}"))
            print(rows[-1], flush=True)
            if depth == Config.keyframe_depth:
                more, share = merged(repo)
                rows += more
                rows.append({"what": "merged delta / the ten deltas", "ratio": round(share, 3)})
                print(rows[-2:], flush=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if options.picture:
        draw(rows, options.picture)


def draw(rows: list[Row], path: Path) -> None:
    """Draw size and decoded frames against the depth limit."""
    plt = pyplot()
    rows = [row for row in rows if str(row["what"]).startswith("depth")]
    depths = [int(str(row["what"]).split()[1]) for row in rows]
    figure, size = plt.subplots(figsize=(6, 3.5))
    size.plot(depths, [row["history MB"] for row in rows], "o-", color="tab:blue")
    size.set_xscale("log", base=2)
    size.set_ylim(bottom=0)
    size.set_xlabel("depth limit")
    size.set_ylabel("history, MB", color="tab:blue")
    frames = size.twinx()
    frames.plot(depths, [row["mean depth"] for row in rows], "s--", color="tab:red")
    frames.set_ylim(bottom=0)
    frames.set_ylabel("mean number of frames per tensor", color="tab:red")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
