"""Commits that several processes make together; here each of them is another open repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import Repo
from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.encode.shards import Shard
from ckptvcs.errors import BusyError, ConflictError, InvalidInputError
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.join import DistributedCommit, encode_share
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request
from ckptvcs.store import leases
from tests.spec_reader import SpecRepository

pytestmark = pytest.mark.any_backend

State = dict[str, Any]
NAMES = "abcdef"


def weights(step: int, name: str) -> np.ndarray[Any, Any]:
    """A weight that moves a little with every step."""
    draw = np.random.default_rng(ord(name))
    value = draw.normal(size=(30, 40))
    for _ in range(step):
        value = value + 1e-3 * draw.normal(size=value.shape)
    return value.astype(np.float32)


def moment(step: int, name: str) -> np.ndarray[Any, Any]:
    draw = np.random.default_rng([ord(name), step])
    return (1e-3 * draw.normal(size=(30, 40))).astype(np.float32)


def share(step: int, names: str) -> State:
    """What the process has that these weights were given to."""
    return {
        "model": {name: weights(step, name) for name in names},
        "optim": {
            "state": {
                name: {"exp_avg": moment(step, name), "exp_avg_sq": moment(step, name) ** 2}
                for name in names
            },
            "param_groups": [{"params": list(NAMES), "lr": 0.01}],
        },
    }


class World:
    """Processes that commit together."""

    def __init__(self, root: Path, count: int = 2) -> None:
        self.repo = Repo.init(root)
        self.others = [Repository(root / ".ckpt") for _ in range(count)]

    def begin(self, step: int | None) -> DistributedCommit:
        return DistributedCommit(handle(self.repo), Request(step=step, path="joined"))

    def code(self, commit: DistributedCommit, states: list[State]) -> dict[str, Shard]:
        plan = commit.begin()
        return {
            f"rank-{number}.pt": encode_share(repo, plan, state_checkpoint(state))
            for number, (repo, state) in enumerate(zip(self.others, states, strict=True))
            if state
        }

    def commit(self, step: int, states: list[State]) -> LogEntry:
        commit = self.begin(step)
        return commit.finish(self.code(commit, states), {"notes.json": b"{}"})

    def check(self, revision: str, states: list[State]) -> None:
        """Every process' part comes back exactly."""
        found = Repo.open(self.repo.root).checkout(revision)
        for number, state in enumerate(states):
            for name, value in state.get("model", {}).items():
                back = found[f"rank-{number}.pt"]
                np.testing.assert_array_equal(back["model"][name], value)
                for key, expected in state["optim"]["state"][name].items():
                    np.testing.assert_array_equal(back["optim"]["state"][name][key], expected)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def depths(repo: Repo, entry: LogEntry) -> dict[str, int]:
    """How many frames each weight stands on."""
    schema = handle(repo).catalog.schema(entry.commit.schema)
    values = entry.commit.parts["model"].values
    return {
        schema.tensors[number].name: handle(repo).catalog.frame(values, position)[1].depth
        for position, number in enumerate(schema.stored("model"))
    }


@pytest.mark.directory_only
def test_each_process_goes_on_from_its_own(world: World) -> None:
    for step in (1, 2, 3):
        entry = world.commit(step, [share(step, "abc"), share(step, "def")])
    assert entry.exact
    assert depths(world.repo, entry) == {f"model.{name}": 2 for name in NAMES}
    with world.others[0].held_base("state") as held:
        assert held is not None
        assert sorted(held.tensors) == ["model.a", "model.b", "model.c"]
    world.check("HEAD", [share(3, "abc"), share(3, "def")])
    assert not world.repo.verify().damage
    spec = SpecRepository(world.repo.folder)
    for entry in world.repo.log():
        target = world.repo.root / entry.id
        world.repo.checkout_files(entry.id, target)
        assert sorted(path.name for path in target.iterdir()) == [
            "notes.json",
            "rank-0.pt",
            "rank-1.pt",
        ]
        for path in target.iterdir():
            assert spec.file(entry.id, path.name) == path.read_bytes()
    first = Repo.open(world.repo.root).checkout("1")["rank-1.pt"]["model"]["e"]
    assert np.linalg.norm(first - weights(1, "e")) < 0.05 * np.linalg.norm(weights(1, "e"))


def test_what_another_process_has_now_goes_on(world: World) -> None:
    world.commit(1, [share(1, "abc"), share(1, "def")])
    entry = world.commit(2, [share(2, "abcd"), share(2, "ef")])
    assert set(depths(world.repo, entry).values()) == {1}
    split = share(3, "cdef")
    split["model"]["a[0:15]"], split["model"]["a[15:30]"] = np.split(weights(3, "a"), 2)
    entry = world.commit(3, [split, share(3, "b")])
    found = depths(world.repo, entry)
    assert {name for name, depth in found.items() if not depth} == {
        "model.a[0:15]",
        "model.a[15:30]",
    }
    assert not world.repo.verify().damage


