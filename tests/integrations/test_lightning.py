"""Lightning, its Trainer and Fabric: committed, removed, killed, loaded from commits."""

from __future__ import annotations

import importlib.util
import logging
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs import InvalidInputError, Repo
from ckptvcs.ops.history_reader import handle
from tests.helpers.command_line import environment
from tests.helpers.docs_examples import blocks, run

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="no lightning"),
    pytest.mark.filterwarnings("ignore"),  # those of Lightning
]


def steps(repo: Path) -> list[int | None]:
    return [entry.step for entry in Repo.open(repo).log(all_branches=True)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def process(*args: object, code: int = 0) -> None:
    command = [sys.executable, "-m", "tests.helpers.trainers.lightning", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == code, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an uninterrupted training of three epochs ends with."""
    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from tests.helpers.trainers.lightning import train

    folder = tmp_path_factory.mktemp("whole")
    return train(CkptCheckpointIO(folder / "repo"), folder / "out", 3)


def test_training_goes_on_bit_for_bit_from_commits(tmp_path: Path, whole: bytes) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from tests.helpers.trainers.lightning import train

    out = tmp_path / "out"
    train(CkptCheckpointIO(tmp_path / "repo"), out, 2)
    assert names(out) == ["end.pt", "epoch=1-step=4.ckpt", "last.ckpt"]
    newest, *_ = log = Repo.open(tmp_path / "repo").log()
    assert [entry.message for entry in log] == ["epoch=1-step=4.ckpt", "epoch=0-step=2.ckpt"]
    assert newest.exact
    assert newest.step == 4
    assert newest.metrics.keys() == {"loss"}
    shutil.rmtree(out)
    assert train(CkptCheckpointIO(tmp_path / "repo"), out, 3, out / "last.ckpt") == whole
    assert steps(tmp_path / "repo") == [6, 4, 2]
    assert not Repo.open(tmp_path / "repo").verify().damage


def test_moments_are_paired(tmp_path: Path) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from tests.helpers.trainers.lightning import train

    train(CkptCheckpointIO(tmp_path / "repo"), tmp_path / "out", 1)
    repo = Repo.open(tmp_path / "repo")
    tensors = handle(repo).catalog.schema(repo.log()[0].commit.schema).tensors
    moments = [info for info in tensors if info.role in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 12
    for info in moments:
        assert info.pair is not None
        assert tensors[info.pair].shape == info.shape
    assert {info.part for info in tensors if info.name.startswith("state_dict.")} == {"model"}
    assert {info.part for info in tensors if "best" in info.name} == {"rest"}


def test_the_last_costs_nothing(tmp_path: Path) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from tests.helpers.trainers.lightning import train

    for name, last in (("with", True), ("without", None)):
        train(CkptCheckpointIO(tmp_path / name), tmp_path / name / "out", 3, save_last=last)
    there, not_there = (Repo.open(tmp_path / name) for name in ("with", "without"))
    assert names(tmp_path / "with" / "out")[-1] == "last.ckpt"
    assert steps(tmp_path / "with") == steps(tmp_path / "without") == [6, 4, 2]
    # The path of the last one stands in each checkpoint.
    without = not_there.stats().stored_bytes
    assert there.stats().stored_bytes - without < without // 20


def test_what_another_checkpoint_keeps_of_the_same_step(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from tests.helpers.trainers.lightning import train

    every = ModelCheckpoint(dirpath=tmp_path / "out", filename="{step}", save_top_k=-1)
    train(CkptCheckpointIO(tmp_path / "repo"), tmp_path / "out", 2, beside=every)
    repo = Repo.open(tmp_path / "repo")
    log = repo.log()
    assert [entry.step for entry in log] == [4, 4, 2, 2]
    assert {entry.branch for entry in log} == {"main"}
    sizes = [entry.commit.data_bytes for entry in log]
    assert max(sizes[0], sizes[2]) < sizes[1] / 2
    assert [entry.commit.depth for entry in log] == [1, 1, 0, 0]


def test_only_what_is_committed_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO

    first = CkptCheckpointIO(tmp_path / "repo")
    first.save_checkpoint({"state_dict": {}, "global_step": 1}, tmp_path / "a.ckpt")
    torch.save({"state_dict": {}, "global_step": 2}, tmp_path / "b.ckpt")
    again = CkptCheckpointIO(tmp_path / "repo")  # it has not made these
    for name in ("a.ckpt", "b.ckpt", "none.ckpt"):
        again.remove_checkpoint(tmp_path / name)
    assert names(tmp_path) == ["b.ckpt", "repo"]
    assert "b.ckpt is not removed" in caplog.text
    assert again.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1
    with pytest.raises(FileNotFoundError):
        again.load_checkpoint(tmp_path / "none.ckpt")


def test_it_can_be_given_to_other_processes(tmp_path: Path) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO

    given = pickle.loads(pickle.dumps(CkptCheckpointIO(Repo.init(tmp_path / "repo"))))
    given.save_checkpoint({"global_step": 1, "state_dict": {}}, tmp_path / "step.ckpt")
    given.save_checkpoint({"global_step": 1}, tmp_path / ".temp.ckpt")  # what launchers pass on
    given.remove_checkpoint(tmp_path / ".temp.ckpt")
    assert not (tmp_path / ".temp.ckpt").exists()
    (entry,) = Repo.open(tmp_path / "repo").log()
    assert entry.commit.path == "step.ckpt"


def test_the_last_is_the_newest_of_its_folder(tmp_path: Path) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO

    used, out = CkptCheckpointIO(tmp_path), tmp_path / "out"
    for step, saved in (
        (1, ["a.ckpt", "last.ckpt"]),
        (2, ["last.ckpt"]),
        (3, ["b.ckpt", "last.ckpt"]),
    ):
        for name in saved:
            used.save_checkpoint({"global_step": step, "x": torch.rand(9)}, out / name)
    state: dict[str, Any] = {"global_step": 3, "x": torch.rand(9)}
    for name in ("b.ckpt", "last.ckpt"):
        used.save_checkpoint(state, out / name)
    used.save_checkpoint({"global_step": 4}, tmp_path / "other" / "last.ckpt")
    shutil.rmtree(out)
    again = CkptCheckpointIO(tmp_path)
    for name, step in (("a.ckpt", 1), ("b.ckpt", 3), ("last.ckpt", 3), ("last-v1.ckpt", 3)):
        assert again.load_checkpoint(out / name)["global_step"] == step
    assert torch.equal(again.load_checkpoint(str(out / "last.ckpt"))["x"], state["x"])
    assert again.load_checkpoint(tmp_path / "other" / "last.ckpt")["global_step"] == 4


def test_what_is_elsewhere(tmp_path: Path) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO

    used = CkptCheckpointIO(tmp_path / "repo")
    used.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(InvalidInputError, match="only local files"):
        used.save_checkpoint({"global_step": 2}, "memory://a.ckpt")
    with pytest.raises(FileNotFoundError):
        used.load_checkpoint("memory://a.ckpt")


def test_nothing_in_a_repository_is_executed_unasked(tmp_path: Path) -> None:
    import pickle

    from ckptvcs.integrations.lightning import CkptCheckpointIO

    used = CkptCheckpointIO(tmp_path / "repo")
    used.save_checkpoint({"x": logging.getLogger("a")}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").unlink()
    with pytest.raises(pickle.UnpicklingError):
        used.load_checkpoint(tmp_path / "a.ckpt")
    used.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)


def test_a_file_that_is_being_committed_is_removed_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from ckptvcs.integrations.target import Target

    begun, go_on, path = threading.Event(), threading.Event(), tmp_path / "a.ckpt"
    commit = Target.commit

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return commit(*args, **kwargs)

    monkeypatch.setattr(Target, "commit", slow)
    used = CkptCheckpointIO(tmp_path / "repo")
    saving = threading.Thread(target=used.save_checkpoint, args=({"global_step": 1}, path))
    saving.start()
    assert begun.wait(60)
    removing = threading.Thread(target=used.remove_checkpoint, args=(path,))
    removing.start()
    removing.join(0.1)
    assert path.exists()
    go_on.set()
    saving.join(60)
    removing.join(60)
    assert not path.exists()
    assert steps(tmp_path / "repo") == [1]


def test_asynchronous_saves_train_the_same(tmp_path: Path, whole: bytes) -> None:
    from lightning.pytorch.plugins import AsyncCheckpointIO

    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from tests.helpers.trainers.lightning import train

    used = AsyncCheckpointIO(CkptCheckpointIO(tmp_path / "repo"))
    assert train(used, tmp_path / "out", 3) == whole
    assert steps(tmp_path / "repo") == [6, 4, 2]
    assert not Repo.open(tmp_path / "repo").verify().damage


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process(out, tmp_path / "repo", "two", 2)
    assert steps(tmp_path / "repo") == [2, 1]
    shutil.rmtree(out)
    process(out, tmp_path / "repo", "two", 3, out / "last.ckpt")
    assert steps(tmp_path / "repo") == [3, 2, 1]
    assert not Repo.open(tmp_path / "repo").verify().damage


def test_fabric_saves_and_loads(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    from ckptvcs.integrations.lightning import CkptCheckpointIO

    fabric = Fabric(accelerator="cpu", plugins=[CkptCheckpointIO(tmp_path / "repo")])
    net = torch.nn.Linear(32, 32)
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    model(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 7})
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    repo = Repo.open(tmp_path / "repo")
    (entry,) = repo.log()
    assert entry.step == 7
    tensors = handle(repo).catalog.schema(entry.commit.schema).tensors
    assert [t.pair is not None for t in tensors if t.role.startswith("exp_avg")] == [True] * 4
    (tmp_path / "a.ckpt").unlink()
    optimizer.step()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(tmp_path / "a.ckpt", state)
    assert state["step"] == 7
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["commit", "half", "file", "published", "async commit"])
def test_killed_while_it_saves(moment: str, tmp_path: Path, whole: bytes) -> None:
    from ckptvcs.integrations.lightning import CkptCheckpointIO
    from tests.helpers.trainers.lightning import train

    out = tmp_path / "out"
    process(out, tmp_path / "repo", moment, code=-signal.SIGKILL)
    assert steps(tmp_path / "repo") == ([4, 2] if moment == "published" else [2])
    assert not Repo.open(tmp_path / "repo").verify().damage
    shutil.copytree(tmp_path / "repo", tmp_path / "copy")
    for where in ("repo", "copy"):  # from what is left on disk, and from the history alone
        assert train(CkptCheckpointIO(tmp_path / where), out, 3, out / "last.ckpt") == whole
        assert steps(tmp_path / where)[0] == 6
        assert not Repo.open(tmp_path / where).verify().damage
        shutil.rmtree(out)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.trainers.lightning import Net, data

    monkeypatch.chdir(tmp_path)
    of_trainer, of_fabric = blocks("lightning")
    run(of_trainer, {"model": Net(), "data": data()})
    assert steps(Path("runs/lightning")) == [6, 4, 2]
    model = torch.nn.Linear(16, 16)
    run(of_fabric, {"model": model, "optimizer": torch.optim.AdamW(model.parameters())})
    assert steps(Path("runs/fabric")) == [100]


def test_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ckptvcs.integrations.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.fabric.plugins", None)
    with pytest.raises(ImportError, match=r"pip install 'ckptvcs\[lightning\]'"):
        importlib.import_module("ckptvcs.integrations.lightning")
