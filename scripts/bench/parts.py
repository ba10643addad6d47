"""Measure the parts of the near codec that no setting turns off.

python -m scripts.bench.parts RUNS --csv FILE

The script uses all matrices of the model in the late stretch of the first run. It compares
residuals with weights, a closed loop with an open one, row and column factors of second moments
with an exponent per word, and other ways to store the same codes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from ckptvcs.codec.codes import Codes, put_codes
from ckptvcs.codec.matrix import Rows
from ckptvcs.codec.near_moments import encode_second
from scripts.bench.tables import STRETCHES, stretch

Floats = NDArray[np.float32]
Row = tuple[str, str]

STEP, ZONE = 2.1, 0.5  # of the preset near, relative to residuals


def entropy(codes: NDArray[np.integer]) -> float:
    """Return the order-0 entropy in bits per code."""
    _, counts = np.unique(codes, return_counts=True)
    share = counts / codes.size
    return float(-(share * np.log2(share)).sum())


def quantize(values: Floats, step: float) -> tuple[NDArray[np.int32], Floats]:
    """Return codes, and their reconstruction levels: the mean of the values of each code."""
    units = values / np.float32(step)
    codes = (units + np.copysign(np.float32(1 - ZONE), units)).astype(np.int32)
    sizes, inverse = np.unique(np.abs(codes), return_inverse=True)
    sums = np.bincount(inverse.reshape(-1), np.abs(values))
    means = np.where(sizes == 0, 0, sums / np.bincount(inverse.reshape(-1)))
    return codes, (np.sign(codes) * means[inverse.reshape(-1)]).astype(np.float32)


def matrices(path: Path) -> tuple[dict[str, Floats], list[Floats]]:
    """Return the matrices of the model by name, and their second moments."""
    state = torch.load(path, weights_only=True)
    model = {n: v.numpy() for n, v in state["model"].items() if v.ndim == 2}
    moments = [m["exp_avg_sq"].numpy() for m in state["optimizer"]["state"].values()]
    return model, [m for m in moments if m.ndim == 2]


def loops_compared(paths: list[Path]) -> list[Row]:
    """Compare closed loop, open loop and weights without a base at the same step."""
    states = [matrices(path)[0] for path in paths]
    names = list(states[0])
    moved = [
        np.concatenate([(b[n] - a[n]).reshape(-1) for n in names])
        for a, b in itertools.pairwise(states)
    ]
    step = STEP * float(np.sqrt(np.mean(np.square(moved[-1], dtype=np.float64))))
    flat = [np.concatenate([state[n].reshape(-1) for n in names]) for state in states]
    closed, opened = flat[0].copy(), flat[0].copy()
    codes = np.zeros(0, np.int32)
    for before, after in itertools.pairwise(flat):
        old = closed
        codes, near = quantize(after - closed, step)
        closed = closed + near
        opened = opened + quantize(after - before, step)[1]
    energy = float(np.square(flat[-1] - old, dtype=np.float64).sum())
    errors = [
        float(np.square(flat[-1] - w, dtype=np.float64).sum()) / energy for w in (closed, opened)
    ]
    # A uniform step with about the error of the closed loop.
    fine = float(np.sqrt(12 * errors[0] * energy / flat[-1].size))
    alone = np.rint(flat[-1] / np.float32(fine)).astype(np.int32)
    return [
        ("residual NMSE, closed loop", f"{errors[0]:.3f}"),
        (f"residual NMSE, open loop, after {len(moved)} deltas", f"{errors[1]:.3f}"),
        ("bits per weight, residuals (order-0 entropy)", f"{entropy(codes):.3f}"),
        ("bits per weight, weights without a base, same error", f"{entropy(alone):.2f}"),
        *stored(codes),
    ]


def stored(codes: NDArray[np.int32]) -> list[Row]:
    """Return the bits per weight of codes in slices of 2^20, stored in several ways."""
    ways: dict[str, Any] = {"as near stores them": lambda c: put_codes(Codes(None, c), c.size)}
    for level in (1, 3, 19):
        packer = zstandard.ZstdCompressor(level=level)
        ways[f"a byte per code, zstd -{level}"] = lambda c, packer=packer: packer.compress(
            np.clip(c, -128, 127).astype(np.int8)
        )
    slices = [codes[at : at + (1 << 20)] for at in range(0, codes.size, 1 << 20)]
    return [
        (f"bits per weight, {name}", f"{8 * sum(len(way(c)) for c in slices) / codes.size:.3f}")
        for name, way in ways.items()
    ]


def seconds(path: Path) -> list[Row]:
    """Return the bits per second moment with two kinds of factors."""
    rows = []
    for name, per_word in (("row and column factors", False), ("an exponent per word", True)):
        size = count = 0
        for matrix in matrices(path)[1]:
            words = matrix.reshape(-1).view(np.uint32)[: 1 << 20]
            encoded = encode_second(words, "F32", Rows(words.size if per_word else matrix.shape[1]))
            assert encoded is not None
            size, count = size + len(encoded.payload), count + words.size
        rows.append((f"bits per second moment, {name}", f"{8 * size / count:.3f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder of scripts.bench.runs")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    run, *steps = STRETCHES["late-b0.95"]
    paths = stretch(options.runs / run, *steps)
    rows = [*loops_compared(paths), *seconds(paths[-1])]
    with options.csv.open("w", newline="") as file:
        csv.writer(file).writerows([("what", "value"), *rows])
    for what, value in rows:
        sys.stdout.write(f"{value:>8}  {what}\n")


if __name__ == "__main__":
    main()
