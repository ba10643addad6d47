"""No line says that a commit is exact that can become near, unless it says until when."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptvcs import Repo
from tests.helpers.terminal import execute, make_run, train

_SAYS_EXACT = re.compile(r"(?<![-\w])exact(ly)?(?![-\w])")
_SAYS_HOW_LONG = re.compile(r"for now|until|near|when nothing is kept exact")

# Each group runs in a fresh copy of the run.  Its newest commits are exact for now.
GROUPS = {
    "look": ["log", "log --graph", "log --all --sort step", "status", "stats", "branch", "tag"],
    "show": ["show", "show --roles", "show 40", "show slow", "ls", "ls slow embed"],
    "tensors": ["cat 50:model.embed.weight", "cat 40:state.0.exp_avg_sq", "du --by commit"],
    "diff": ["diff 40 50", "diff 30 50", "diff slow main"],
    "checkout": ["checkout 40", "status", "log", "checkout 50 -o a.pt", "checkout 50 --only model"],
    "export": ["export 50 a.safetensors", "export --all all", "average 40..50 -o mean.pt"],
    "commit": ["commit states/step-100.pt", "show", "commit states/step-110.pt", "log", "verify"],
    "import": ["import states --dry-run", "import states", "import states", "log", "reflog"],
    "watch": ["watch states --once --settle 0", "log"],
    "gc": ["gc --dry-run --keep-last 1", "gc --keep-last 1 --yes", "log", "undo", "reflog"],
    "drop": ["drop 30 --yes", "undo", "note 40 --message late", "log -n 2"],
    "near": ["diff --near 50", "checkout 50 --near -o near.pt", "checkout latest-good -o b.pt"],
    "series": ["series embed.weight", "series 'model*' --csv"],
    "share": [
        "bundle 50 a.ckptz",
        "bundle 40..50 b.ckptz --only model",
        "clone a.ckptz",
        "--repo a log",
        "--repo a show",
        "clone b.ckptz",
        "--repo b log",
        "--repo b show",
        "--repo a fetch b.ckptz",
        "--repo a log",
        "--repo a stats",
    ],
    "each": ["each 40..50 -- true", "config keep-exact 1", "pin 50", "unpin 50"],
    "bisect": ["bisect 10 50 --metric loss --below 0.2"],
}
_SPEAKS = GROUPS.keys() - {"export", "series", "each", "bisect"}


def to_torch(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: to_torch(value) for key, value in state.items()}
    return torch.from_numpy(state) if isinstance(state, np.ndarray) and state.ndim else state


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    (folder / "states").mkdir()
    for state in list(train(rate=0.01, steps=120))[9:]:
        torch.save(to_torch(state), folder / "states" / f"step-{state['step']}.pt")
    return folder


@pytest.mark.parametrize("group", GROUPS)
def test_what_can_fade_is_not_called_exact_alone(
    made_run: Path, tmp_path: Path, group: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    repo = Repo.open(folder)
    assert repo.show(50).exact
    assert not repo.show(50).exact_lasts
    faded = repo.tensors(20, small=True)
    lasting = [tensor.name for tensor in faded if tensor.form == "exact"]
    spoken = []
    for command in GROUPS[group]:
        printed = execute(f"ckpt {command}", folder, columns=120)
        assert "error: " not in printed, printed
        lines = [line for line in printed.splitlines() if _SAYS_EXACT.search(line)]
        spoken += [line for line in lines if "exact for now" in line or "until" in line]
        wrong = [
            line
            for line in lines
            if not _SAYS_HOW_LONG.search(line) and line.split()[0] not in lasting
        ]
        assert not wrong, (command, wrong)
    assert bool(spoken) is (group in _SPEAKS)


def test_a_kept_commit_is_called_exact_alone(made_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    execute("ckpt tag kept 50", folder)
    for command in ("show 50", "show 50 --roles", "ls 50", "log -n 1", "cat 50:embed.weight"):
        printed = execute(f"ckpt {command}", folder, columns=120)
        assert "exact" in printed
        assert "for now" not in printed
