"""torch.distributed.checkpoint: real processes started by torchrun, and states of one process."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ckptvcs import Repo
from ckptvcs.errors import CorruptionError, NotFoundError
from ckptvcs.integrations.distributed import CkptReader, CkptWriter, load_state
from ckptvcs.integrations.distributed.balance import keep_together
from ckptvcs.integrations.distributed.chunks import load_metadata
from ckptvcs.ops.history_reader import handle
from tests.helpers.command_line import environment
from tests.helpers.trainers.distributed import differences


def torchrun(processes: int, kind: str, folder: Path, *actions: str, dies: bool = False) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "-m",
        "tests.helpers.trainers.distributed",
        kind,
        str(folder / "repo"),
        str(folder),
        *actions,
    ]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert (done.returncode != 0) == dies, done.stderr


def saved(folder: Path, step: int) -> dict[str, Any]:
    whole: dict[str, Any] = torch.load(folder / f"truth-{step}.pt", weights_only=True)
    return whole


def test_two_processes(tmp_path: Path) -> None:
    torchrun(
        2,
        "fsdp",
        tmp_path,
        "train",
        "save",
        "train",
        "save",
        "save",
        "train=2",
        "async",
        "truth",
        "load=2",
        "train=2",
        "check",
        "load=step-4",
        "check",
    )
    repo = Repo.open(tmp_path / "repo")
    last, again, second, _ = log = repo.log()
    assert [entry.step for entry in log] == [4, 2, 2, 1]
    assert again.commit.parts == second.commit.parts
    assert (again.commit.data_bytes, again.commit.patch_bytes) == (0, 0)
    assert last.exact
    assert last.commit.depth == 2
    assert last.metrics == {"loss": 1.5}
    infos = handle(repo).catalog.schema(last.commit.schema).tensors
    moments = [info for info in infos if info.role in ("exp_avg", "exp_avg_sq")]
    assert {infos[info.pair].name for info in moments if info.pair is not None} >= {
        "model.0.weight[0:20,0:24]",
        "model.0.weight[20:40,0:24]",
    }
    assert not differences(saved(tmp_path, 4), load_state(repo, "step-4"))
    assert not repo.verify().damage


@pytest.mark.slow
def test_other_numbers_of_processes(tmp_path: Path) -> None:
    torchrun(2, "fsdp", tmp_path, "train=4", "save", "truth")
    torchrun(4, "fsdp", tmp_path, "load=step-4", "check", "train", "save", "truth")
    torchrun(1, "fsdp", tmp_path, "load=HEAD", "check")
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [5, 4]
    assert repo.log()[0].commit.depth == 0  # all weights are elsewhere
    assert not repo.verify().damage


@pytest.mark.slow
def test_saved_by_processes_beside(tmp_path: Path) -> None:
    torchrun(
        2,
        "fsdp",
        tmp_path,
        "train",
        "async=process",
        "train",
        "async=process",
        "truth",
        "load=2",
        "check",
    )
    repo = Repo.open(tmp_path / "repo")
    assert [entry.commit.depth for entry in repo.log()] == [1, 0]
    assert not repo.verify().damage


@pytest.mark.slow
def test_replicas(tmp_path: Path) -> None:
    torchrun(2, "ddp", tmp_path, "train", "save", "train", "save", "truth")
    repo = Repo.open(tmp_path / "repo")
    newest = repo.log()[0]
    assert newest.commit.depth == 1
    infos = handle(repo).catalog.schema(newest.commit.schema).tensors
    moments = [info for info in infos if info.role in ("exp_avg", "exp_avg_sq")]
    assert moments
    assert all(info.pair is not None for info in moments)
    torchrun(1, "plain", tmp_path, "load=2", "check", "train", "save", "truth")
    torchrun(2, "ddp", tmp_path, "load=3", "check")
    assert not Repo.open(tmp_path / "repo").verify().damage


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "coding", "coded"])
def test_a_process_that_dies_leaves_no_commit(moment: str, tmp_path: Path) -> None:
    torchrun(
        2, "fsdp", tmp_path, "train", "save", "truth", "train", f"die={moment}", "save", dies=True
    )
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [1]
    assert not repo.verify().damage
    repo.gc()
    torchrun(2, "fsdp", tmp_path, "load=1", "check", "train", "save")
    repo = Repo.open(tmp_path / "repo")
    assert [entry.step for entry in repo.log()] == [2, 1]
    assert not repo.verify().damage


# -- one process -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet_torch() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        yield


def state() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    shared = torch.randn(40, 30, generator=draw)
    return {
        "model": {"a.weight": shared, "b.weight": shared, "half": shared.to(torch.bfloat16)},
        "part": torch.randn(60, 60, generator=draw)[3:50:2, 4:40],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "complex": torch.randn(20, 20, dtype=torch.complex64, generator=draw),
        "list": [1, "two", {"three": torch.ones(300)}, None, b"\x00\xff"],
        "numpy": (np.arange(300, dtype=np.float32), np.arange(3)),
        "long": 1 << 90,
    }


def test_the_step_is_that_of_the_name(tmp_path: Path) -> None:
    writer = CkptWriter(tmp_path)
    save({"step": 7}, checkpoint_id="step-9", storage_writer=writer, no_dist=True)
    save({"step": 10}, checkpoint_id="latest", storage_writer=writer, no_dist=True)
    assert [entry.step for entry in Repo.open(tmp_path).log()] == [10, 9]


def test_any_state_comes_back(tmp_path: Path) -> None:
    writer = CkptWriter(tmp_path)
    save(state(), checkpoint_id="step-7", storage_writer=writer, no_dist=True)
    assert writer.entry is not None
    assert (writer.entry.step, writer.entry.message) == (7, "step-7")
    found = state()
    for tensor in (found["part"], found["model"]["a.weight"], found["list"][2]["three"]):
        tensor.zero_()
    found["list"][0] = found["long"] = None
    load(found, storage_reader=CkptReader(tmp_path), no_dist=True)
    whole = load_state(tmp_path)
    for one in (found, whole):
        assert not differences(
            {k: v for k, v in state().items() if k not in ("numpy", "list")},
            {k: v for k, v in one.items() if k not in ("numpy", "list")},
        )
        assert one["list"][:2] + one["list"][3:] == [1, "two", None, b"\x00\xff"]
        assert torch.equal(one["list"][2]["three"], torch.ones(300))
        assert all(map(np.array_equal, one["numpy"], state()["numpy"]))
    assert whole["model"]["half"].dtype == torch.bfloat16


def test_what_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as caught:
        save(
            {"x": torch.ones(3), "path": Path("x")},
            storage_writer=CkptWriter(tmp_path),
            no_dist=True,
        )
    (failure,) = caught.value.failures.values()
    assert "at path" in str(failure[0])
    assert Repo.open(tmp_path).log() == []
    repo = Repo.open(tmp_path)
    repo.gc()  # nobody holds a lease
    save({"x": torch.ones(3)}, storage_writer=CkptWriter(repo), no_dist=True)
    assert len(repo.log()) == 1


def test_commits_of_others_are_refused(tmp_path: Path) -> None:
    Repo.init(tmp_path).commit({"w": torch.ones(300)}, step=1)
    with pytest.raises(CheckpointException, match="CkptWriter"):
        load({"w": torch.ones(300)}, storage_reader=CkptReader(tmp_path), no_dist=True)
    with pytest.raises(NotFoundError):
        load_state(tmp_path, "step-12")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "ckptvcs-distributed", "version": 2}',
        '{"format":"ckptvcs-distributed","version":1,"tensors":{"w":{"dtype":"F32","size":[-1],'
        '"chunks":[]}},"values":[],"paths":{}}',
        '{"format":"ckptvcs-distributed","version":1,"tensors":{"w":{"dtype":"F32","size":[4],'
        '"chunks":[[[2],[3]]]}},"values":[],"paths":{}}',
        '{"format":"ckptvcs-distributed","version":1,"tensors":{"w":{"dtype":"F32",'
        '"size":[99999999999,99999999999],"chunks":[]}},"values":[],"paths":{}}',
        '{"format":"ckptvcs-distributed","version":1,"tensors":{"w":{"dtype":"X","size":[4],'
        '"chunks":[]}},"values":[],"paths":{}}',
        '{"format":"ckptvcs-distributed","version":1,"tensors":{},"values":[],"paths":{"a":[[]]}}',
        "[" * 100000,
    ],
)
def test_descriptions_are_hostile(text: str) -> None:
    with pytest.raises(CorruptionError):
        load_metadata(text.encode())


def test_a_weight_and_its_moments_stay_together() -> None:
    def item(name: str, size: int) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([size]))
        data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size([size]))
        return WriteItem(MetadataIndex(name), WriteItemType.TENSOR, tensor_data=data)

    rows = [
        item(name, size)
        for number, size in enumerate((50, 40, 30, 20))
        for name in (
            f"model.{number}.weight",
            f"optim.state.{number}.weight.exp_avg",
            f"optim.state.{number}.weight.exp_avg_sq",
        )
    ]
    own = item("own", 1)
    everything = [row.index for row in rows]
    # As a planner deals them out: one by one.
    shared = keep_together([rows[::2], [*rows[1::2], own]], [everything, [*everything, own.index]])
    names = [{row.index.fqn for row in part} for part in shared]
    assert names[0] | names[1] == {row.index.fqn for row in [*rows, own]}
    assert "own" in names[1]
    numbers = [
        {name.split(".")[-2 - name.startswith("optim")] for name in part if name != "own"}
        for part in names
    ]
    assert not numbers[0] & numbers[1]
    assert all(numbers)
