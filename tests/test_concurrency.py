"""Processes at once: nothing that was reported as committed is ever missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ckptvcs.repo import Repo

WRITER = """
import sys
from ckptvcs import ConflictError, BusyError, Repo
repo = Repo.open(sys.argv[1])
for step in range(int(sys.argv[3]), int(sys.argv[3]) + 12):
    while True:
        try:
            print(repo.commit_path(__import__("pathlib").Path(sys.argv[2]), message=str(step),
                                   step=None, raw=True, branch=sys.argv[4]).id)
            break
        except (ConflictError, BusyError):
            pass
"""
COLLECTOR = """
import sys
from ckptvcs import BusyError, Repo
repo = Repo.open(sys.argv[1])
swept = 0
while swept < 6:
    try:
        repo.gc(); swept += 1
    except BusyError:
        pass
"""


def start(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_writers_on_one_branch_one_on_another_and_a_collector(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.bin")
        files[-1].write_bytes(bytes([number]) * 5000)
    running = [
        start(WRITER, repo.root, files[0], 0, "main"),
        start(WRITER, repo.root, files[1], 100, "main"),
        start(WRITER, repo.root, files[2], 200, "side"),
        start(COLLECTOR, repo.root),
    ]
    reported = set()
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        reported |= set(out.split())
    assert len(reported) == 36
    fresh = Repo.open(repo.root)
    there = {e.id for e in fresh.log(all_branches=True)}
    assert reported == there
    assert not fresh.verify().damage