def test_the_same_again_costs_nothing(world: World) -> None:
    states = [share(1, "abc"), share(1, "def")]
    first = world.commit(1, states)
    packs = sorted((world.repo.folder / "packs").rglob("*.pack"))
    again = world.commit(1, states)
    assert sorted((world.repo.folder / "packs").rglob("*.pack")) == packs
    assert again.commit.parts == first.commit.parts
    assert (again.branch, again.commit.data_bytes, again.commit.patch_bytes) == ("main", 0, 0)
    assert again.commit.error == first.commit.error


def test_one_process_has_the_same_again(world: World) -> None:
    world.commit(1, [share(1, "abc"), share(1, "def")])
    whole = world.commit(2, [share(2, "abc"), share(2, "def")])
    half = world.commit(3, [share(2, "abc"), share(3, "def")])
    assert 0 < half.commit.data_bytes < 0.7 * whole.commit.data_bytes
    world.check("HEAD", [share(2, "abc"), share(3, "def")])
    for step in (4, 5, 6):
        world.commit(step, [share(2, "abc"), share(step, "def")])
    world.check("HEAD", [share(2, "abc"), share(6, "def")])
    world.repo.gc()
    assert not world.repo.verify().damage


def test_another_writer_came_first(world: World) -> None:
    commit = world.begin(2)
    shards = world.code(commit, [share(2, "abc"), share(2, "def")])
    other = Repo.open(world.repo.root).commit({"w": weights(1, "x")}, step=1)
    with pytest.raises(ConflictError):
        commit.finish(shards, {})
    commit.abandon()
    assert [entry.id for entry in world.repo.log()] == [other.id]
    world.repo.gc()
    assert not world.repo.verify().damage


def test_a_step_that_goes_back_starts_a_branch(world: World) -> None:
    for step in (1, 5):
        world.commit(step, [share(step, "abc"), share(step, "def")])
    entry = world.commit(3, [share(3, "abc"), share(3, "def")])
    assert entry.branch == "main-2"
    assert world.repo.entry(entry.commit.parents[0]).step == 1
    entry = world.commit(3, [share(4, "abc"), share(4, "def")])  # the step is there already
    assert entry.branch == "main-3"
    world.check(entry.id, [share(4, "abc"), share(4, "def")])


def test_gc_waits_and_takes_what_was_abandoned(world: World) -> None:
    world.commit(1, [share(1, "abc"), share(1, "def")])
    before = sorted(world.repo.folder.joinpath("packs").rglob("*.pack"))
    commit = world.begin(2)
    world.code(commit, [share(2, "abc"), share(2, "def")])
    with leases.patience(0), pytest.raises(BusyError):
        world.repo.gc()
    commit.abandon()
    world.repo.gc()
    assert sorted(world.repo.folder.joinpath("packs").rglob("*.pack")) == before
    assert not world.repo.verify().damage


@pytest.mark.parametrize("codec", ["lossless", "excp", "near:step=4"])
def test_processes_commit_together_with_each_codec(codec: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.repo.configure("codec", codec)
    world.others = [Repository(tmp_path / ".ckpt") for _ in range(2)]
    for step in (1, 2):
        world.commit(step, [share(step, "abc"), share(step, "def")])
    world.check("HEAD", [share(2, "abc"), share(2, "def")])
    assert not world.repo.verify().damage


def test_values_that_changed_are_another_commit(world: World) -> None:
    states = [share(1, "abc"), share(1, "def")]
    world.commit(1, states)
    states[1]["optim"]["param_groups"][0]["lr"] = 0.5
    entry = world.commit(2, states)
    assert not entry.commit.data_bytes
    found = world.repo.checkout()["rank-1.pt"]["optim"]["param_groups"][0]["lr"]
    assert found == 0.5


def test_a_shard_that_is_cut_off_is_refused(world: World) -> None:
    commit = world.begin(1)
    shards = world.code(commit, [share(1, "abc"), share(1, "def")])
    literals: Any = shards["rank-1.pt"].literals
    literals.pop(0)
    with pytest.raises(InvalidInputError):
        commit.finish(shards, {})
    assert world.repo.log() == []


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=2, max_size=4))
def test_weights_move_between_processes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]
) -> None:
    """`rows` say for each step which process has which weight."""
    world = World(tmp_path_factory.mktemp("joined"), 3)
    for step, owners in enumerate(rows, 1):
        shares = [
            "".join(n for n, owner in zip(NAMES, owners, strict=True) if owner == rank)
            for rank in range(3)
        ]
        states = [share(step, names) if names else {} for names in shares]
        entry = world.commit(step, states)
        assert set(depths(world.repo, entry).values()) == {step - 1}
        world.check("HEAD", states)
    assert not world.repo.verify().damage
