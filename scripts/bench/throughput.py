"""Measure time and memory of commit and checkout against other methods.

python -m scripts.bench.throughput --csv FILE [--mb 302] [--rounds 8]

The state in memory is synthetic: matrices 2048 wide, small changes of weights, first moments of low
rank. Each round runs every method once, so that a slow phase of the machine affects all of them.
The table shows medians of the seconds, and of the ratio to torch in the same round.

Memory is the peak of anonymous pages in /proc, minus the value before the method began. The output
ends with the bytes of the last commit by purpose.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import zstandard

from ckptvcs.codec.kernels import compiling
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from scripts.bench.byte_count import count_bytes

WIDTH = 2048
DEPTH = 8

State = dict[str, Any]


class MadeUp:
    """A synthetic training state of about `size` bytes."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        self.weights: dict[str, torch.Tensor] = {}
        self.moments: dict[int, dict[str, torch.Tensor]] = {}
        for layer in range(max(1, round(size / (12 * WIDTH * WIDTH)))):
            for shape in ((WIDTH, WIDTH), (WIDTH,)):
                self._add(f"layer{layer}.{'weight' if len(shape) == 2 else 'bias'}", shape)

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        second = torch.exp(torch.randn(shape) * 0.5) * 1e-8
        for axis in range(len(shape)):
            line = torch.exp(torch.randn(shape[axis]) * 0.7)
            second *= line.view([-1 if axis == a else 1 for a in range(len(shape))])
        first = torch.randn(shape)
        if len(shape) == 2:
            first = 0.4 * first + torch.randn(shape[0], 8) @ torch.randn(8, shape[1]) / 3
        self.moments[len(self.weights)] = {
            "step": torch.tensor(1.0),
            "exp_avg": first * second.sqrt() * 0.3,
            "exp_avg_sq": second,
        }
        self.weights[name] = torch.randn(shape) * 0.02

    def move(self) -> None:
        """Change the state about as much as some training steps."""
        for weight in self.weights.values():
            weight.add_(torch.randn(weight.shape), alpha=2e-5)
        for moment in self.moments.values():
            moment["exp_avg"].mul_(0.999)
            moment["exp_avg_sq"].mul_(0.9995)

    def state(self, step: int) -> State:
        """Return the state; its tensors are not copied."""
        names = list(self.weights)
        group = {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "params": list(range(len(names))),
            "param_names": names,
        }
        return {
            "model": self.weights,
            "step": step,
            "optimizer": {"state": self.moments, "param_groups": [group]},
        }


def durable(write: Callable[[Any], object], path: Path) -> None:
    """Write a file and sync it."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def flat(state: State) -> dict[str, torch.Tensor]:
    """Return the tensors of a state by unique names."""
    out = dict(state["model"])
    for number, row in state["optimizer"]["state"].items():
        out.update({f"{number}.{name}": value for name, value in row.items()})
    return out


def anonymous() -> float:
    """Return the anonymous memory of this process in MB."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith("RssAnon"):
            return int(row.split()[1]) / 1000
    return 0.0


