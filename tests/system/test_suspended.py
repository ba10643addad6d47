"""Ctrl-Z, a scheduler, or a container that is frozen: who is suspended makes nobody wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptvcs.repo import Repo
from tests.helpers.profiles import short

PATIENCE = 60  # seconds, after which a process is one that waits for ever

HANDLE = "from ckptvcs.ops.history_reader import handle"

SUSPENDED = {
    "making an edition": """
from ckptvcs.store.index import index
def stop(*args): os.kill(os.getpid(), signal.SIGSTOP)
index.forget_expected = stop
handle(repo).catalog.store.index.editions.make_edition()
""",
    "reading": """
kept = handle(repo).catalog.store.index.editions.follower.read().base.env.begin()
os.kill(os.getpid(), signal.SIGSTOP)
""",
    "telling of a commit": """
from ckptvcs.store.index import following
def stop(*args): os.kill(os.getpid(), signal.SIGSTOP)
following.append_record = stop
repo.commit({"w": numpy.full(1000, 7, "f4")}, step=7)
""",
}


@contextmanager
def suspended(folder: Path, work: str) -> Iterator[None]:
    opened = f"repo = ckptvcs.Repo.open({str(folder)!r})"
    code = f"import os, signal, numpy, ckptvcs\n{HANDLE}\n{opened}\n{work}"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        found = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert found is not None
        assert found.si_code == os.CLD_STOPPED
        yield
    finally:
        child.kill()
        child.wait()


def ckpt(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ckptvcs", "--repo", folder, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("work", short(SUSPENDED, ["making an edition"]))
def test_no_command_waits_for_a_process_that_is_suspended(work: str, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    for step in (1, 2):
        torch.save({"w": torch.full((1000,), float(step))}, tmp_path / f"step-{step}.pt")
        repo.commit_path(tmp_path / f"step-{step}.pt", message=f"number {step}")
    with suspended(tmp_path, SUSPENDED[work]):
        for _ in range(2):
            assert "number 2" in ckpt(tmp_path, "log")
            assert "number 1" in ckpt(tmp_path, "show", "1")
            ckpt(tmp_path, "status")
            ckpt(tmp_path, "checkout", "1", "-o", "back.pt", "--force")
            ckpt(tmp_path, "index", "--rebuild")
        assert torch.equal(torch.load(tmp_path / "back.pt")["w"], torch.ones(1000))
        torch.save({"w": torch.full((1000,), 3.0)}, tmp_path / "step-3.pt")
        ckpt(tmp_path, "commit", "step-3.pt", "-m", "number 3")
        repo.commit({"w": np.full(1000, 4, "f4")}, step=4)
        assert "number 3" in ckpt(tmp_path, "log")
    assert [entry.step for entry in repo.log()] == [4, 3, 2, 1]
    assert [entry.step for entry in Repo.open(tmp_path).log()] == [4, 3, 2, 1]
    assert not repo.verify().damage
