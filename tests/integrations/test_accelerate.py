"""accelerate: directories of `save_state`, committed, killed, checked out, gone on from."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptvcs import Repo
from ckptvcs.ops.history_reader import handle
from tests.helpers.command_line import environment
from tests.helpers.docs_examples import blocks, run

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="no accelerate"),
    pytest.mark.filterwarnings("ignore"),  # those of accelerate
]


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from tests.helpers.trainers.accelerated import contents, train

    whole = train(tmp_path / "whole", tmp_path / "other", 3)
    first = train(tmp_path / "out", tmp_path / "repo", 2)
    repo = Repo.open(tmp_path / "repo")
    log = repo.log()
    assert [entry.step for entry in log] == [8, 4]
    assert log[0].exact
    assert log[0].metrics.keys() == {"loss"}
    shutil.rmtree(tmp_path / "out")
    target = tmp_path / "out" / "step-8"
    repo.checkout_files(log[0].id, target)
    assert contents(target) == first
    assert train(tmp_path / "out", tmp_path / "repo", 3, target) == whole
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [12, 8, 4]
    assert not repo.verify().damage


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [sys.executable, *launch, "tests.helpers.trainers.accelerated"]
    command += [str(tmp_path / "out"), str(tmp_path / "repo"), "none"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    repo = Repo.open(tmp_path / "repo")
    log = repo.log()
    assert [entry.step for entry in log] == [8, 4]
    files = [file.path for file in log[0].commit.files]
    assert files == sorted(path.name for path in (tmp_path / "out" / "step-8").iterdir())
    assert {"random_states_0.pkl", "random_states_1.pkl"} < set(files)
    tensors = handle(repo).catalog.schema(log[0].commit.schema).tensors
    assert sum(info.pair is not None for info in tensors) == 12


def test_what_its_tensors_are_for(tmp_path: Path) -> None:
    from tests.helpers.trainers.accelerated import train

    train(tmp_path / "out", tmp_path / "repo", 1)
    repo = Repo.open(tmp_path / "repo")
    tensors = handle(repo).catalog.schema(repo.log()[0].commit.schema).tensors
    parts = {info.name.partition(":")[0]: info.part for info in tensors}
    assert parts == {
        "model.safetensors": "model",
        "optimizer.bin": "optimizer",
        "random_states_0.pkl": "rest",
        "custom_checkpoint_0.pkl": "rest",
    }
    weights = ["5.weight", "0.weight", "3.weight", "5.bias", "3.bias", "0.bias"]
    paired = {info.name: tensors[info.pair].name for info in tensors if info.pair is not None}
    assert paired == {
        f"optimizer.bin:state.{number}.{moment}": f"model.safetensors:{weight}"
        for number, weight in enumerate(weights)
        for moment in ("exp_avg", "exp_avg_sq")
    }


def test_it_does_not_tell_the_step(tmp_path: Path) -> None:
    from tests.helpers.trainers.accelerated import prepared

    accelerator, _, _ = prepared()
    accelerator.save_state(str(tmp_path / "state"))
    repo = Repo.init(tmp_path / "repo")
    assert repo.commit_path(tmp_path / "state", message="").commit.step is None
    assert repo.commit_path(tmp_path / "state", message="", step=4).commit.step == 4


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "files", "commit"])
def test_killed_while_it_saves(moment: str, tmp_path: Path) -> None:
    from tests.helpers.trainers.accelerated import train

    out, place = tmp_path / "out", tmp_path / "repo"
    command = [
        sys.executable,
        "-m",
        "tests.helpers.trainers.accelerated",
        str(out),
        str(place),
        moment,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    repo = Repo.open(place)
    assert [entry.step for entry in repo.log()] == [4]
    assert not repo.verify().damage
    repo.checkout_files(repo.resolve(4), tmp_path / "step-4")
    whole = train(tmp_path / "whole", tmp_path / "other", 2)
    assert train(tmp_path / "again", place, 2, tmp_path / "step-4") == whole
    assert [entry.step for entry in Repo.open(place).log()] == [8, 4]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 16)))
    (block,) = blocks("accelerate")
    run(block, {"model": model, "optimizer": optimizer, "data": data})
    assert [entry.step for entry in Repo.open("runs/accelerate").log()] == [100]


def test_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ckptvcs.integrations.accelerate", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'ckptvcs\[accelerate\]'"):
        importlib.import_module("ckptvcs.integrations.accelerate")
