"""Tabulate sizes, times and errors of several methods on stretches of training runs.

python -m scripts.bench.tables RUNS --csv FILE [--stretch late-b0.95 ...] [--ablation]
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
import tempfile
from pathlib import Path

from scripts.bench.methods import Kept, keep_ckpt, keep_torch, keep_zipnn, keep_zstd
from scripts.bench.runs import FINETUNE, VISION

CODECS = ("near", "lossless", "excp", "excp-max")
ABLATIONS = (
    "near",
    "near:gamma=0",
    "near:gamma=0.25",
    "near:cap=1e9",
    "near:step=1e9,cap=2.4",
    "near:zone=0.66,step=1.8",
    "near:rank=0,moment_step=4,max_update_nmse=1e9",
    "near:rank=0,moment_step=1e9,max_update_nmse=1e9",
    "near:rank=4",
    "near:rank=16",
    "near:step=1.6",
    "near:step=3",
    "near:step=4",
)
STRETCHES = {
    "late-b0.95": ("gpt-b0.95", 1050, 1500, 50),
    "late-b0.999": ("gpt-b0.999", 1050, 1500, 50),
    "early-b0.95": ("gpt-b0.95", 50, 500, 50),
    "every10-b0.95": ("gpt-b0.95", 1050, 1150, 10),
    "every10-b0.999": ("gpt-b0.999", 1050, 1150, 10),
    "every200-b0.95": ("gpt-b0.95", 500, 1500, 200),
    "every200-b0.999": ("gpt-b0.999", 500, 1500, 200),
    "bf16": (FINETUNE, 50, 500, 50),
    "vision": (VISION, 500, 1000, 50),
}
"""Run, first and last step, steps between two checkpoints."""

HEADING = [
    "stretch",
    "kept as",
    "raw MB",
    "first MB",
    "later MB",
    "ratio",
    "commit s",
    "checkout s",
    "weight_rel",
    "lag",
    "residual NMSE",
    "Fisher NMSE",
    "m NMSE",
    "sqrt(v) NMSE",
    "update NMSE",
    "worst tensor",
]


def stretch(folder: Path, first: int, last: int, every: int = 1) -> list[Path]:
    """Return the files of a run whose step is in a range, in order."""
    paths = {}
    for path in folder.iterdir():
        step = re.search(r"([0-9]+)\.\w+$", path.name)
        if step and first <= int(step[1]) <= last and (int(step[1]) - first) % every == 0:
            paths[int(step[1])] = path
    return [paths[step] for step in sorted(paths)]


def line(name: str, kept: Kept, raw: int) -> list[str]:
    """Return a line of the table."""
    later = kept.later(kept.stored)
    cells = [
        name,
        kept.name,
        f"{raw / 1e6:.2f}",
        f"{kept.stored[0] / 1e6:.2f}",
        f"{later / 1e6:.3f}",
        f"{raw / later:.1f}",
        f"{kept.later(kept.commit_s):.3f}",
        f"{kept.later(kept.checkout_s):.3f}" if kept.checkout_s else "",
    ]
    for field in (
        "weight_rel",
        "lag",
        "residual_nmse",
        "fisher_nmse",
        "first_nmse",
        "root_second_nmse",
        "update_nmse",
    ):
        values = [getattr(quality, field) for quality in kept.quality]
        cells.append(f"{statistics.mean(values):.4g}" if values else "")
    cells.append(f"{max(q.worst for q in kept.quality):.3g}" if kept.quality else "")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder of scripts.bench.runs")
    parser.add_argument("--stretch", action="append", choices=STRETCHES, help="default: all")
    parser.add_argument("--codec", action="append", help="codec; leaves out the other methods")
    parser.add_argument("--ablation", action="store_true", help="compare settings of near")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    codecs = ABLATIONS if options.ablation else options.codec or CODECS
    rows: list[list[str]] = []
    for name in options.stretch or STRETCHES:
        run, *steps = STRETCHES[name]
        paths = stretch(options.runs / run, *steps)
        if len(paths) < 2:
            sys.exit(f"{options.runs / run} lacks these steps; run scripts.bench.runs")
        raw = paths[-1].stat().st_size
        with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as scratch:
            place = Path(scratch)
            kept: list[Kept | None] = []
            if codecs is CODECS:
                kept = [keep_torch(paths, place), keep_zstd(paths, place), keep_zipnn(paths)]
            kept += [keep_ckpt(paths, place, codec) for codec in codecs]
        rows += [line(name, each, raw) for each in kept if each is not None]
        for row in rows[-len(kept) :]:
            sys.stderr.write("  ".join(row) + "\n")
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([HEADING, *rows])


if __name__ == "__main__":
    main()
