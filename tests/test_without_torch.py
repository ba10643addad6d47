"""An installation without torch: all commands work, and Python says what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptvcs
from ckptvcs.cli.app import COMMANDS
from tests.training import train

Run = Callable[..., str]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Runs Python in processes where, and below which, nothing can import torch."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    lines = "import sys\nfor name in ('torch', 'safetensors'):\n    sys.modules[name] = None\n"
    (blocked / "sitecustomize.py").write_text(lines)
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}", "CKPT_COMPILED": "0"}

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_every_command_works(python: Run, tmp_path: Path) -> None:
    states = train(5)
    for step, state in enumerate(states, 1):
        torch.save(state, tmp_path / f"{step}.pt")
    weights = states[0]["model"] | {"f8": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(weights, tmp_path / "m.safetensors")
    torch.distributed.checkpoint.save(
        {"w": torch.ones(300)}, checkpoint_id=tmp_path / "shards", no_dist=True
    )
    used = set()

    def ckpt(*arguments: str, code: int = 0) -> str:
        used.add(arguments[0])
        return python("-m", "ckptvcs", *arguments, code=code)

    ckpt("init")
    for step in (1, 2, 3):
        ckpt("commit", f"{step}.pt", "--step", str(step), "--metric", f"loss={step}")
    ckpt("tag", "first", "1")
    ckpt("pin", "2")
    ckpt("unpin", "2")
    assert "100" not in ckpt("log")
    ckpt("show", "3")
    ckpt("status")
    ckpt("diff", "1", "3")
    ckpt("cat", "3:0.weight", "-o", "weight.safetensors")
    ckpt("average", "1..3", "-o", "mean.pt")
    ckpt("export", "3", "--part", "model", "-o", "model.safetensors")
    ckpt("bisect", "1", "3", "--metric", "loss", "--above", "1")
    ckpt("checkout", "first", "-o", "back.pt")
    ckpt("checkout", "1")
    ckpt("branch", "other")
    ckpt("import", "4.pt", "--yes")
    ckpt("watch", "shards", "--once")
    ckpt("config")
    ckpt("stats")
    ckpt("reflog")
    ckpt("gc")
    ckpt("undo")
    ckpt("index", "--check")
    ckpt("verify")
    assert set(COMMANDS) == used
    assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "1.pt").read_bytes()
    assert load_file(tmp_path / "model.safetensors").keys() == states[2]["model"].keys()
