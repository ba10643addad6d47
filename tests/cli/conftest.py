"""`ckpt` as a user starts it: a process of its own in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command_line import Ckpt
from tests.helpers.training import save_run, train


@pytest.fixture(scope="session")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five checkpoints of a small real run, at steps 1 to 5."""
    return save_run(tmp_path_factory.mktemp("run"), train(5))


@pytest.fixture
def history(ckpt: Ckpt, tmp_path: Path, run_files: list[Path]) -> Path:
    """A repository in `tmp_path` with the five checkpoints as commits of model.pt."""
    ckpt("init", "--codec", "lossless")
    for number, path in enumerate(run_files, start=1):
        (tmp_path / "model.pt").write_bytes(path.read_bytes())
        ckpt("commit", "model.pt", "-m", f"step {number}", "--metric", f"loss={6 - number}")
    return tmp_path
