"""Plot error against size for near and ExCP, over a range of settings.

python -m scripts.bench.curves RUNS --csv FILE --picture FILE.svg
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench.methods import keep_ckpt
from scripts.bench.tables import STRETCHES, stretch

FAMILIES = {
    "near": [f"near:step={step}" for step in (1.1, 1.5, 1.9, 2.4, 3.0, 4.0)],
    "ExCP": [f"excp:alpha={alpha}" for alpha in (1e-5, 2e-5, 5e-5, 1e-4)],
    "ExCP, fixed multiplier": [f"excp-max:multiplier={m}" for m in (1, 1.5, 2, 2.5, 3.5)],
}
SHOWN = ("late-b0.95", "late-b0.999")
ERRORS = ("residual_nmse", "fisher_nmse", "update_nmse")
TICKS = (20, 50, 100, 200, 400)
LATEST = 6  # checkpoints per point: the last ones of a stretch


def measure(runs: Path, name: str) -> list[dict[str, Any]]:
    """Return a row for each setting of each family, on one stretch."""
    run, *steps = STRETCHES[name]
    paths = stretch(runs / run, *steps)[-LATEST:]
    rows = []
    for family, codecs in FAMILIES.items():
        for codec in codecs:
            with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as scratch:
                kept = keep_ckpt(paths, Path(scratch), codec)
            row: dict[str, Any] = {"stretch": name, "family": family, "codec": codec}
            row["ratio"] = round(paths[-1].stat().st_size / kept.later(kept.stored), 2)
            for error in ERRORS:
                values = [getattr(quality, error) for quality in kept.quality]
                row[error] = float(f"{sum(values) / len(values):.4g}")
            rows.append(row)
            sys.stderr.write(f"{row}\n")
    return rows


def pyplot() -> Any:
    """Import pyplot, set up for reproducible SVG files."""
    import matplotlib as mpl  # noqa: PLC0415  an extra

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ckptvcs"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt


def plain_ratios(axis: Any) -> None:
    """Make the x axis logarithmic, with a few ratios as labels."""
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick}x" for tick in TICKS])
    axis.minorticks_off()
    axis.grid(alpha=0.3, linewidth=0.5)


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Draw a column for each error and a row for each stretch."""
    plt = pyplot()
    titles = ("residual NMSE", "Fisher-weighted NMSE", "update NMSE")
    figure, axes = plt.subplots(
        len(SHOWN), len(ERRORS), figsize=(11, 3.1 * len(SHOWN)), sharex=True, squeeze=False
    )
    for name, line in zip(SHOWN, axes, strict=True):
        for error, title, axis in zip(ERRORS, titles, line, strict=True):
            for family in FAMILIES:
                points = sorted(
                    (row["ratio"], row[error])
                    for row in rows
                    if (row["stretch"], row["family"]) == (name, family)
                )
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=family)
            plain_ratios(axis)
            axis.set_yscale("log")
            axis.set_title(f"{title}, beta2 {name.removeprefix('late-b')}", fontsize=9)
            if error == "update_nmse":
                axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    for axis in axes[-1]:
        axis.set_xlabel("raw bytes / stored bytes")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder of scripts.bench.runs")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    rows = [row for name in SHOWN for row in measure(options.runs, name)]
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.picture)


if __name__ == "__main__":
    main()
