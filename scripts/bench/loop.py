"""Measure how much training time a checkpoint costs with several methods.

python -m scripts.bench.loop --csv FILE [--width 192] [--rounds 2]

One thread trains a GPT (`scripts/tinygpt.py`), so that other cores are free. In each round, each
method runs one stretch of steps with three checkpoints at even distances, the last one before the
last steps. The cost of three checkpoints is the additional time over a stretch without any in the
same round. The table shows the median over rounds, its share of a stretch, and the longest call.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import async_save

from ckptvcs.repo import Repo
from scripts.tinygpt import TrainSpec, train

CHECKPOINTS = 3
WARM = 3  # steps before the first stretch

State = dict[str, Any]
Keep = Callable[[int, State], Any]


class _Ended(Exception):
    pass


class Stretches:
    """Repeated stretches of training steps."""

    def __init__(self, spec: TrainSpec, steps: int) -> None:
        self._spec, self._steps = replace(spec, steps=10_000_000, every=1), steps

    def time(self, ways: dict[str, Keep], rounds: int) -> dict[str, list[tuple[float, float]]]:
        """Return the seconds of each stretch and of its longest call, by method and round."""
        turns = [(name, n) for n in range(rounds) for name in ways]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        length = (CHECKPOINTS + 1) * self._steps
        state = {"start": 0.0, "longest": 0.0}

        def after(step: int, _loss: float, tensors: State) -> None:
            at = step - WARM
            turn, within = divmod(at, length)
            if at < 0:
                return
            if within == 0:
                if turn:
                    name, _ = turns[turn - 1]
                    seconds = time.perf_counter() - state["start"]
                    found[name].append((seconds, state["longest"]))
                if turn == len(turns):
                    raise _Ended
                state.update(start=time.perf_counter(), longest=0.0)
            elif within % self._steps == 0:
                start = time.perf_counter()
                ways[turns[turn][0]](step, tensors)
                state["longest"] = max(state["longest"], time.perf_counter() - start)

        with contextlib.suppress(_Ended):
            train(self._spec, lambda *_: None, after)
        return found


def _saved(folder: Path) -> Keep:
    def keep(step: int, state: State) -> None:
        with (folder / "model.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    return keep


def _dcp(folder: Path) -> Keep:
    pending: list[Any] = []

    def keep(step: int, state: State) -> None:
        if pending:
            pending.pop().result()  # DCP does not allow two at once
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        pending.append(async_save(state, checkpoint_id=folder / "dcp"))

    return keep


def measure(spec: TrainSpec, steps: int, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    synchronous, background = (Repo.init(scratch / name) for name in ("sync", "async"))
    ways: dict[str, Keep] = {
        "nothing": lambda *_: None,
        "torch.save + fsync": _saved(scratch),
        "dcp.async_save": _dcp(scratch),
        "commit": lambda step, state: synchronous.commit(state, step=step),
        "commit_async": lambda step, state: background.commit_async(state, step=step),
    }
    timed = Stretches(spec, steps).time(ways, rounds + 1)
    background.close()
    timed = {name: turns[1:] for name, turns in timed.items()}  # the first round allocates memory
    rows = []
    for name, turns in timed.items():
        lost = [one - none for (one, _), (none, _) in zip(turns, timed["nothing"], strict=True)]
        whole = statistics.median(seconds for seconds, _ in timed["nothing"])
        rows.append(
            {
                "way": name,
                "seconds lost per checkpoint": round(statistics.median(lost) / CHECKPOINTS, 3),
                "of the stretch": f"{statistics.median(lost) / whole:.1%}",
                "longest call, seconds": round(
                    statistics.median(longest for _, longest in turns), 3
                ),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--steps", type=int, default=40, help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        spec = TrainSpec(width=options.width)
        rows = measure(spec, options.steps, options.rounds, Path(folder))
        dist.destroy_process_group()
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
