"""The Trainer of Hugging Face, in processes of its own: committed, checked out, gone on from."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckptvcs import InvalidInputError, Repo
from ckptvcs.ops.history_reader import handle
from tests.helpers.command_line import environment

pytest.importorskip("transformers")


def train(*args: object, dies: bool = False) -> None:
    command = [sys.executable, "-m", "tests.helpers.trainers.huggingface", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == (-signal.SIGKILL if dies else 0), done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint but for that which names its folder."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != "training_args.bin"
    }


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path / "whole", tmp_path / "repo", 6)
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [6, 4, 2]
    entry = repo.log()[1]
    assert entry.exact
    assert {"loss", "learning_rate", "grad_norm"} <= entry.metrics.keys()
    tensors = handle(repo).catalog.schema(entry.commit.schema).tensors
    pairs = {info.name: tensors[info.pair].name for info in tensors if info.pair is not None}
    moments = [i for i in tensors if i.role in ("exp_avg", "exp_avg_sq") and not i.inline]
    assert moments
    assert all(info.name in pairs for info in moments)
    target = tmp_path / "again" / "checkpoint-4"
    repo.checkout_files(entry.id, target)
    assert contents(target) == contents(tmp_path / "whole" / "checkpoint-4")
    train(tmp_path / "again", tmp_path / "repo", 6, target)
    assert contents(tmp_path / "again" / "checkpoint-6") == contents(
        tmp_path / "whole" / "checkpoint-6"
    )
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [6, 6, 4, 2]
    assert (
        repo.log()[0].commit.data_bytes == 0
    )  # the same once more, in a directory of another name
    assert not repo.verify().damage


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "files", "commit", "done"])
def test_killed_while_it_saves(moment: str, tmp_path: Path) -> None:
    train(tmp_path / "whole", tmp_path / "other", 6)
    out, place = tmp_path / "out", tmp_path / "repo"
    train(out, place, 6, "", "", moment, dies=True)
    repo = Repo.open(place)
    step = 4 if moment == "done" else 2
    assert repo.log()[0].step == step
    assert not repo.verify().damage
    target = tmp_path / "again" / f"checkpoint-{step}"
    repo.checkout_files(repo.resolve(step), target)
    train(tmp_path / "again", place, 6, target)
    assert contents(tmp_path / "again" / "checkpoint-6") == contents(
        tmp_path / "whole" / "checkpoint-6"
    )
    repo = Repo.open(place)
    assert [entry.step for entry in repo.log()] == [6, 4, 2]
    assert not repo.verify().damage


def saved(callback: Any, out: Path, step: int) -> None:
    """What a Trainer does at a step, as far as the callback sees it."""
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    moved = weight + 0.01 * step * weight.roll(1)
    torch.save({"weight": moved}, folder / "pytorch_model.bin")
    arguments = SimpleNamespace(output_dir=str(out))
    state = SimpleNamespace(
        is_world_process_zero=True, global_step=step, log_history=[], best_model_checkpoint=None
    )
    callback.on_save(arguments, state, None)


def test_directories_of_earlier_runs_go_too(tmp_path: Path) -> None:
    from ckptvcs.integrations.transformers import CkptCallback

    out, place = tmp_path / "out", tmp_path / "repo"
    for step in (2, 4):
        saved(CkptCallback(place), out, step)
    (out / "checkpoint-3").mkdir()
    (out / "checkpoint-3" / "pytorch_model.bin").write_bytes(b"in no commit")
    callback = CkptCallback(place, keep_local=2, accept_near=True)
    for step in (6, 8):
        saved(callback, out, step)
    assert {path.name for path in out.iterdir()} == {f"checkpoint-{n}" for n in (3, 6, 8)}


def test_why_directories_stay_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from ckptvcs.integrations.transformers import CkptCallback

    callback = CkptCallback(tmp_path / "repo", keep_local=2)
    for step in (2, 4, 6, 8):
        saved(callback, tmp_path / "out", step)
    names = [
        record.getMessage().partition(" is not removed: its commit is only near")[0]
        for record in caplog.records
    ]
    assert len({*names}) == len(names) > 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {*names, "checkpoint-6", "checkpoint-8"}
    with pytest.raises(InvalidInputError, match="at least 1"):
        CkptCallback(tmp_path / "repo", keep_local=0)


@pytest.mark.slow
def test_older_directories_go(tmp_path: Path) -> None:
    train(tmp_path / "out", tmp_path / "repo", 8, "", 2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-6",
        "checkpoint-8",
    ]
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [8, 6, 4, 2]
    target = tmp_path / "resumed" / "checkpoint-4"
    repo.checkout_files(repo.resolve(4), target)  # near by now
    train(tmp_path / "resumed", tmp_path / "repo", 6, target)
    assert Repo.open(tmp_path / "repo").resolve("main-2@6")


@pytest.mark.slow
def test_latest_restores_the_newest_checkpoint_that_proves_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ckptvcs.integrations.transformers import CkptCallback

    assert CkptCallback(tmp_path / "repo").latest() is None
    train(tmp_path / "whole", tmp_path / "repo", 4)
    again = tmp_path / "again"
    train(again, tmp_path / "repo", 6, "latest")
    assert contents(again / "checkpoint-4") == contents(tmp_path / "whole" / "checkpoint-4")
    assert [entry.step for entry in Repo.open(tmp_path / "repo").log()] == [6, 4, 2]
    repo = Repo.open(tmp_path / "repo")
    patches = handle(repo).fader().patches()
    newest = repo.resolve(6)
    for patch in patches:
        if newest in patch.commits:
            (repo.folder / patch.folder / patch.pack[:2] / f"{patch.pack}.pack").write_bytes(b"x")
    found = CkptCallback(tmp_path / "repo").latest(tmp_path / "third")
    assert found == str(tmp_path / "third" / "checkpoint-4")
    assert contents(Path(found)) == contents(tmp_path / "whole" / "checkpoint-4")
    assert "skipped step 6" in caplog.text
