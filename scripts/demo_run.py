"""The demo: train, commit, log, check out an old step, verify, compare sizes.

It commits one training run to two repositories with the command line: near and lossless.
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

CODECS = ("near", "lossless")
console = Console()


def ckpt(folder: Path, *args: str, show: bool = True) -> None:
    """Run a ckpt command; print it and its output if `show` is set."""
    if show:
        console.print(f"\n[bold]$ ckpt {' '.join(args)}[/bold]")
    done = subprocess.run(
        [sys.executable, "-m", "ckptvcs", *args],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    if show:
        console.print(done.stdout.rstrip(), markup=False, highlight=False, soft_wrap=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file; the store uses another hash function."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train_and_commit(folder: Path, spec: TrainSpec) -> tuple[dict[int, str], int]:
    """Train and commit to each repository; return the hashes by step and the total bytes."""
    originals: dict[int, str] = {}
    raw = 0
    model = folder / "model.pt"
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=spec.steps, note="")

        def on_step(step: int, loss: float) -> None:
            bar.update(task, completed=step, note=f"loss {loss:.2f}")

        def on_checkpoint(step: int, loss: float, state: dict[str, Any]) -> None:
            nonlocal raw
            torch.save(state, model)
            originals[step] = sha256(model)
            raw += model.stat().st_size
            for codec in CODECS:
                ckpt(
                    folder,
                    "--repo",
                    codec,
                    "commit",
                    "model.pt",
                    "-m",
                    f"step {step}",
                    "--metric",
                    f"loss={loss:.4f}",
                    "--codec",
                    codec,
                    show=False,
                )

        train(spec, on_step, on_checkpoint)
    return originals, raw


def look_back(folder: Path, codec: str, originals: dict[int, str]) -> bool:
    """Show a repository and restore an old step; return whether it is byte-identical."""
    console.print()
    console.rule(f"committed with --codec {codec}")
    ckpt(folder, "--repo", codec, "log")
    old = sorted(originals)[len(originals) // 2]
    ckpt(folder, "--repo", codec, "checkout", str(old), "-o", "old.pt", "--force")
    same = sha256(folder / "old.pt") == originals[old]
    state = torch.load(folder / "old.pt", weights_only=True)
    if state["step"] != old or (codec == "lossless" and not same):
        raise SystemExit(f"step {old} was not restored correctly")
    console.print(f"old.pt is {'byte-identical to' if same else 'near'} the original of step {old}")
    ckpt(folder, "--repo", codec, "verify")
    ckpt(folder, "--repo", codec, "stats")
    return same


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="output, deleted first")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=20)
    options = parser.parse_args()
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    for codec in CODECS:
        (folder / codec).mkdir(parents=True)
        ckpt(folder, "init", codec)
    originals, raw = train_and_commit(folder, TrainSpec(steps=options.steps, every=options.every))
    table = Table(title=f"{len(originals)} checkpoints, all kept")
    for name in ("as", "bytes", "ratio", "restored step"):
        table.add_column(name, justify="right" if name in ("bytes", "ratio") else "left")
    table.add_row("torch.save files", f"{raw:,}", "1.0", "byte-identical")
    for codec in CODECS:
        same = look_back(folder, codec, originals)
        files = [path for path in (folder / codec / ".ckpt").rglob("*") if path.is_file()]
        stored = sum(path.stat().st_size for path in files if "cache" not in path.parts)
        back = "byte-identical" if same else "near (error in the log)"
        table.add_row(f"ckpt, {codec}", f"{stored:,}", f"{raw / stored:.1f}", back)
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
