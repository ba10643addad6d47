"""No text of a repository drives the terminal: all that is printed goes through one door."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ckptvcs.cli import app as command_line
from ckptvcs.errors import CkptError
from ckptvcs.history import commit as commits
from ckptvcs.history.canonical_json import now, seal
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.text import plain, plain_lines, printable
from tests.helpers.command_line import environment

ROOT = Path(__file__).parent.parent.parent
ODD = "\x1b]0;t\x07\x9b31m\r\x08\x7f\u202eevil\u2066\u200b\u2028\ufeff\ud800\U000e0041\u3164"
SEEN = {*map(chr, range(0x20, 0x7F)), "\n", "\N{REPLACEMENT CHARACTER}"}


@given(st.text())
def test_what_is_plain_is_seen_as_itself(text: str) -> None:
    shown = plain(text)
    assert len(shown) == len(text)
    assert shown.isprintable()
    assert plain(shown) == shown
    assert all(
        new in (old, "\N{REPLACEMENT CHARACTER}") for old, new in zip(text, shown, strict=True)
    )
    assert plain_lines(text) == [plain(line.replace("\t", " ")) for line in text.split("\n")]
    assert printable(text).split(" ") == [plain(word) for word in text.split()] or not text.split()


def test_what_people_write_stays() -> None:
    for text in (
        "",
        "loss 2.3 (best)",
        "\u00e9t\u00e9",
        "\u6f22\u5b57",
        "\u05d0\u05d1",
        "\U0001f600",
        "\u2764\ufe0f",
    ):
        assert plain(text) == text


# -- by construction -------------------------------------------------------------------------------

DOOR = ROOT / "ckptvcs" / "cli" / "render.py"
BEFORE = ROOT / "ckptvcs" / "__main__.py"  # says that the modules cannot be loaded
RELAY = ROOT / "ckptvcs" / "ops" / "command.py"  # passes on what a command of the user prints
PRINTING = {"print", "input", "breakpoint"}
OF_MODULES: dict[str, set[str] | None] = {
    "typer": {"echo", "secho", "confirm", "prompt", "progressbar", "launch", "style"},
    "click": None,
    "rich": None,
    "curses": None,
    "warnings": {"warn", "warn_explicit"},
    "traceback": {"print_exc", "print_exception", "print_stack", "print_last", "print_tb"},
}


def leaks(source: str) -> Iterator[int]:
    """Lines that print by another door."""
    for node in ast.walk(ast.parse(source)):
        if _is_leak(node):
            yield getattr(node, "lineno", 0)


def _is_leak(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        tops = {alias.name.partition(".")[0] for alias in node.names}
        return any(OF_MODULES.get(top, ()) is None for top in tops)
    if isinstance(node, ast.ImportFrom):
        names = OF_MODULES.get((node.module or "").partition(".")[0], set())
        return names is None or bool(names & {alias.name for alias in node.names})
    if isinstance(node, ast.Call):
        called, args = ast.unparse(node.func), [ast.unparse(arg) for arg in node.args]
        # Of another logger nothing makes the texts plain.
        other = called.endswith("getLogger") and args != ["'ckptvcs'"]
        return called in PRINTING or called == "os.write" or other
    if isinstance(node, ast.Attribute):
        where = ast.unparse(node.value)
        stream = re.fullmatch(r"(sys\.)?(__)?std(out|err)(__)?(\.buffer)?", where)
        of_stream = stream and node.attr in ("write", "writelines", "buffer")
        return bool(of_stream) or node.attr in (OF_MODULES.get(where) or ())
    return False


def test_nothing_prints_but_the_door() -> None:
    found = {
        (str(path.relative_to(ROOT)), line)
        for path in (ROOT / "ckptvcs").rglob("*.py")
        if path not in (DOOR, BEFORE, RELAY)
        for line in leaks(path.read_text("utf-8"))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "print(x)",
        "import rich",
        "from rich.console import Console",
        "typer.echo(x)",
        "from typer import echo",
        "sys.stdout.write(x)",
        "sys.__stderr__.write(x)",
        "os.write(1, x)",
        "sys.stdout.buffer.write(x)",
        "logging.getLogger(__name__)",
        "logging.getLogger()",
        "import click",
        "warnings.warn(x)",
        "traceback.print_exc()",
        "typer.confirm(x)",
    ],
)
def test_the_test_sees_other_doors(source: str) -> None:
    assert list(leaks(source))


def test_what_is_logged_is_plain(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ckptvcs")
    log.warning("%s: %d", ODD, 3)
    log.error("failed: %s", ODD, exc_info=CkptError(ODD))
    assert len(caplog.records) == 2
    assert caplog.records[0].getMessage().endswith(": 3")
    assert set(caplog.text) <= SEEN | {" "}
    assert "CkptError" in caplog.text


def test_an_error_that_nobody_catches_is_plain(hostile: Path) -> None:
    code = f"import ckptvcs; ckptvcs.Repo.open('.').checkout({f'no{ODD[:-4]}'!a})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=hostile,
        capture_output=True,
        check=False,
        env=environment() | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("ckptvcs.errors.NotFoundError")
    assert set(last) <= SEEN


# -- a repository full of escapes ------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every text of it is odd."""
    root = tmp_path_factory.mktemp("hostile")
    patch = pytest.MonkeyPatch()
    dump = commits.dump_commit

    def forged(commit: commits.Commit) -> bytes:
        return dump(
            dataclasses.replace(
                commit,
                user=ODD,
                host=ODD,
                code=ODD,
                codec=ODD,
                message=ODD,
                kind=ODD,
                metrics={ODD: 1.0, "loss": 2.0},
                path=f"x{ODD[:-3]}",
                files=tuple(
                    dataclasses.replace(file, format=file.format if file.format else ODD)
                    for file in commit.files
                ),
            )
        )

    def sealed(fields: Any) -> Any:
        odd = {"time": ODD, "action": ODD} if "heads" in fields["ref"] else {}
        return seal({**fields, **odd})

    patch.setattr("ckptvcs.ops.describe.dump_commit", forged)
    patch.setattr("ckptvcs.history.refs.seal", sealed)
    rng = np.random.default_rng(1)
    repo = Repo.init(root)
    weight = rng.standard_normal(50_000).astype(np.float32)
    for step in (1, 2, 3):
        state = {"model": {f"w{ODD}": weight + step * 1e-3, ODD: weight}, ODD: {ODD: ODD}}
        repo.commit(state, step=step, message=ODD)
    patch.undo()
    folder = root / f"dir{ODD[:-4]}"
    (folder / ODD[:-4]).mkdir(parents=True)
    (folder / ODD[:-4] / f"{ODD[:-4]}.bin").write_bytes(b"x" * 5000)
    (folder / ".git").mkdir()
    (folder / f"link{ODD[:-4]}").symlink_to(f"/nowhere{ODD[:-4]}")
    repo.commit_path(folder, message=ODD, step=4, raw=True)
    (root / ".ckpt" / "tmp" / ODD[:-4]).touch()
    (root / ".ckpt" / "refs" / "tags" / ODD[:-4]).mkdir(parents=True)
    handle(repo).refs.publish(
        "tags/t", None, commit=repo.resolve(2), time=now(), action=f"tag {ODD}"
    )
    (root / "watched").mkdir()
    (root / "watched" / f"step-5{ODD[:-4]}.pt").write_bytes(b"no checkpoint")
    (root / "watched" / f"other{ODD[:-4]}").mkdir()
    return root


