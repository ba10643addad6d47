"""What the history of a long run takes, by the depth that its chains may have.

python -m scripts.bench.history RUNS --csv FILE [--picture FILE]

The 200 checkpoints of the long run (scripts.bench.runs) are committed with default settings but for
the depth; exact patches are left out of the sizes.  Checkouts are decoded from their chains, the
cache being deleted.  Then `gc --keep-every --rekey` drops nine commits of ten: the merged deltas
are compared with the ten that each replaces, and everything is verified.
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
from ckptvcs.repo import Repo
from scripts.bench.runs import LONG

DEPTHS = (4, 8, 16, 32, 64, 128)
EVERY = 50  # steps, of which there is a commit for every tenth
_CHECKOUTS = 8

Row = dict[str, Any]


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.stem.removeprefix("step"))


def commit_all(run: Path, place: Path, depth: int) -> Repo:
    """A repository with every checkpoint of a run."""
    repo = Repo.init(place)
    repo.configure("keyframe-depth", str(depth))
    if depth != Config.keyframe_depth:
        repo.configure("keyframe-bytes", "1000")
    repo.configure("keep-exact", "0")
    for path in sorted(run.glob("*.pt"), key=step_of):
        repo.commit_path(path, message="", step=step_of(path))
    return repo


def links(repo: Repo, entry: LogEntry) -> int:
    """The most frames that a tensor of the weights of a commit is decoded from."""
    values, reader = entry.commit.parts["model"].values, ChainReader(repo.repository.catalog)
    schema = repo.repository.catalog.schema(entry.commit.schema)
    rows = enumerate(schema.tensors[number] for number in schema.stored("model"))
    return max(len(reader.links(values, position, info)) for position, info in rows)


def checkout_seconds(repo: Repo, entries: list[LogEntry]) -> list[float]:
    """Seconds for each of some checkouts to memory, from the chain."""
    seconds = []
    for entry in entries:
        shutil.rmtree(repo.folder / "cache" / "bases", ignore_errors=True)
        fresh = Repo.open(repo.folder)
        start = time.perf_counter()
        fresh.checkout(f"id:{entry.id}")
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(repo: Repo, what: str) -> Row:
    """The sizes and depths of a repository."""
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
    """What dropping nine commits of ten leaves; merged deltas over the ten that each replaces."""
    before = {entry.step or 0: entry.commit for entry in repo.log()}
    repo.gc(Policy(every=EVERY), rekey=True)
    store, shares = repo.repository.catalog.store, []
    for entry in repo.log():
        step = entry.step or 0
        replaced = [made for at, made in before.items() if step - EVERY < at <= step]
        if any(made.kind == "keyframe" for made in replaced):
            continue
        left = 0
        for part in entry.commit.parts.values():
            recipe = repo.repository.catalog.recipe(part.values)
            left += sum(store.places(bundle)[0].entry.record_bytes for bundle in recipe.bundles)
        shares.append(left / sum(made.data_bytes for made in replaced))
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
                rows.append(
                    {"what": "a merged delta of the ten it replaces", "ratio": round(share, 3)}
                )
                print(rows[-2:], flush=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if options.picture:
        draw(rows, options.picture)


def draw(rows: list[Row], path: Path) -> None:
    """Size, and frames that a checkout decodes, against the depth cap."""
    import matplotlib as mpl  # noqa: PLC0415  an extra

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    found = [row for row in rows if str(row["what"]).startswith("depth")]
    depths = [int(str(row["what"]).split()[1]) for row in found]
    figure, size = plt.subplots(figsize=(6, 3.5))
    size.plot(depths, [row["history MB"] for row in found], "o-", color="tab:blue")
    size.set_xscale("log", base=2)
    size.set_ylim(bottom=0)
    size.set_xlabel("most frames below a commit")
    size.set_ylabel("history, MB", color="tab:blue")
    frames = size.twinx()
    frames.plot(depths, [row["mean depth"] for row in found], "s--", color="tab:red")
    frames.set_ylim(bottom=0)
    frames.set_ylabel("frames to decode for a tensor, mean", color="tab:red")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
