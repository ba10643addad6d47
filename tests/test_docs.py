"""The documentation is complete, and its examples print what the pages show."""

from __future__ import annotations

import fcntl
import inspect
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import ckptvcs
from ckptvcs import errors
from ckptvcs.cli.app import COMMANDS
from scripts import doc_examples
from scripts.cli_reference import pages, reference
from tests.helpers.profiles import short

DOCS = Path(__file__).parents[1] / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def check(path: Path, folder: Path) -> None:
    examples, _ = doc_examples.run_page(path, folder)
    assert examples
    for example in examples:
        shown, printed = map(doc_examples.normalize, (example.shown, example.printed))
        assert printed == shown, f"$ {example.command}"


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the tutorial ends with; its output is checked on the way."""
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent  # of all workers: one of them runs the tutorial
    shared = top / "tutorial"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared / "run"
        if not (shared / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            check(doc_examples.TUTORIAL, folder)
            (shared / "done").touch()
    return folder


def test_the_tutorial_prints_what_it_shows(tutorial: Path) -> None:
    assert [entry.step for entry in ckptvcs.Repo.open(tutorial).log(2)] == [700, 600]


def test_the_python_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```$", readme)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    exec(compile(block, "README.md", "exec"), {"model": model, "optimizer": optimizer})
    assert [entry.step for entry in ckptvcs.Repo.open("runs/exp1").log()] == [2000]


def test_the_readme_fits_on_a_screen_and_works_elsewhere() -> None:
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 75
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links
    for link in links:
        assert link.startswith("https://"), link
        path = re.sub(r"^https://github.com/ckptvcs/ckptvcs/(blob|tree)/main/", "", link)
        assert path == link or (DOCS.parent / path).exists(), link


_OFTEN = {"free-a-full-disk", "retention", "tasks"}


@pytest.mark.parametrize(
    "guide",
    short(doc_examples.guides(), [path for path in doc_examples.guides() if path.stem in _OFTEN]),
    ids=lambda path: path.stem,
)
def test_a_guide_prints_what_it_shows(guide: Path, tutorial: Path, tmp_path: Path) -> None:
    shutil.copytree(tutorial, tmp_path, dirs_exist_ok=True)
    check(guide, tmp_path)


def test_numbers_and_ids_do_not_matter_in_examples() -> None:
    shown = "step  id        size\n 900  0d0fca4d  13.9 kB\n"
    printed = "step  id        size\n  50  bc2c9182   9.1 kB\n"
    assert doc_examples.normalize(shown) == doc_examples.normalize(printed)
    assert doc_examples.normalize("a 1 kB") != doc_examples.normalize("a 1 MB")


def test_the_api_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: ckptvcs\.(\S+)$", page("reference/api.md"), re.MULTILINE)
    names = [name for name in listed if "." not in name]
    assert sorted(names) == ckptvcs.__all__
    methods = {name for name, _ in inspect.getmembers(ckptvcs.Repo) if not name.startswith("_")}
    shown = [name.removeprefix("Repo.") for name in listed if name.startswith("Repo.")]
    assert len(shown) == len(set(shown))
    assert {*shown, "folder", "root"} == methods


def test_a_repo_shows_no_attribute_that_the_reference_lacks(tmp_path: Path) -> None:
    with ckptvcs.Repo.init(tmp_path) as repo:
        repo.commit_async({"w": torch.ones(300)}, step=1).result()
        assert not [name for name in vars(repo) if not name.startswith("_")]


def test_the_troubleshooting_page_has_every_exit_code_and_error() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (.*?) \|", page("troubleshooting.md"), re.MULTILINE)
    codes = {code for numbers, _ in rows for code in numbers.split(", ")}
    assert codes >= {"0", "130", "143"}
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.CkptError):
            assert any(n == str(error.exit_code) and f"`{name}`" in row for n, row in rows), name


def test_the_command_reference_and_the_manual_page_are_what_the_command_line_says() -> None:
    assert {path: path.read_text("utf-8") for path in pages()} == pages()
    assert reference().count("\n### ") == len(COMMANDS)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(
        re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    )
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


@pytest.mark.parametrize("name", ["glossary.md", "internals/glossary.md"])
def test_glossaries_are_sorted(name: str) -> None:
    words = re.findall(r"^\| (?!-|word)(.*?) \|", page(name), re.MULTILINE)
    assert words == sorted(words, key=lambda word: word.lower().replace("`", ""))
    assert len(words) > 20
