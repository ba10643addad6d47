"""Run `ckpt` as on a terminal, in a folder with a small run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

from ckptvcs import Repo
from ckptvcs.cli import app, entries, render
from scripts.doc_examples import anonymize

COLUMNS = 80
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
