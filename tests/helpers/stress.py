"""Writers, readers and a collector at once, each a process of its own.

A content is made of a name, and the message of its commit is that name: whoever reads one knows
whether it is right.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptvcs.errors import BusyError, CkptError, ConflictError, NotFoundError
from ckptvcs.gc.retention import Policy
from ckptvcs.repo import Repo


def content(name: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(hash_of(name))
    return {"w": torch.randn(60, 20, generator=draw), "b": torch.randn(300, generator=draw)}


def hash_of(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(name.encode(), "big") % (1 << 31)


def write(root: Path, seconds: float, number: int) -> None:
    """Commit, and print the id of each that succeeded.  Every other writer has its own branch."""
    repo, end, count = Repo.open(root), time.monotonic() + seconds, 0
    branch = "main" if number % 2 else f"side{number}"
    path = root / f"writer{number}.pt"
    while time.monotonic() < end or not count:
        name = f"{number} {count}"
        torch.save({"model": content(name)}, path)
        try:
            made = repo.commit_path(path, message=name, branch=branch, codec="lossless")
            print(made.id, flush=True)
            count += 1
        except (ConflictError, BusyError):
            time.sleep(random.random() / 50)
        if count % 7 == 6:
            repo = Repo.open(root)


def read(root: Path, seconds: float, number: int) -> None:
    """Restore commits by chance: each is what its message says."""
    end, draw, count = time.monotonic() + seconds, random.Random(number), 0
    repo = Repo.open(root)
    while time.monotonic() < end:
        if draw.random() < 0.2:
            repo = Repo.open(root)
        entries = repo.log(20, all_branches=True)
        if not entries:
            continue
        entry = draw.choice(entries)
        try:
            found = repo.checkout(f"id:{entry.id}")["model"]
        except NotFoundError:
            continue  # dropped, which the log shows
        true = content(entry.commit.message)
        assert all(torch.equal(found[key], true[key]) for key in true), entry.commit.message
        count += 1
    print(count, flush=True)


def collect(root: Path, seconds: float, number: int) -> None:
    """Collect again and again, by rules at times, and take that back at others."""
    end, draw, count = time.monotonic() + seconds, random.Random(number), 0
    while time.monotonic() < end or not count:
        repo = Repo.open(root)
        try:
            kind = draw.random()
            if kind < 0.2:
                repo.gc(Policy(last=5), now=True)
            elif kind < 0.3:
                repo.gc(Policy(last=8), rekey=True, now=True)
            else:
                repo.gc()
            count += 1
        except BusyError:
            pass
        time.sleep(0.01)
    print(count, flush=True)


ROLES = {"write": write, "read": read, "collect": collect}


@dataclass(frozen=True)
class Outcome:
    """The ids that writers reported, and how often readers read and the collector swept."""

    commits: frozenset[str]
    reads: int
    sweeps: int


def run(root: Path, seconds: float, *, writers: int, readers: int) -> Outcome:
    """Start all of them at once, and wait.  Raises AssertionError where one of them failed."""
    roles = [*["write"] * writers, *["read"] * readers, "collect"]
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.helpers.stress",
                role,
                str(root),
                str(seconds),
                str(number),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, role in enumerate(roles)
    ]
    printed: dict[str, list[str]] = {role: [] for role in ROLES}
    failed = []
    for role, process in zip(roles, running, strict=True):
        out, err = process.communicate(timeout=seconds * 5 + 300)
        printed[role] += out.split()
        failed += [f"{role}: {err[-3000:]}"] if process.returncode else []
    assert not failed, "\n".join(failed)
    return Outcome(
        frozenset(printed["write"]),
        sum(map(int, printed["read"])),
        sum(map(int, printed["collect"])),
    )


if __name__ == "__main__":
    _, role, where, duration, who = sys.argv
    try:
        ROLES[role](Path(where), float(duration), int(who))
    except CkptError as error:
        sys.exit(f"{type(error).__name__}: {error}")