COMMANDS: list[list[str]] = [
    ["log"],
    ["log", "--graph"],
    ["log", "--all"],
    ["show", "latest"],
    ["show", "2"],
    ["show", "2", "--roles"],
    ["status"],
    ["diff", "1", "3"],
    ["diff", "3", "4"],
    ["diff", "1"],
    ["branch"],
    ["tag"],
    ["pin"],
    ["pin", "1"],
    ["unpin", "1"],
    ["reflog"],
    ["gc", "--dry-run"],
    ["gc", "--keep-last", "1", "--dry-run"],
    ["config"],
    ["stats"],
    ["verify"],
    ["index", "--rebuild"],
    ["cat", "2:w"],
    ["cat", f"2:model.w{ODD[:-4]}"],
    ["cat", "2:nothing"],
    ["checkout", "4"],
    ["checkout", "2"],
    ["checkout", "4", "--force", "-o", "out"],
    ["checkout", "1", "--only", "model"],
    ["export", "2", "out.pt"],
    ["export", "--all", "all"],
    ["export", "2", "out.safetensors"],
    ["average", "1..3", "-o", "mean.pt"],
    ["bisect", "1", "3", "--metric", "loss", "--above", "1"],
    ["bisect", "1", "3", "--nan"],
    ["import", "watched"],
    ["import", "watched", "--dry-run"],
    ["watch", "watched", "--once"],
    ["commit", f"watched/step-5{ODD[:-4]}.pt"],
    ["commit", f"dir{ODD[:-4]}"],
    ["branch", "b", "1"],
    ["branch", "--delete", "b"],
    ["tag", "x", "1"],
    ["tag", "--delete", "x"],
    ["show", f"no{ODD[:-4]}"],
    ["branch", f"no{ODD[:-4]}"],
    ["undo"],
    ["gc"],
]


