"""The command line prints what `snapshots/*.txt` show, on a terminal of 80 columns without color.

python -m tests.cli.test_snapshots --write  put the real output into the snapshots

Those whose name begins with `wide` have 120 columns; those whose name ends with `color` have
colors, shown as `<green>` up to `</>`.
A snapshot holds commands, each after `$ `, and below each its stdout, its stderr and its exit code.
Every snapshot starts with a copy of the same run.  Ids and numbers may differ, except in the help.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptvcs import Repo
from ckptvcs.cli import app, entries, render
from scripts.doc_examples import Example, anonymize, commands, console

TABLES = {"diff", "du", "gc", "import", "log", "ls", "reflog", "show"}
"""The commands whose output depends on the width of the terminal, or has colors."""

SNAPSHOTS = sorted((Path(__file__).parent / "snapshots").glob("*.txt"))
COLUMNS, WIDE = 80, 120
_STYLES = {"1": "bold", "2": "dim", "31": "red", "32": "green", "33": "yellow", "36": "cyan"}
_ESCAPE = re.compile(r"\x1b\[([\d;]*)m")
_SHAPES = {"embed.weight": (64, 32), "head.weight": (16, 32), "head.bias": (16,)}


def train(rate: float, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the state after every tenth step of Adam on a noisy quadratic loss."""
    draw = np.random.default_rng(0)
    weights = {name: draw.standard_normal(shape) for name, shape in _SHAPES.items()}
    means = {name: np.zeros(shape) for name, shape in _SHAPES.items()}
    squares = {name: np.zeros(shape) for name, shape in _SHAPES.items()}
    for step in range(1, steps + 1):
        for name, shape in _SHAPES.items():
            slope = weights[name] - 0.3 + 0.2 * draw.standard_normal(shape)
            means[name] = 0.9 * means[name] + 0.1 * slope
            squares[name] = 0.99 * squares[name] + 0.01 * slope**2
            weights[name] = weights[name] - rate * means[name] / (np.sqrt(squares[name]) + 1e-8)
        if step % 10 == 0:
            moments = {
                number: {
                    "step": np.array(step, np.float32),
                    "exp_avg": means[name].astype(np.float32),
                    "exp_avg_sq": squares[name].astype(np.float32),
                }
                for number, name in enumerate(_SHAPES)
            }
            group = {"lr": rate, "betas": (0.9, 0.99), "eps": 1e-8, "params": list(moments)}
            yield {
                "model": {name: value.astype(np.float32) for name, value in weights.items()},
                "optimizer": {"state": moments, "param_groups": [group]},
                "step": step,
            }


def make_run(folder: Path) -> None:
    """Write a repository with two branches and a tag, an empty one, and files to commit."""
    states = list(train(rate=0.01, steps=70))
    none = {"CKPT_CONFIG": str(folder / "user.toml")}
    # The working directory is no clone whose commit is recorded.
    with contextlib.chdir(folder), mock.patch.dict(os.environ, none):
        with Repo.init() as repo:
            for state in states[:5]:
                repo.commit(state, metrics={"loss": round(5 / state["step"], 3)})
            repo.tag("good", 20)
            repo.branch("slow", 30)
            repo.move_head("slow")
        with Repo.open(".") as repo:
            repo.commit(list(train(rate=0.005, steps=40))[3], step=45, message="half rate")
            repo.move_head("main")
        Repo.init("empty").close()
        Path("runs").mkdir()
        for state in states[5:]:
            save_file(state["model"], f"runs/step-{state['step']}.safetensors")
        Path("runs/broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
        Path("runs/notes.txt").write_text("halve the rate\n", "utf-8")


def damage(folder: Path) -> None:
    """Change a byte in the middle of the newest pack: the exact patch of the newest commit."""
    packs = (path for path in (folder / ".ckpt" / "packs").rglob("*") if path.is_file())
    pack = max(packs, key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 0xFF
    pack.chmod(0o644)
    pack.write_bytes(content)


def styled(output: str) -> str:
    """Replace escape codes by the names of their styles; the end of a style is `</>`."""

    def name(code: re.Match[str]) -> str:
        words = [_STYLES[number] for number in code[1].split(";") if number not in ("", "0")]
        return f"<{' '.join(words) or '/'}>"

    return re.sub("<bold>( +)</>", r"\1", _ESCAPE.sub(name, output))


def execute(command: str, folder: Path, columns: int = COLUMNS, *, color: bool = False) -> str:
    """Run a command in this process; return its stdout, its stderr and its exit code if not 0."""
    unset = ("CKPT_DIR", "FORCE_COLOR", "NO_COLOR", "COLORTERM")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"COLUMNS": str(columns), "LOGNAME": "you", "TZ": "UTC"}
    environment |= {"FORCE_COLOR": "1", "TERM": "xterm"} if color else {"NO_COLOR": "1"}
    environment["CKPT_CONFIG"] = str(folder / "user.toml")
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(sys, "argv", shlex.split(command)),
        mock.patch.object(sys.modules["__main__"], "__package__", None),  # hints name `ckpt`
        mock.patch.object(render, "is_terminal", return_value=True),
        # The width of the column must not depend on how long the tests run.
        mock.patch.object(entries, "when", return_value="6 s ago"),
    ):
        code = app.run() or 0
    ended = f"(exit code {code})\n" if code else ""
    lines = styled(out.getvalue() + err.getvalue()).splitlines()
    return anonymize("".join(f"{line.rstrip()}\n" for line in lines), folder) + ended


