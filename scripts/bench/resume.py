"""Measure the loss after training continues from a restored state.

python -m scripts.bench.resume RUNS --csv FILE [--picture FILE.svg] [--codec near ...]

RUNS is the folder of `scripts.bench.runs`. For each point, the script commits a chain that ends
there and checks it out. Training continues from the restored state and from the true one with the
same batches and a constant learning rate. The gap is the difference of their validation losses; the
table shows its mean and standard error over all runs and points.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ckptvcs.repo import Repo
from scripts.bench.curves import plain_ratios, pyplot
from scripts.bench.runs import RESUME, unseen_tokens
from scripts.tinygpt import TinyGPT, TrainSpec, corpus, learning_rate, tokenize

STEPS = 60
POINTS = (750, 1050)
CODECS = ("near", "excp", "excp-max", "archive-2", "archive-4", "archive-8")
"""Codecs, and archives with an anchor every so many commits."""
CHAIN = 5  # deltas before a point, one per 50 steps


@torch.no_grad()
def loss_of(model: TinyGPT, spec: TrainSpec, tokens: torch.Tensor) -> float:
    """Return the mean loss over disjoint windows of tokens."""
    windows = tokens[: len(tokens) // (spec.context + 1) * (spec.context + 1)]
    total, rows = 0.0, windows.view(-1, spec.context + 1)
    for part in torch.split(rows, 64):
        logits = model(part[:, :-1])
        total += F.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (rows.shape[0] * spec.context)


def go_on(
    spec: TrainSpec, state: dict[str, Any], tokens: torch.Tensor, held_out: torch.Tensor
) -> float:
    """Train from a state at a constant learning rate; return the validation loss."""
    model = TinyGPT(spec)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=(0.9, spec.beta2), weight_decay=0.1
    )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(spec, state["step"])
    draw = torch.Generator().manual_seed(10_000 + state["step"])
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - spec.context - 1, (spec.batch,), generator=draw)
        window = torch.stack([tokens[s : s + spec.context + 1] for s in starts.tolist()])
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss_of(model, spec, held_out)


def restored(run: Path, point: int, codec: str, scratch: Path) -> tuple[dict[str, Any], float]:
    """Return the state restored from a chain, and the compression ratio of its deltas."""
    repo = Repo.init(scratch)
    repo.configure("keep-exact", "0")  # the point is restored from its near form
    stored, raw = [], 0
    for step in range(point - 50 * CHAIN, point + 1, 50):
        path = run / f"step{step}.pt"
        stored.append(repo.commit_path(path, message=path.stem, codec=codec).stored_bytes)
        raw = path.stat().st_size
    target = scratch / "back.pt"
    repo.checkout_files(repo.resolve("HEAD"), target, force=True)
    return torch.load(target, weights_only=True), raw / statistics.mean(stored[1:])


def archived(run: Path, point: int, every: int, scratch: Path) -> tuple[dict[str, Any], float]:
    """Return the state of an archived commit in the middle between two anchors, and the ratio.

    The first anchor before the point is itself archived.
    """
    repo = Repo.init(scratch)
    for key, value in {"keep-exact": 0, "archive-every": every, "archive-after": 1}.items():
        repo.configure(key, str(value))
    for step in range(point - 50 * (every + every // 2), point + 50 * (every // 2 + 1) + 1, 50):
        repo.commit_path(run / f"step{step}.pt", message="", step=step)
    rows = repo.gc(now=True, archive=True).archived
    assert repo.resolve(point) in {row.commit for row in rows if row.between}
    others = [entry.id for entry in repo.log() if not entry.near_error]
    size = repo.stats().history_bytes - repo.disk_usage(others, by="commit").size_bytes
    repo.checkout_files(repo.resolve(point), scratch / "back.pt", force=True)
    raw = (run / f"step{point}.pt").stat().st_size
    return torch.load(scratch / "back.pt", weights_only=True), raw * len(rows) / size


def main() -> None:
    """Run the experiment; write a line of CSV for each run, point and codec."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--codec", action="append", help=f"codec (default: {', '.join(CODECS)})")
    parser.add_argument("--tokens", type=int, default=220_000)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    spec = TrainSpec()
    tokens = torch.from_numpy(np.asarray(tokenize(corpus(spec.corpus_bytes), spec.vocab)))
    held_out = unseen_tokens(spec, options.tokens)
    for run in [options.runs / name for name in RESUME]:
        for point in POINTS:
            if not (run / f"step{point}.pt").exists():
                continue
            true = torch.load(run / f"step{point}.pt", weights_only=True)
            beta2 = true["optimizer"]["param_groups"][0]["betas"][1]
            spec = TrainSpec(beta2=beta2)
            reference = go_on(spec, true, tokens, held_out)
            for codec in options.codec or CODECS:
                with tempfile.TemporaryDirectory(prefix="ckpt-resume-") as scratch:
                    name, _, every = codec.partition("archive-")
                    if every:
                        state, ratio = archived(run, point, int(every), Path(scratch))
                    else:
                        state, ratio = restored(run, point, name, Path(scratch))
                gap = go_on(spec, state, tokens, held_out) - reference
                rows.append(
                    {
                        "run": run.name,
                        "beta2": beta2,
                        "point": point,
                        "codec": codec,
                        "ratio": round(ratio, 2),
                        "loss": round(reference, 5),
                        "gap": round(gap, 5),
                    }
                )
                sys.stderr.write(f"{rows[-1]}\n")
                with options.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0].keys())
                    writer.writeheader()
                    writer.writerows(rows)
    for line in summary(rows):
        sys.stdout.write(line + "\n")
    if options.picture:
        draw(rows, options.picture)


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Draw the mean gap and its standard error against the ratio of each codec."""
    plt = pyplot()
    keys = sorted({row["beta2"] for row in rows})
    figure, axes = plt.subplots(1, len(keys), figsize=(9, 3.4), squeeze=False)
    for beta2, axis in zip(keys, axes[0], strict=True):
        for codec in dict.fromkeys(row["codec"] for row in rows):
            found = [row for row in rows if (row["beta2"], row["codec"]) == (beta2, codec)]
            gaps = [row["gap"] for row in found]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
            ratio = statistics.mean(row["ratio"] for row in found)
            axis.errorbar(ratio, statistics.mean(gaps), yerr=error, fmt="o", capsize=3, label=codec)
        plain_ratios(axis)
        axis.set_yscale("log")
        axis.set_title(f"beta2 {beta2}", fontsize=9)
        axis.set_xlabel("raw bytes / stored bytes")
        axis.set_ylabel("loss above the uninterrupted run")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table with the mean gap and standard error of each beta2 and codec."""
    lines = ["| beta2 | codec | ratio | gap | standard error | n |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((row["beta2"], row["codec"]) for row in rows):
        found = [row for row in rows if (row["beta2"], row["codec"]) == key]
        gaps = [row["gap"] for row in found]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        lines.append(
            f"| {key[0]} | {key[1]} | {statistics.mean(r['ratio'] for r in found):.1f} "
            f"| {statistics.mean(gaps):+.4f} | {error:.4f} | {len(gaps)} |"
        )
    return lines


if __name__ == "__main__":
    main()