def broken_settings(root: Path) -> None:
    (root / ".ckpt" / "config.toml").write_text(f"{json.dumps(ODD[:12])} = 1\n")


def broken_packs(root: Path) -> None:
    for path in sorted((root / ".ckpt" / "packs").rglob("*.pack"))[:2]:
        path.write_bytes(path.read_bytes()[:-40])


def broken_refs(root: Path) -> None:
    for path in (root / ".ckpt" / "refs").rglob("0*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        None,
        broken_settings,
        *(pytest.param(found, marks=pytest.mark.slow) for found in (broken_packs, broken_refs)),
    ],
    ids=lambda found: found.__name__ if found else "whole",
)
def test_no_command_prints_what_drives_a_terminal(
    damage: Callable[[Path], None] | None,
    hostile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import shutil

    shutil.copytree(hostile, tmp_path / "x", symlinks=True)
    monkeypatch.chdir(tmp_path / "x")
    if damage:
        damage(tmp_path / "x")
    codes, replaced = set(), 0
    repair = [["verify", "--repair"], ["verify", "--repair", "--drop-damaged"]] if damage else []
    for command in [*COMMANDS, *repair]:
        for args in (command, [*command, "--json"]):
            monkeypatch.setattr(sys, "argv", ["ckpt", *args])
            with pytest.raises(SystemExit) as ended:
                sys.exit(command_line.run())
            out = capfd.readouterr()
            codes.add(ended.value.code)
            assert set(out.out + out.err) <= SEEN, (args, ascii(out))
            assert "Traceback" not in out.err, (args, out.err)
            replaced += out.out.count("\N{REPLACEMENT CHARACTER}")
            if args[-1] == "--json":
                for line in out.out.splitlines():
                    json.loads(line)
    assert replaced or damage is broken_refs
    assert codes <= {0, 2, 3, 4, 6, 7, 8}


def test_a_bug_and_wrong_arguments_are_plain_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(ODD)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ckptvcs.repo.Repo.init", fail)
    for args, code in ((["init"], 1), ([f"no{ODD[:-4]}"], 2), (["log", f"--no{ODD[:-4]}"], 2)):
        monkeypatch.setattr(sys, "argv", ["ckpt", *args])
        with pytest.raises(SystemExit) as ended:
            sys.exit(command_line.run())
        out = capfd.readouterr()
        assert ended.value.code == code
        assert set(out.out + out.err) <= SEEN
        assert ("Traceback" in out.err) == (code == 1)


def test_a_terminal_gets_no_sequences_but_our_own(hostile: Path) -> None:
    """A table on a terminal is bold in its heading, and in nothing else."""
    shown = b""
    for args in (["log"], ["show", "2"], ["diff", "1", "2"], ["reflog"], ["show", "2", "--json"]):
        here, there = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "ckptvcs", *args],
            cwd=hostile,
            stdout=there,
            stderr=there,
            env=environment() | {"TERM": "xterm", "PYTHONPATH": str(ROOT)},
        )
        os.close(there)
        parts = []
        while True:
            try:
                part = os.read(here, 1 << 16)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
        process.wait()
        os.close(here)
        shown += b"".join(parts)
    text = shown.decode()
    ours = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r", "", text)
    strange = {c for c in ours if not c.isprintable() and c != "\n"}
    assert not strange, ascii(strange)
    assert "\x1b[1m" in text


def test_values_of_a_tensor_have_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(tmp_path).commit({"model": {"w": np.arange(40.0).reshape(4, 10)}}, step=1)
    out = CliRunner().invoke(command_line.app, ["cat", "1:w"]).stdout.splitlines()
    assert out[3].startswith("[[")
    assert out[-1].endswith("]]")
