"""Loading the compiled loops: nobody waits without a word."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import environment


@pytest.mark.parametrize(("seconds", "said"), [(0.0, "compiling"), (300.0, "")])
def test_compiling_is_announced(seconds: float, said: str) -> None:
    code = (
        "from ckptvcs.codec import loops\n"
        f"loops._LONG_SECONDS = {seconds}\n"
        "loops.prepare(1 << 40)\n"
        "assert loops.active().__name__.endswith('compiled')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stderr.startswith(said)
    assert bool(done.stderr) == bool(said)
