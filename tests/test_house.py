"""The rules of the house, held by a machine."""

from __future__ import annotations

import inspect
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ckptvcs
from ckptvcs import errors

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "ckptvcs").rglob("*.py"))


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(done.stdout.split())


def test_files_are_small() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert max(lines.values()) <= 500, max(lines, key=lambda path: lines[path])
    assert statistics.median(lines.values()) <= 250


def test_no_grab_bags() -> None:
    forbidden = {"utils", "util", "helpers", "common", "misc", "types", "base"}
    assert not [path for path in MODULES if path.stem in forbidden]


def test_every_layer_is_drawn() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    layers = [re.split(r" [|:] ", layer) for layer in contract["layers"]]
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    drawn = set(re.findall(r"[a-z]+", page.split("```")[1]))
    assert drawn >= {name for layer in layers for name in layer}
    assert not re.search("^(<<<<<<<|>>>>>>>)", page, re.MULTILINE)


def test_the_command_line_starts_light() -> None:
    loaded = loaded_by("import ckptvcs.cli.app")
    assert not loaded & {"torch", "numba", "numpy", "safetensors"}
    assert "rich.table" not in loaded


@pytest.mark.parametrize("command", ["log", "show", "status"])
def test_looking_loads_no_torch(command: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello" * 100)
    repo = ckptvcs.Repo.init(tmp_path)
    repo.commit_path(tmp_path / "a.txt", message="x")
    code = (
        "from ckptvcs.cli.app import app\n"
        f"import contextlib, os; os.chdir({str(tmp_path)!r})\n"
        "out = sys.stdout; sys.stdout = sys.stderr\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    app([{command!r}])\n"
        "sys.stdout = out"
    )
    loaded = loaded_by(code)
    assert not loaded & {"torch", "numba", "safetensors"}
    assert "ckptvcs.history.catalog" in loaded


def test_files_are_committed_and_checked_out_without_torch(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom ckptvcs.repo import Repo\n"
        f"root = Path({str(tmp_path)!r})\n"
        "(root / 'x.dat').write_bytes(b'data' * 1000)\nrepo = Repo.init(root)\n"
        "made = repo.commit_path(root / 'x.dat', message='')\n"
        "repo.checkout_files(made.id, root / 'y.dat')\nrepo.verify()\nrepo.gc()"
    )
    assert not loaded_by(code) & {"torch", "numba", "safetensors", "typer", "rich"}


def test_public_names_are_there() -> None:
    assert sorted(ckptvcs.__all__) == ckptvcs.__all__
    for name in ckptvcs.__all__:
        assert hasattr(ckptvcs, name)


def test_the_error_tree() -> None:
    members = inspect.getmembers(errors, inspect.isclass)
    found = [c for _, c in members if issubclass(c, errors.CkptError)]
    assert {c.__name__: c.exit_code for c in found} == {
        "CkptError": 1,
        "InvalidInputError": 2,
        "NotFoundError": 3,
        "ConflictError": 4,
        "BusyError": 5,
        "CorruptionError": 6,
        "TruncatedError": 6,
        "MissingObjectError": 6,
        "UnsupportedVersionError": 7,
        "StorageError": 8,
    }
    assert len({c.kind for c in found}) == len(found)
    assert issubclass(errors.InvalidInputError, ValueError)
    assert issubclass(errors.NotFoundError, KeyError)
    assert str(errors.NotFoundError("no quotes")) == "no quotes"
    codes = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert all(f"| {c.exit_code} |" in codes for c in found)


def test_links_in_the_docs_lead_somewhere() -> None:
    import re

    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_ci_runs_the_command_of_the_readme() -> None:
    assert "scripts/test\n" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert "\nscripts/demo\nscripts/test\n" in (ROOT / "README.md").read_text("utf-8")
