"""Sizes, times and errors of ways to keep a training run.

python -m scripts.bench --make RUN --steps 1500 --every 50      train and keep the files
python -m scripts.bench RUN --first 1050 --last 1500            compare on a stretch of them
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scripts.bench.methods import Kept, keep_ckpt, keep_torch, keep_zipnn, keep_zstd
from scripts.tinygpt import TrainSpec, train

CODECS = ("near", "small", "lossless", "excp", "excp-max")
HEADING = [
    "kept as", "first MB", "later MB", "ratio", "commit s", "checkout s", "weight_rel",
    "residual NMSE", "Fisher NMSE", "m NMSE", "sqrt(v) NMSE", "update NMSE",
]  # fmt: skip


def make(folder: Path, spec: TrainSpec) -> None:
    """Train and write step<N>.pt files."""
    folder.mkdir(parents=True, exist_ok=True)
    ticks = iter(track(range(spec.steps), "training", console=Console(stderr=True)))

    def tick(_step: int, _loss: float) -> None:
        next(ticks, None)

    def keep(step: int, _loss: float, state: dict[str, Any]) -> None:
        torch.save(state, folder / f"step{step}.pt")

    train(spec, tick, keep)


def stretch(folder: Path, first: int, last: int) -> list[Path]:
    """The files of a run whose step is in a range, in order."""
    found = {}
    for path in folder.iterdir():
        step = re.search(r"([0-9]+)\.\w+$", path.name)
        if step and first <= int(step[1]) <= last:
            found[int(step[1])] = path
    return [found[step] for step in sorted(found)]


def row(kept: Kept, raw: int) -> list[str]:
    """A line of the table."""
    later = kept.later(kept.stored)
    line = [kept.name, f"{kept.stored[0] / 1e6:.2f}", f"{later / 1e6:.3f}", f"{raw / later:.1f}",
            f"{kept.later(kept.commit_s):.3f}"]  # fmt: skip
    line.append(f"{kept.later(kept.checkout_s):.3f}" if kept.checkout_s else "")
    for name in ("weight_rel", "residual_nmse", "fisher_nmse", "first_nmse", "root_second_nmse",
                 "update_nmse"):  # fmt: skip
        values = [getattr(quality, name) for quality in kept.quality]
        line.append(f"{statistics.mean(values):.4f}" if values else "")
    return line


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="a folder of step<N>.pt files")
    parser.add_argument("--make", type=Path, metavar="RUN", help="train one")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=1 << 60)
    parser.add_argument("--csv", type=Path, help="write the table here too")
    options = parser.parse_args()
    if options.make:
        spec = TrainSpec(
            steps=options.steps, every=options.every, beta2=options.beta2, seed=options.seed
        )
        make(options.make, spec)
    folder = options.run or options.make
    if folder is None:
        parser.error("name a run, or make one with --make")
    paths = stretch(folder, options.first, options.last)
    if len(paths) < 2:
        sys.exit(f"{folder} has fewer than two checkpoints in that range")
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as name:
        scratch = Path(name)
        kept: list[Kept | None] = [
            keep_torch(paths, scratch), keep_zstd(paths, scratch), keep_zipnn(paths),
            *(keep_ckpt(paths, scratch, codec) for codec in CODECS),
        ]  # fmt: skip
    raw = paths[-1].stat().st_size
    rows = [row(each, raw) for each in kept if each is not None]
    table = Table(title=f"{len(paths)} checkpoints of {raw:,} bytes; later = median of all but one")
    for title in HEADING:
        table.add_column(title, justify="left" if title == "kept as" else "right")
    for line in rows:
        table.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([HEADING, *rows])


if __name__ == "__main__":
    main()
