"""The rules of the house, held by a machine."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from radon.complexity import cc_visit
from radon.visitors import Function

import ckptvcs
from ckptvcs import errors
from ckptvcs.cli.app import COMMANDS

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "ckptvcs").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Names of others that begin with an underscore: of Python, of torch.
FOREIGN = {"_exit", "_C", "_metadata", "_load_from_state_dict", "_run_exitfuncs"}
FOREIGN |= {f"_optimizer_load_state_dict_{moment}_hooks" for moment in ("pre", "post")}
PATCHES = ("patch.setattr", "monkeypatch.setattr", "patch.object", "mock.patch")
PRIVATE_ALLOWED = {
    "corpus/layouts.py",  # torch has no public function for a state dict without a process group
    "test_house.py",  # compares the table of lazy imports with the list for type checkers
}


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


def test_functions_are_short_and_simple() -> None:
    """Check that each has at most 60 lines and a cyclomatic complexity of at most 15."""
    beyond = set()
    for path in MODULES:
        for block in cc_visit(path.read_text("utf-8")):
            for part in (block, *getattr(block, "methods", ())):
                is_long = isinstance(part, Function) and part.endline - part.lineno >= 60
                if is_long or (isinstance(part, Function) and part.complexity > 15):
                    module = path.relative_to(ROOT / "ckptvcs").with_suffix("")
                    beyond.add(f"{module}.{part.name}")
    assert not beyond


def test_no_grab_bags() -> None:
    forbidden = {"utils", "util", "helpers", "common", "misc", "types", "base"}
    assert not [path for path in MODULES if path.stem in forbidden]


def imports(path: Path) -> set[str]:
    """The modules that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def private_attributes() -> set[str]:
    """Return the test files that use a private name: as an attribute, by a patch or an import."""
    files = set()
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = ""
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                name = node.attr
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(PATCHES):
                literals = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
                name = str(literals[-1]).rpartition(".")[2] if literals else ""
            elif isinstance(node, ast.ImportFrom):
                name = next((a.name for a in node.names if a.name.startswith("_")), "")
            if name.startswith("_") and not name.startswith("__") and name not in FOREIGN:
                files.add(str(path.relative_to(ROOT / "tests")))
    return files


def test_the_hall_is_small() -> None:
    files = [path.name for path in (ROOT / "ckptvcs").iterdir() if path.is_file()]
    assert len(files) <= 8, files


def test_the_command_line_calls_the_public_api_only() -> None:
    allowed = {"ckptvcs", "ckptvcs.errors", "ckptvcs.parallel", "ckptvcs.repo", "ckptvcs.text"}
    for path in (ROOT / "ckptvcs" / "cli").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("ckptvcs")}
        assert not {n for n in ours - allowed if not n.startswith("ckptvcs.cli")}, path


def test_blake3_is_imported_in_one_place() -> None:
    assert [path.name for path in MODULES if "blake3" in imports(path)] == ["hashing.py"]


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
    assert ckptvcs.__version__ == importlib.metadata.version("ckptvcs")
    with pytest.raises(AttributeError):
        _ = ckptvcs.nothing


def test_public_names_have_one_home() -> None:
    """Names are listed for type checkers, for loading and for `import *`: all three agree."""
    tree = ast.parse((ROOT / "ckptvcs" / "__init__.py").read_text("utf-8"))
    checked = {
        alias.name: (node.module or "").removeprefix("ckptvcs.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == ckptvcs._HOMES
    assert set(ckptvcs.__all__) >= checked.keys()


def test_every_command_is_a_method() -> None:
    names = {"import": "import_folder", "cat": "tensor_view", "index": "rebuild_index"}
    names |= {"config": "settings", "unpin": "pin", "ls": "tensors", "du": "disk_usage"}
    for command in COMMANDS:
        method = getattr(ckptvcs.Repo, names.get(command, command))
        assert inspect.getdoc(method)


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
        "MissingExtraError": 9,
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


def test_the_fast_profile_tests_every_package() -> None:
    lines = (ROOT / "tests" / "fast.txt").read_text("utf-8").split()
    files = [line for line in lines if not line.startswith("--deselect=")]
    assert all((ROOT / file).exists() for file in files)
    packages = {path.parent.name for path in (ROOT / "ckptvcs").glob("*/__init__.py")}
    assert {Path(file).parts[1] for file in files} >= packages
    assert "@tests/fast.txt" in (ROOT / "scripts" / "test").read_text("utf-8")


def test_tests_mirror_the_packages() -> None:
    packages = {path.parent.name for path in (ROOT / "ckptvcs").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert packages <= folders
    assert folders - packages <= {"packaging", "system"}


def test_no_test_module_is_imported() -> None:
    for path in TESTS:
        modules = {name for name in imports(path) if name.startswith("tests.")}
        assert not [name for name in modules if re.search(r"\.(test_|conftest)", name)], path


def test_tests_read_no_private_attributes() -> None:
    assert private_attributes() == PRIVATE_ALLOWED
