"""The demo: train, commit, log, check out an old step, verify, compare sizes.

Everything happens in one folder (.demo by default) with the command line that users have.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scripts.tinygpt import TrainSpec, train

console = Console()


def ckpt(folder: Path, *args: str, show: bool = True) -> str:
    """Run a command as a user would, showing it and what it prints."""
    if show:
        console.print(f"\n[bold]$ ckpt {' '.join(args)}[/bold]")
    done = subprocess.run(
        [sys.executable, "-m", "ckptvcs", *args],
        cwd=folder, text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    if show:
        console.print(done.stdout.rstrip(), markup=False, highlight=False)
    return done.stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train_and_commit(folder: Path, spec: TrainSpec, codec: str) -> tuple[dict[int, str], int]:
    """Train, committing model.pt each time; the hashes of the originals, and their bytes."""
    originals: dict[int, str] = {}
    raw = 0
    model = folder / "model.pt"
    bar = Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
    with bar:
        task = bar.add_task("training", total=spec.steps, note="")
        recent = 0.0

        def on_step(step: int, loss: float) -> None:
            bar.update(task, completed=step, note=f"loss {loss:.2f}")

        def on_checkpoint(step: int, loss: float, state: dict[str, Any]) -> None:
            nonlocal raw, recent
            torch.save(state, model)
            originals[step] = sha256(model)
            raw += model.stat().st_size
            ckpt(folder, "commit", "model.pt", "-m", f"step {step}", "--metric", f"loss={loss:.4f}",
                 "--codec", codec, show=False)  # fmt: skip

        train(spec, on_step, on_checkpoint)
    return originals, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=40)
    options = parser.parse_args()
    spec = TrainSpec(steps=options.steps, every=options.every)
    rows = []
    for codec in ("lossless", "excp"):
        folder = options.folder / codec
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        console.rule(f"one run, committed with --codec {codec}")
        ckpt(folder, "init")
        originals, raw = train_and_commit(folder, spec, codec)
        ckpt(folder, "log")
        old = sorted(originals)[len(originals) // 2]
        ckpt(folder, "checkout", str(old), "-o", "old.pt")
        same = sha256(folder / "old.pt") == originals[old]
        state = torch.load(folder / "old.pt", weights_only=True)
        if state["step"] != old or (codec == "lossless" and not same):
            raise SystemExit(f"step {old} did not come back as it was")
        console.print(f"old.pt is {'byte-identical to' if same else 'near'} the original at {old}")
        ckpt(folder, "verify")
        ckpt(folder, "stats")
        stored = sum(f.stat().st_size for f in (folder / ".ckpt").rglob("*")
                     if f.is_file() and "cache" not in f.parts)  # fmt: skip
        newest = folder / ".ckpt"
        rows.append((codec, len(originals), raw, stored, same))
        assert newest.exists()
    table = Table(title="sizes: every checkpoint kept")
    for name in ("kept as", "checkpoints", "bytes", "times smaller", "comes back"):
        table.add_column(name, justify="left" if name in ("kept as", "comes back") else "right")
    count, raw = rows[0][1], rows[0][2]
    table.add_row("torch.save files", str(count), f"{raw:,}", "1.0", "as it was")
    for codec, count, raw, stored, same in rows:
        table.add_row(f"ckpt, {codec}", str(count), f"{stored:,}", f"{raw / stored:.1f}",
                      "byte-identical" if same else "near, error in the log")  # fmt: skip
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
