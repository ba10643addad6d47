"""Build the source distribution and the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


FOLDERS = (".ci", "ckptvcs", "docs", "scripts", "tests")


def build(kind: str, source: Path, output: Path) -> Path:
    """Build an `sdist` or a `wheel` of a folder, without a network."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(output)],
        cwd=source,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (path for path in output.iterdir() if path.is_file())
    return made