class Watch:
    """The peak of anonymous memory, minus the value at the beginning."""

    def __enter__(self) -> Watch:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # return free memory first
            ctypes.CDLL(None).malloc_trim(0)
        self._before = self._peak = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self._peak = max(self._peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.mb = self._peak - self._before


def ways(
    made: MadeUp, repo: Repo, exact: Repo, scratch: Path
) -> dict[str, Callable[[int], object]]:
    """Return the methods by name, writers first; each takes the number of the round.

    `repo` has no exact patches, `exact` those of the newest two commits.
    """
    paths = {name: scratch / name for name in ("pt", "safetensors", "zst")}
    packer = zstandard.ZstdCompressor(level=3)

    def checkout_elsewhere(_step: int) -> object:
        return Repo.open(repo.folder).checkout("HEAD")

    return {
        "torch.save + fsync": lambda step: durable(
            lambda file: torch.save(made.state(step), file), paths["pt"]
        ),
        "ckpt commit, near alone": lambda step: repo.commit(made.state(step), step=step),
        "ckpt commit (default: exact too)": lambda step: exact.commit(made.state(step), step=step),
        "safetensors.save + fsync": lambda step: durable(
            lambda file: file.write(safetensors.torch.save(flat(made.state(step)))),
            paths["safetensors"],
        ),
        "zstd -3 of the file + fsync": lambda _: durable(
            lambda file: file.write(packer.compress(paths["pt"].read_bytes())), paths["zst"]
        ),
        "torch.load": lambda _: torch.load(paths["pt"], weights_only=True, mmap=False),
        "ckpt checkout of near, same process": lambda _: repo.checkout("HEAD"),
        "ckpt checkout of near, repository reopened, from the chain": checkout_elsewhere,
        "ckpt checkout of near, repository reopened, again": checkout_elsewhere,
        "ckpt checkout of exact, same process": lambda _: exact.checkout("HEAD"),
        "safetensors.load": lambda _: safetensors.torch.load(paths["safetensors"].read_bytes()),
        "zstd -d": lambda _: zstandard.ZstdDecompressor().decompress(paths["zst"].read_bytes()),
    }


def keep_zipnn(made: MadeUp) -> dict[str, float]:
    """Estimate the seconds of ZipNN from the first 64 MB, because it is slow."""
    try:
        from zipnn import ZipNN  # noqa: PLC0415  an extra
    except ImportError:
        return {}
    tensors = flat(made.state(0)).values()
    whole = sum(value.nbytes for value in tensors)
    data = b"".join(value.numpy().tobytes() for value in tensors if value.ndim == 2)[: 1 << 26]
    started = time.perf_counter()
    packed = ZipNN(bytearray_dtype="float32", input_format="byte").compress(bytearray(data))
    middle = time.perf_counter()
    ZipNN(bytearray_dtype="float32", input_format="byte").decompress(packed)
    ended = time.perf_counter()
    share = whole / len(data)
    return {"ZipNN compress": (middle - started) * share, "ZipNN -d": (ended - middle) * share}


def loading() -> dict[str, float]:
    """Return the seconds to import the compiled kernels, without and with numba's cache."""
    command = [sys.executable, "-c", "import ckptvcs.codec.kernels.compiled"]
    times = {}
    with tempfile.TemporaryDirectory(prefix="ckpt-numba-") as cache:
        for name in ("kernels, compiled", "kernels, from numba's cache"):
            started = time.perf_counter()
            subprocess.run(command, check=True, env=os.environ | {"NUMBA_CACHE_DIR": cache})
            times[name] = time.perf_counter() - started
    return times


def measure(size: int, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    made, repo, exact = MadeUp(size), Repo.init(scratch / "repo"), Repo.init(scratch / "exact")
    repo.configure("keep-exact", "0")
    turns = ways(made, repo, exact, scratch)
    for step in range(1, DEPTH + 1):
        repo.commit(made.state(step), step=step)
        exact.commit(made.state(step), step=step)
        made.move()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    memory: dict[str, float] = {}
    for step in range(DEPTH + 1, DEPTH + 1 + rounds):
        for name, turn in turns.items():
            started = time.perf_counter()
            turn(step)
            seconds[name].append(time.perf_counter() - started)
        made.move()
    for name, turn in turns.items():
        with Watch() as watch:
            turn(DEPTH + 1 + rounds)
        memory[name] = watch.mb
    rows = []
    reference = "torch.save + fsync"
    for name, times in seconds.items():
        if name == "torch.load":
            reference = name
        ratios = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        rows.append(
            {
                "what": name,
                "seconds": round(statistics.median(times), 3),
                "of torch": round(statistics.median(ratios), 2),
                "memory MB": round(memory[name]),
            }
        )
    for name, value in (keep_zipnn(made) | loading()).items():
        rows.append({"what": name, "seconds": round(value, 2)})
    commit = repo.resolve("HEAD")
    last = handle(repo).catalog.commit(commit)
    raw = last.raw_bytes
    parts, excesses = count_bytes(repo, commit)
    total = sum(parts.values())
    side = sum(value for what, value in parts.items() if what.startswith("side"))
    rows += [
        {"what": f"last commit: depth {last.depth}, {raw:,} bytes, ratio {raw / total:.1f}"},
        {"what": f"side information, matrices {WIDTH} wide: {side / total:.2%}"},
        {"what": f"excess of codes over their entropy: at most {max(excesses):.2%}"},
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=302)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    while not compiling.is_tried() and compiling.start():
        time.sleep(1)
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as scratch:
        rows = measure(int(options.mb * 1e6), options.rounds, Path(scratch))
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("what", "seconds", "of torch", "memory MB"))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        sys.stdout.write("  ".join(f"{value}" for value in row.values()) + "\n")
    sys.stdout.write(f"numpy {np.__version__}, torch {torch.__version__}, {os.cpu_count()} cores\n")


if __name__ == "__main__":
    main()
