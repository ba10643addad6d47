"""Shells complete revisions, tensors, settings and codecs, and get nothing harmful."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from ckptvcs import Repo
from ckptvcs.cli.app import COMMANDS, app
from ckptvcs.cli.completion import VALUES, attach, join
from ckptvcs.cli.examples import EXAMPLES
from tests.helpers.command_line import Ckpt, environment
from tests.helpers.profiles import short

START = "import sys; sys.argv = ['ckpt']; from ckptvcs.__main__ import main; main()"
LOADED = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {START}"


def complete(
    folder: Path, *words: str, shell: str = "bash", code: str = START, **env: str
) -> list[str]:
    """Return what a shell gets for words whose last one is incomplete."""
    env |= {"_CKPT_COMPLETE": f"complete_{shell}"}
    env |= {"COMP_WORDS": "\n".join(("ckpt", *words)), "COMP_CWORD": str(len(words))}
    env |= {"_TYPER_COMPLETE_ARGS": " ".join(("ckpt", *words))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment() | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_every_command_has_examples_that_parse() -> None:
    assert EXAMPLES.keys() == {*COMMANDS, "help", "version"}
    root: Any = typer.main.get_command(app)
    context = root.make_context("ckpt", [], resilient_parsing=True)
    for name, lines in EXAMPLES.items():
        for line in lines:
            program, *words = shlex.split(line.partition(" > ")[0])
            words = words[{"-C": 2, "-q": 1}.get(words[0], 0) :]
            assert (program, words[0]) == ("ckpt", name)
            assert root.get_command(context, name).make_context(name, words[1:], parent=context)
            assert len(line) < 78


def test_the_help_shows_the_examples(ckpt: Ckpt) -> None:
    shown = ckpt("cat", "--help").out
    assert "\nExamples:\n" in shown
    assert all(f"\n  {line}\n" in shown for line in EXAMPLES["cat"])


_VALUES: list[tuple[list[str], list[str]]] = [
    (["show", "mai"], ["main"]),
    (
        ["show", ""],
        ["main", "v1", "HEAD", "latest", "latest-good", "best:", "5", "4", "3", "2", "1"],
    ),
    (["average", "1..l"], ["1..latest", "1..latest-good"]),
    (["drop", "1", "v"], ["v1"]),
    (["show", "best", ":", "lo"], ["loss:min", "loss:max"]),
    (["tag", "-d", ""], ["v1"]),
    (["commit", "model.pt", "--branch", ""], ["main"]),
    (["commit", "model.pt", "--branch", "=", "m"], ["main"]),
    (["commit", "--codec", "e"], ["excp", "excp-max"]),
    (["note", "1", "--metric", "lo"], ["loss="]),
    (["diff", "--only", "opt"], ["optimizer"]),
    (["log", "--sort", ""], ["step", "time", "size", "loss"]),
    (["config", "keep-e"], ["keep-exact"]),
    (["config", "best-fidelity", ""], ["exact", "weights", "near"]),
    (["help", "ave"], ["average"]),
    (["cat", "v1", ":", "model.0.w"], ["model.0.weight"]),
    (["ls", "HEAD", "--only", "m"], ["model"]),
    (["show", "nothing"], []),
]


@pytest.mark.parametrize(("words", "wanted"), short(_VALUES, _VALUES[::4]))
def test_values_are_completed(words: list[str], wanted: list[str], history: Path) -> None:
    Repo.open(history).tag("v1", 3)
    assert complete(history, *words) == wanted


def test_completion_works_from_elsewhere_and_in_other_shells(history: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for words in (["-C", "..", "show", "mai"], ["--repo", "..", "show", "mai"]):
        assert complete(inner, *words) == ["main"]
    assert complete(inner, "show", "mai", CKPT_DIR=str(history)) == ["main"]
    assert "main" in " ".join(complete(history, "show", "mai", shell="zsh"))


def test_completion_is_silent_about_every_error(tmp_path: Path) -> None:
    assert complete(tmp_path, "show", "") == []
    assert complete(tmp_path, "cat", "HEAD", ":", "x") == []
    (tmp_path / ".ckpt").mkdir()
    (tmp_path / ".ckpt" / "format").write_text("junk")
    assert complete(tmp_path, "show", "") == []
    assert complete(tmp_path, "config", "") == []


@pytest.mark.parametrize("words", [["show", ""], ["cat", "HEAD", ":", ""], ["config", ""]])
def test_completion_loads_no_numpy(words: list[str], history: Path) -> None:
    loaded = set(complete(history, *words, code=LOADED))
    assert "ckptvcs.history.catalog" in loaded
    assert not loaded & {"numpy", "torch", "numba"}


class Parameter:
    """An argument as typer declares it."""

    param_type_name = "argument"
    metavar = "REV:TENSOR"
    shell_complete: Any = None


def test_names_that_a_shell_would_run_are_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    hostile = ["$(touch x)", "`id`", 'a"; touch x; "', "a'b", "a b", "a\nb", "*", "\\"]
    with Repo.init(tmp_path) as repo:
        repo.commit({name: np.ones(4000, "f4") for name in ("good.weight", *hostile)}, step=1)
    monkeypatch.chdir(tmp_path)
    root: Any = typer.main.get_command(app)
    context = root.make_context("ckpt", [], resilient_parsing=True)
    parameter = Parameter()
    attach([parameter])
    assert [item.value for item in parameter.shell_complete(context, "1:")] == ["1:good.weight"]


def test_settings_have_the_words_that_are_offered(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    for key, words in VALUES.items():
        for word in words:
            assert ckpt("config", key, word).out == f"{word}\n"


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["cat", "HEAD", ":", "w"], (["cat", "HEAD:w"], True)),
        (["cat", "HEAD", ":"], (["cat", "HEAD:"], True)),
        (["show", "--repo", "=", "x", "H"], (["show", "--repo=x", "H"], False)),
        (["show", ""], (["show", ""], False)),
    ],
)
def test_words_that_bash_has_split_are_joined(
    words: list[str], joined: tuple[list[str], bool]
) -> None:
    assert join(words) == joined
