"""The Trainer of Hugging Face, in processes of its own: committed, checked out, gone on from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ckptvcs import Repo
from tests.cli.conftest import environment

pytest.importorskip("transformers")


def train(*args: object) -> None:
    command = [sys.executable, "-m", "tests.trainers.huggingface", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint but for that which names its folder."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir() if path.name != "training_args.bin"
    }  # fmt: skip


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path / "whole", tmp_path / "other", 6)
    train(tmp_path / "first", tmp_path / "repo", 4)
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [4, 2]
    newest = repo.log()[0]
    assert newest.exact
    assert {"loss", "learning_rate", "grad_norm"} <= newest.metrics.keys()
    tensors = repo.catalog.schema(newest.commit.schema).tensors
    pairs = {info.name: tensors[info.pair].name for info in tensors if info.pair is not None}
    moments = [i for i in tensors if i.role in ("exp_avg", "exp_avg_sq") and not i.inline]
    assert moments
    assert all(info.name in pairs for info in moments)
    target = tmp_path / "again" / "checkpoint-4"
    repo.checkout_files(newest.id, target)
    assert contents(target) == contents(tmp_path / "first" / "checkpoint-4")
    train(tmp_path / "again", tmp_path / "repo", 6, target)
    assert contents(tmp_path / "again" / "checkpoint-6") == contents(
        tmp_path / "whole" / "checkpoint-6"
    )
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [6, 4, 2]
    assert not repo.verify().damage


@pytest.mark.slow
def test_older_directories_go(tmp_path: Path) -> None:
    train(tmp_path / "out", tmp_path / "repo", 8, "", 2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-6", "checkpoint-8",
    ]  # fmt: skip
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [8, 6, 4, 2]
    target = tmp_path / "resumed" / "checkpoint-4"
    repo.checkout_files(repo.resolve(4), target)  # near by now
    train(tmp_path / "resumed", tmp_path / "repo", 6, target)
    assert Repo.open(tmp_path / "repo").resolve("main-2@6")
