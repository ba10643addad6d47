"""Loading the compiled loops: when it pays, and not without a word."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.command_line import environment


def run(code: str, compiled: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from ckptvcs.codec import kernels\n{code}"]
    variables = environment() | {"CKPT_COMPILED": compiled}
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=True)


@pytest.mark.parametrize(("seconds", "said"), [(0.0, "compiling"), (300.0, "")])
def test_compiling_is_announced(seconds: float, said: str) -> None:
    done = run(
        f"kernels._LONG_SECONDS, kernels._LOOK_SECONDS = {seconds}, 0.01; kernels.prepare(1)", "1"
    )
    assert done.stderr.startswith(said)
    assert bool(done.stderr) == bool(said)


def test_loaded_once_they_are_worth_it() -> None:
    code = """
for size in (40_000_000, 40_000_000, 40_000_000):
    kernels.prepare(size)
    print(kernels.active().__name__.rpartition(".")[2])
"""
    assert run(code).stdout.split() == ["reference", "reference", "compiled"]
    assert run(code, "0").stdout.split() == ["reference"] * 3
