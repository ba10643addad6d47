"""The command line prints what `snapshots/*.txt` show, on a terminal of 80 columns without color.

python -m tests.cli.test_snapshots --write  put the real output into the snapshots

Those whose name begins with `wide` have 120 columns; those whose name ends with `color` have
colors, shown as `<green>` up to `</>`.  The four of plain, color, wide and wide-color show the same
commands.
A snapshot holds commands, each after `$ `, and below each its stdout, its stderr and its exit code.
Every snapshot starts with a copy of the same run.  Ids and numbers may differ, except in the help.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from ckptvcs.cli import app
from scripts.doc_examples import Example, commands, console
from tests.helpers.terminal import COLUMNS, execute, make_run

TABLES = {"diff", "du", "gc", "import", "log", "ls", "reflog", "show"}
"""The commands that print tables as wide as the terminal."""

WIDE = 120
SNAPSHOTS = sorted((Path(__file__).parent / "snapshots").glob("*.txt"))


def damage(folder: Path) -> None:
    """Change a byte in the middle of the newest pack: the exact patch of the newest commit."""
    packs = (path for path in (folder / ".ckpt" / "packs").rglob("*") if path.is_file())
    pack = max(packs, key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 0xFF
    pack.chmod(0o644)
    pack.write_bytes(content)


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


@pytest.mark.parametrize("name", ["plain", "color", "wide", "wide-color"])
def test_every_command_has_a_snapshot_in_each_form(name: str) -> None:
    shown = {word for command, _ in in_form(name) for word in command.split()}
    assert set(app.COMMANDS) <= shown


@pytest.mark.parametrize(("plain", "color"), [("plain", "color"), ("wide", "wide-color")])
def test_colors_change_no_character(plain: str, color: str) -> None:
    pairs = list(zip(in_form(plain), in_form(color), strict=True))
    assert any("<cyan>" in colored for _, (_, colored) in pairs)
    for (command, output), (same, colored) in pairs:
        assert command == same
        assert Example(command, re.sub("<(/|[a-z ]+)>", "", colored), output).agrees


def in_form(name: str) -> list[tuple[str, str]]:
    return list(commands(SNAPSHOTS[0].with_name(f"{name}.txt").read_text("utf-8")))


def test_no_table_is_wider_than_the_terminal() -> None:
    for path in SNAPSHOTS:
        columns = WIDE if path.stem.startswith("wide") else COLUMNS
        for command, output in commands(path.read_text("utf-8")):
            if command.split()[1] in TABLES and "--json" not in command and path.stem != "help":
                lines = re.sub("<(/|[a-z ]+)>", "", output).splitlines()
                wide = [line for line in lines if len(line) > columns and is_row(line)]
                assert not wide, (path.name, command)


def is_row(line: str) -> bool:
    """Return whether a line is neither an error nor a note, which are not cut."""
    return not line.startswith(("error: ", "hint: ", "note: ", "/", "pinned: "))


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
