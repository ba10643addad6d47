"""`ckpt` as a user starts it: a process of its own in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckptvcs.cli.app import app
from tests.helpers.training import save_run, train


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ckpt = Callable[..., Done]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "CKPT_DIR"}
    return kept | {"PYTHONFAULTHANDLER": "1"}


def check(done: Done, args: tuple[object, ...], code: int | None) -> Done:
    assert "Traceback" not in done.err, done.err
    if code is not None:
        assert done.code == code, (args, done)
    return done


@pytest.fixture
def ckpt_process(tmp_path: Path) -> Ckpt:
    """Run `ckpt ARGS` as a process in `tmp_path`; any exit code but `code` (0) fails the test."""

    def run(*args: object, code: int | None = 0, cwd: Path = tmp_path, **env: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "ckptvcs", *map(str, args)],
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=300,
            env=environment() | env,
            check=False,
        )
        return check(Done(done.returncode, done.stdout, done.stderr), args, code)

    return run


@pytest.fixture
def ckpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ckpt:
    """The same in this process, which is several times faster."""

    def run(*args: object, code: int | None = 0, cwd: Path = tmp_path, **env: str) -> Done:
        monkeypatch.chdir(cwd)
        given = {"CKPT_DIR": env.get("CKPT_DIR")}
        done = CliRunner().invoke(app, [*map(str, args)], env=given)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return check(Done(done.exit_code, done.stdout, done.stderr), args, code)

    return run


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
