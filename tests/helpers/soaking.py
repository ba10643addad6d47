"""A training process that goes on for long, with all that may happen beside it.

    python -m tests.helpers.soaking train FOLDER COMMITS SEED    prints a line of JSON for each look
    python -m tests.helpers.soaking read FOLDER SEED             reads until it is killed

Commits are made at once and in the background, in turn.  Beside them readers are killed at random,
children are forked that read by what they have inherited, settings change, gc runs, and `ckpt log`
is asked.  Whatever is not as it should be ends the process with an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptvcs.errors import BusyError, MissingObjectError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo

FORK, READER, SETTING, LOG, LOOK = 9, 14, 17, 23, 20  # commits between two of each
KEPT = (2, 5, 3)  # commits that stay exact, by the setting, in turn
_HUNG = 60  # seconds


def run_states(seed: int, shape: tuple[int, int] = (48, 40)) -> Iterator[dict[str, Any]]:
    """The states of a small run, with the moments of Adam, one after the other."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(*shape, generator=draw), "b": torch.randn(200, generator=draw)}
    step = 0
    while True:
        step += 1
        weights = {n: w + torch.randn(w.shape, generator=draw) * 1e-3 for n, w in weights.items()}
        moments = {
            n: {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.randn(w.shape, generator=draw) * 1e-3,
                "exp_avg_sq": torch.rand(w.shape, generator=draw) * 1e-6,
            }
            for n, w in enumerate(weights.values())
        }
        groups = [
            {
                "lr": 1e-3,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "params": [0, 1],
                "param_names": ["a", "b"],
            }
        ]
        yield {
            "model": weights,
            "optimizer": {"state": moments, "param_groups": groups},
            "step": step,
        }


def resident(pid: int | str) -> int:
    """Bytes of anonymous memory of a process: pages of mapped files belong to the system."""
    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int | str) -> int:
    """How many files a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def workers() -> list[int]:
    """The processes of this one that commit in the background."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"ckptvcs.background.server" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def index_bytes(repo: Repo) -> int:
    """The bytes on disk of the index, with all that belongs to it."""
    files = (path for path in (repo.folder / "cache").rglob("*") if "index" in str(path))
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


class Soak:
    """One run."""

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self._folder, self._count = folder, count
        self._draw = random.Random(seed)
        self._repo = Repo.init(folder)
        self._states = run_states(seed)
        self._readers: list[subprocess.Popen[bytes]] = []
        self._kept, self._since = KEPT[0], 0
        self.killed = self.forked = self.changed = self.asked = 0

    def run(self) -> None:
        """Make all commits."""
        try:
            for step in range(1, self._count + 1):
                state = next(self._states)
                if step % 2:
                    self._repo.commit(state, step=step)
                else:
                    self._repo.commit_async(state, step=step)
                self._beside(step)
                if step % LOOK == 0 or step == self._count:
                    self._repo.wait()
                    self._look(step)
            self._kill(len(self._readers))
            self._repo.close()
        finally:
            for reader in self._readers:
                reader.kill()

    def _beside(self, step: int) -> None:
        if step % FORK == 0:
            self._fork(step)
        if step % READER == 0:
            self._start_reader()
        if self._draw.random() < 1 / READER:
            self._kill(1)
        if step % SETTING == 0:
            self._change(step)
        if step % LOG == 0:
            self._ask_log(step)
        if step in (self._count // 3, 2 * self._count // 3):
            self._repo.wait()
            with contextlib.suppress(BusyError):
                self._repo.gc()

    def _fork(self, step: int) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(_HUNG)
            try:
                assert self._repo.log(5)[0].step in (step - 1, step)
                assert self._repo.checkout(self._draw.randint(1, step - 1))["step"] < step
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"a forked child that reads ended with {status} at step {step}"
        self.forked += 1

    def _start_reader(self) -> None:
        command = [sys.executable, "-m", "tests.helpers.soaking", "read", str(self._folder)]
        seed = str(self._draw.randrange(1 << 30))
        self._readers.append(subprocess.Popen([*command, seed], stdin=subprocess.DEVNULL))

    def _kill(self, count: int) -> None:
        for _ in range(min(count, len(self._readers))):
            reader = self._readers.pop(0)
            assert reader.poll() is None, f"a reader ended with {reader.returncode}"
            reader.kill()
            reader.wait()
            self.killed += 1

    def _ckpt(self, *args: str) -> str:
        command = [sys.executable, "-m", "ckptvcs", "--repo", str(self._folder), *args]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def _change(self, step: int) -> None:
        self._repo.wait()
        # What was kept when the setting came, and every commit since then.
        kept = min(self._kept, step - self._since)
        exact = [entry.exact for entry in self._repo.log(kept)]
        assert all(exact), f"of the newest {kept} at step {step} are exact: {exact}"
        self.changed += 1
        self._kept, self._since = KEPT[self.changed % len(KEPT)], step
        self._ckpt("config", "keep-exact", str(self._kept))

    def _ask_log(self, step: int) -> None:
        rows = json.loads(self._ckpt("log", "--json", "-n", "3"))
        assert rows[0]["step"] in (step - 1, step), rows[0]["step"]
        self.asked += 1

    def _look(self, step: int) -> None:
        own = workers()
        print(
            json.dumps(
                {
                    "step": step,
                    "memory": resident("self"),
                    "files": descriptors("self"),
                    "worker_memory": max(map(resident, own), default=0),
                    "worker_files": max(map(descriptors, own), default=0),
                    "index": index_bytes(self._repo),
                    "killed": self.killed,
                    "forked": self.forked,
                    "changed": self.changed,
                    "asked": self.asked,
                }
            ),
            flush=True,
        )


def read(folder: Path, seed: int) -> None:
    """Read at random, by a repository that is opened now and then."""
    os.nice(19)  # the training comes first
    draw = random.Random(seed)
    while True:
        repo = Repo.open(folder)
        for _ in range(20):
            entries = repo.log(draw.choice([1, 10, 100]))
            with contextlib.suppress(MissingObjectError):  # which gc has just moved, twice
                handle(repo).restorer(draw.choice(entries).id, near=True).fidelity  # noqa: B018
            time.sleep(draw.random() * 0.01)


if __name__ == "__main__":
    what, where, *numbers = sys.argv[1:]
    if what == "train":
        Soak(Path(where), *map(int, numbers)).run()
    else:
        read(Path(where), int(numbers[0]))
