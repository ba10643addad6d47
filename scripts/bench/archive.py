"""Measure the archive: size, lag and loss of every commit of a run as restored.

    python -m scripts.bench.archive RUNS/gpt-b0.95 --stretch 700 1500 50 [--every 2 4 8] [--csv F]

`later` counts everything that the archived commits take: frames, tables, records and commits.  The
first commit and those after the last anchor are not archived and do not count.  `joint` is what
the first near commit after the last anchor takes more than before: it is encoded against the
anchor without loss.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from ckptvcs.repo import Repo
from scripts.bench.quality import State, weights
from scripts.bench.resume import loss_of
from scripts.bench.runs import unseen_tokens
from scripts.tinygpt import TinyGPT, TrainSpec

COLUMNS = ("stored as", "later", "lag mean", "lag max", "gap mean", "gap max", "joint")
_TOKENS = 40_000


class Run:
    """The states of a stretch of a run, with their loss on unseen text."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps, self.spec = folder, steps, TrainSpec()
        self.tokens = unseen_tokens(self.spec, 2_000_000 + _TOKENS)[-_TOKENS:]
        self.model = TinyGPT(self.spec)
        self.losses = {step: self.loss(self.state(step)) for step in steps}

    def state(self, step: int) -> State:
        """Return the original state of a step."""
        found: State = torch.load(self.folder / f"step{step}.pt", weights_only=True)
        return found

    def loss(self, state: State) -> float:
        """Return the loss of a state on unseen text."""
        self.model.load_state_dict(state["model"])
        return loss_of(self.model, self.spec, self.tokens)

    def row(self, name: str, repo: Repo, steps: list[int]) -> dict[str, Any]:
        """Return the lag and the loss gap of some commits of a repository."""
        lags, gaps = [], []
        for step in steps:
            before = weights(self.state(self.steps[self.steps.index(step) - 1]))
            true, state = weights(self.state(step)), repo.checkout(step)
            lags.append(_distance(weights(state), true) / _distance(true, before))
            gaps.append(self.loss(state) - self.losses[step])
        return {
            "stored as": name,
            "lag mean": f"{statistics.mean(lags):.2f}",
            "lag max": f"{max(lags):.2f}",
            "gap mean": f"{statistics.mean(gaps):+.4f}",
            "gap max": f"{max(gaps):+.4f}",
        }


def _distance(a: State, b: State) -> float:
    return sum(float((a[name] - b[name]).double().square().sum()) for name in a)


def _repo(folder: Path, every: int) -> Repo:
    repo = Repo.init(folder)
    for key, value in {"keep-exact": "0", "provenance": "off", "archive-every": every}.items():
        repo.configure(key, str(value))
    return repo


def from_near(run: Run, every: int, folder: Path) -> list[dict[str, Any]]:
    """Measure near commits, and then the same ones archived by gc."""
    repo = _repo(folder, every)
    for step in run.steps:
        repo.commit(run.state(step), step=step)
    first, *rest = run.steps
    raw, before = repo.show(first).commit.raw_bytes, repo.stats().history_bytes
    size = before - repo.show(first).stored_bytes
    near = run.row("near", repo, rest) | {"later": f"{raw * len(rest) / size:.0f}x"}
    repo.configure("archive-after", "1")
    plan = repo.gc(now=True, archive=True)
    names = {row.commit for row in plan.archived}
    steps = [step for step in rest if repo.resolve(step) in names]
    others = repo.disk_usage([s for s in run.steps if s not in steps], by="commit").size_bytes
    size = repo.stats().history_bytes - others
    name = f"archive, every {every}, from near"
    row = run.row(name, repo, steps) | {"later": f"{raw * len(steps) / size:.0f}x"}
    after = run.steps[run.steps.index(steps[-1]) + 1]
    joint = repo.disk_usage([after], by="commit").size_bytes
    return [near, row | {"joint": f"{joint / 1e6:.2f} MB"}]


def direct(run: Run, every: int, folder: Path) -> dict[str, Any]:
    """Measure commits that an import archives from their exact form."""
    repo = _repo(folder / "run", every)
    (folder / "checkpoints").mkdir()
    for step in run.steps:
        shutil.copy(run.folder / f"step{step}.pt", folder / "checkpoints")
    importer = repo.import_folder(folder / "checkpoints")
    importer.run_archived(
        delete=False, accept_near=False, progress=lambda _: None, watch=lambda _: None
    )
    steps = [s for s in run.steps if repo.show(s).fidelity["model"] == "archived"]
    raw = repo.show(steps[0]).commit.raw_bytes
    others = repo.disk_usage([s for s in run.steps if s not in steps], by="commit").size_bytes
    size = repo.stats().history_bytes - others
    name = f"archive, every {every}, direct"
    return run.row(name, repo, steps) | {"later": f"{raw * len(steps) / size:.0f}x"}


def main() -> None:
    """Print the table, and write it as CSV on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stretch", type=int, nargs=3, default=(700, 1500, 50))
    parser.add_argument("--every", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, stop, interval = options.stretch
    run = Run(options.run, list(range(start, stop + 1, interval)))
    rows: list[dict[str, Any]] = []
    for every in options.every:
        with tempfile.TemporaryDirectory() as scratch:
            near, archived = from_near(run, every, Path(scratch) / "near")
            rows += [archived, direct(run, every, Path(scratch))]
            rows = rows if rows[0]["stored as"] == "near" else [near, *rows]
        print(f"measured every {every}", flush=True)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(row.get(column, "") for column in COLUMNS) + " |")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
