"""An installation without torch: all commands work, and Python says what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.state_dict_saver as dcp
from safetensors.torch import load_file, save_file

import ckptvcs
from ckptvcs.cli.app import COMMANDS
from tests.helpers.training import train

Run = Callable[..., str]
ROOT = Path(__file__).parents[2]
STATES = """
import numpy as np
import ckptvcs

repo = ckptvcs.Repo.open("runs")
for read in (repo.checkout, lambda step: repo.tensor("w", at=step)):
    try:
        read(1)
    except ckptvcs.MissingExtraError as error:
        assert str(error).endswith("run pip install 'ckptvcs[torch]'"), error
    else:
        raise AssertionError
repo.commit({"w": np.arange(300.0), "lr": 0.1}, step=2)
state = repo.checkout(2)
assert state["lr"] == 0.1
assert (state["w"] == np.arange(300.0)).all()
"""


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Runs Python in processes where, and below which, nothing can import torch."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    lines = "import sys\nfor name in ('torch', 'safetensors'):\n    sys.modules[name] = None\n"
    (blocked / "sitecustomize.py").write_text(lines)
    environment = os.environ | {"PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}", "CKPT_COMPILED": "0"}

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_command_works(python: Run, tmp_path: Path) -> None:
    states = train(3)
    states[2]["model"]["0.weight"][0, 0] = torch.nan
    for step, state in enumerate(states, 1):
        torch.save(state, tmp_path / f"{step}.pt")
    (tmp_path / "old").mkdir()
    eight_bits = torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn)
    save_file(states[0]["model"] | {"f8": eight_bits}, tmp_path / "old" / "9.safetensors")
    dcp.save({"w": torch.ones(3000)}, checkpoint_id=tmp_path / "new" / "step-10", no_dist=True)
    used = set()

    def ckpt(*arguments: str) -> str:
        used.add(arguments[0])
        return python("-m", "ckptvcs", *arguments)

    ckpt("init")
    for step in (1, 2, 3):
        ckpt("commit", f"{step}.pt", "--step", str(step), "--metric", f"loss={step}")
    ckpt("tag", "first", "1")
    ckpt("pin", "2")
    ckpt("unpin", "2")
    assert len(ckpt("log").splitlines()) == 4
    assert "1.pt" in ckpt("show", "first")
    assert "no changes" in ckpt("status")
    assert "model" in ckpt("diff", "1", "3")
    ckpt("cat", "3:0.weight", "-o", "weight.safetensors")
    ckpt("average", "1..3", "-o", "mean.pt")
    ckpt("export", "3", "--only", "model", "model.safetensors")
    assert "2" in ckpt("bisect", "1", "3", "--metric", "loss", "--above", "1.5")
    assert "3" in ckpt("bisect", "1", "3", "--nan")
    ckpt("import", "old", "--yes")
    assert "-448" in ckpt("cat", "9:f8")
    ckpt("watch", "new", "--once", "--settle", "0")
    ckpt("checkout", "10", "-o", "back")
    ckpt("branch", "other")
    ckpt("checkout", "first", "-o", "back.pt")
    ckpt("config")
    ckpt("stats")
    assert "commit" in ckpt("reflog")
    assert "0.weight" in ckpt("ls", "3")
    assert "0.weight" in ckpt("series", "0.weight", "--csv")
    assert "total" in ckpt("du")
    ckpt("note", "3", "--metric", "late=1")
    ckpt("each", "1..2", "--", "true", "{}")
    ckpt("bundle", "3", "three.ckptz")
    ckpt("clone", "three.ckptz", "clone")
    ckpt("fetch", "three.ckptz")
    ckpt("drop", "3", "--yes")
    ckpt("gc")
    ckpt("undo")
    ckpt("index", "--rebuild")
    ckpt("verify")
    assert used == set(COMMANDS)
    shards = next((tmp_path / "new" / "step-10").glob("*.distcp"))
    assert (tmp_path / "back" / shards.name).read_bytes() == shards.read_bytes()
    assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "1.pt").read_bytes()
    assert load_file(tmp_path / "model.safetensors").keys() == states[2]["model"].keys()


def test_states_of_numpy_work_and_others_name_the_extra(python: Run, tmp_path: Path) -> None:
    with ckptvcs.Repo.init(tmp_path / "runs") as repo:
        repo.commit({"w": torch.ones(300)}, step=1)
    python("-c", STATES)


@pytest.mark.parametrize("trainer", ["accelerate", "lightning", "distributed"])
def test_integrations_name_their_extra(python: Run, trainer: str) -> None:
    extra = "torch" if trainer == "distributed" else trainer
    error = python("-c", f"import ckptvcs.integrations.{trainer}", code=1)
    assert f"run pip install 'ckptvcs[{extra}]'" in error.splitlines()[-1]
