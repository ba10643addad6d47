"""Loading the compiled loops: when it pays, and not without a word."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.command_line import environment


def run(code: str, compiled: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from ckptvcs.codec import kernels\n{code}"]
    variables = environment() | {"CKPT_COMPILED": compiled} | variables
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=True)


@pytest.mark.parametrize(("seconds", "said"), [(0.0, "compiling"), (300.0, "")])
def test_compiling_is_announced(seconds: float, said: str) -> None:
    done = run(
        f"kernels._LONG_SECONDS, kernels._LOOK_SECONDS = {seconds}, 0.01; kernels.prepare(1)", "1"
    )
    assert done.stderr.startswith(said)
    assert bool(done.stderr) == bool(said)


WORK = """
for size in (40_000_000, 40_000_000, 40_000_000):
    kernels.prepare(size)
    print(kernels.active().__name__.rpartition(".")[2])
"""


def test_loaded_once_they_are_worth_it(tmp_path: Path) -> None:
    cache = str(tmp_path)
    first = run(WORK, XDG_CACHE_HOME=cache)
    assert first.stdout.split() == ["reference"] * 3
    assert first.stderr == "compiling the codec kernels in the background (only once)\n"
    wait_for_mark(tmp_path)
    later = run(WORK, XDG_CACHE_HOME=cache)
    assert later.stdout.split() == ["reference", "reference", "compiled"]
    assert not later.stderr
    assert run(WORK, "0", XDG_CACHE_HOME=cache).stdout.split() == ["reference"] * 3


def test_a_process_loads_them_when_they_are_compiled(tmp_path: Path) -> None:
    code = """
import time
while kernels.active() is kernels.REFERENCE:
    kernels.prepare(200_000_000)
    time.sleep(0.05)
print(kernels.active().__name__.rpartition(".")[2])
"""
    done = run(code, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["compiled"]
    assert done.stderr.count("background") == 1


def test_without_a_folder_for_the_mark_they_are_loaded_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(WORK, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout.split() == ["reference", "reference", "compiled"]


def wait_for_mark(cache: Path) -> None:
    until = time.monotonic() + 120
    while not list(cache.glob("ckptvcs/kernels-*")):
        assert time.monotonic() < until
        time.sleep(0.05)