def run_snapshot(path: Path, folder: Path) -> list[Example]:
    """Run the commands of a snapshot in a folder with a run."""
    if path.stem.endswith("-damaged"):
        damage(folder)
    text = path.read_text("utf-8")
    exact = path.stem == "help"
    columns = WIDE if path.stem.startswith("wide") else COLUMNS
    run = partial(execute, folder=folder, columns=columns, color=path.stem.endswith("color"))
    return [Example(c, shown, run(c), exact) for c, shown in commands(text)]


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.mark.parametrize("path", SNAPSHOTS, ids=lambda path: path.stem)
def test_commands_print_their_snapshot(path: Path, made_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    examples = run_snapshot(path, folder)
    assert examples
    stale = [f"$ {one.command}\n{one.difference}" for one in examples if not one.agrees]
    assert not stale, "\n".join(stale)


@pytest.mark.parametrize("name", ["color", "wide", "wide-color"])
def test_every_table_has_a_snapshot_in_each_form(name: str) -> None:
    path = SNAPSHOTS[0].with_name(f"{name}.txt")
    shown = {command.split()[1] for command, _ in commands(path.read_text("utf-8"))}
    assert shown >= TABLES


def test_no_table_is_wider_than_the_terminal() -> None:
    for path in SNAPSHOTS:
        columns = WIDE if path.stem.startswith("wide") else COLUMNS
        for command, output in commands(path.read_text("utf-8")):
            if command.split()[1] in TABLES and "--help" not in command:
                lines = re.sub("<(/|[a-z ]+)>", "", output).splitlines()
                wide = [line for line in lines if len(line) > columns and is_row(line)]
                assert not wide, (path.name, command)


def is_row(line: str) -> bool:
    """Return whether a line is neither an error nor a note, which are not cut."""
    return not line.startswith(("error: ", "hint: ", "note: ", "/", "pinned: "))


def test_every_command_has_a_snapshot() -> None:
    shown = {
        word
        for path in SNAPSHOTS
        if path.stem != "help"
        for command, _ in commands(path.read_text("utf-8"))
        for word in command.split()
    }
    assert set(app.COMMANDS) <= shown


def write() -> None:
    """Put the real output into every snapshot that is stale."""
    os.environ.setdefault("CKPT_COMPILED", "0")
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary) / "start"
        start.mkdir()
        make_run(start)
        for path in SNAPSHOTS:
            folder = Path(temporary) / path.stem
            shutil.copytree(start, folder)
            examples = run_snapshot(path, folder)
            if not all(example.agrees for example in examples):
                path.write_text(console(examples), "utf-8")
                print(f"wrote {path.name}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.cli.test_snapshots --write")
    write()
