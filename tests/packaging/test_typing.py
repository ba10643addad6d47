"""A user's program gets full types from the installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

PROGRAM = """
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, assert_type

import ckptvcs

with ckptvcs.Repo.init("runs", codec="near") as repo:
    assert_type(repo, ckptvcs.Repo)
    assert_type(repo.commit({"lr": 0.1}, step=1), ckptvcs.LogEntry)
    assert_type(repo.commit_async({"lr": 0.1}, step=2), Future[ckptvcs.LogEntry])
    assert_type(repo.commit_path("m.pt", message="m"), ckptvcs.CommitResult)
    assert_type(repo.log(), list[ckptvcs.LogEntry])
    assert_type(repo.log()[0].step, int | None)
    assert_type(repo.log()[0].id, ckptvcs.ObjectId)
    assert_type(repo.log()[0].commit, ckptvcs.Commit)
    assert_type(repo.checkout(1), Any)
    assert_type(repo.checkout_files(1, "out.pt").paths, tuple[Path, ...])
    assert_type(repo.trajectory("model.*"), Iterator[tuple[ckptvcs.LogEntry, Any]])
    assert_type(repo.diff(1, 2), ckptvcs.Comparison)
    assert_type(repo.diff(1, 2).tensors, tuple[ckptvcs.TensorDifference, ...])
    assert_type(repo.gc(), ckptvcs.GcPlan)
    assert_type(repo.gc().freed_bytes, int)
    assert_type(repo.verify(), ckptvcs.VerifyReport)
    assert_type(ckptvcs.__version__, str)
    try:
        repo.show("best:loss:min")
    except ckptvcs.CkptError as error:
        assert_type(error.hint, str | None)
"""
WRONG = """
import ckptvcs

ckptvcs.Repo.open("runs").commit(state=1, stpe=2)
ckptvcs.Repo.open("runs").log()[0].nothing
"""


def test_a_program_gets_full_types(wheel: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if "PYTHONPATH" not in key}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], cwd=tmp_path, check=True)
    packages = tmp_path / "env" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def mypy(program: str) -> list[str]:
        (tmp_path / "program.py").write_text(program)
        command = ["-m", "mypy", "--strict", "--python-executable", "env/bin/python", "program.py"]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        return [line for line in done.stdout.splitlines() if ": error: " in line]

    assert mypy(PROGRAM) == []
    keyword, attribute = mypy(WRONG)
    assert 'Unexpected keyword argument "stpe"' in keyword
    assert '"LogEntry" has no attribute "nothing"' in attribute
