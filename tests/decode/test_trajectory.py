"""Trajectories: what a checkout gives, each frame decoded once."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs import InvalidInputError, NotFoundError, Repo
from ckptvcs.codec import frame
from ckptvcs.decode import chain
from ckptvcs.decode.part_reader import PartReader
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import move_head, set_ref
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.object_store import ObjectStore
from tests.helpers.comparing import same
from tests.helpers.profiles import short
from tests.helpers.training import train

pytestmark = pytest.mark.any_backend

State = dict[str, Any]


class Work:
    """What was decoded and read."""

    slices = 0
    bytes = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Count the slices that are decoded and the bytes of frames that are read."""
    work = Work()
    decode, read = frame.decode_slice, ObjectStore.read_region

    def decode_slice(*args: Any, **options: Any) -> Any:
        work.slices += 1
        return decode(*args, **options)

    def read_region(store: ObjectStore, name: ObjectId, offset: int, length: int) -> bytes:
        work.bytes += length
        return read(store, name, offset, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "decode_slice", decode_slice)
        patch.setattr(ObjectStore, "read_region", read_region)
        yield work


def from_scratch(repo: Repo, revision: str | int) -> Any:
    """A checkout that finds nothing at hand."""
    shutil.rmtree(repo.folder / "cache" / "bases", ignore_errors=True)
    return Repo.open(repo.root).checkout(revision)


def own_slices(repo: Repo) -> int:
    """The slices of all frames that commits brought, without what they stand on."""
    bundles = {
        bundle
        for entry in repo.log()
        for part in entry.commit.parts.values()
        for bundle in handle(repo).catalog.recipe(part.values).bundles
    }
    return sum(len(row.slices) for name in bundles for row in handle(repo).catalog.bundle(name))


@pytest.mark.parametrize("codec", ["near", "lossless", "excp"])
def test_each_frame_is_decoded_once(codec: str, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path, codec=codec)
    repo.configure("keep-exact", "0")
    for state in train(9):
        repo.commit(state, step=state["step"])
    with counted() as work:
        found = list(Repo.open(tmp_path).trajectory())
    assert [entry.step for entry, _ in found] == list(range(1, 10))
    assert work.slices <= own_slices(repo)
    for entry, state in found:
        assert same(from_scratch(repo, entry.id), state)
    with counted() as deep:
        from_scratch(repo, 9)
    with counted() as single:
        list(Repo.open(tmp_path).trajectory(start=9))
    assert single.slices <= deep.slices  # a stretch begins with a walk down the chain


def test_a_step_costs_the_same_at_any_depth(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    for state in train(12):
        repo.commit(state, step=state["step"])
    with counted() as work:
        costs = []
        for _ in Repo.open(tmp_path).trajectory("model.*"):
            costs.append((work.slices, work.bytes))
            work.slices = work.bytes = 0
    assert len({slices for slices, _ in costs[1:]}) == 1
    assert max(read for _, read in costs[1:]) < 2 * min(read for _, read in costs[1:])


def test_every_and_bounds(repo: Repo) -> None:
    for state in train(8):
        repo.commit(state, step=state["step"] * 10)
    set_ref(handle(repo), "tags", "mid", repo.resolve(50), "test")

    def steps(**options: Any) -> list[int | None]:
        return [entry.step for entry, _ in repo.trajectory("model.0.*", **options)]

    assert steps(start=30, stop=60) == steps(start="25", stop="step:69") == [30, 40, 50, 60]
    assert steps(start="mid") == steps(start="HEAD~3") == [50, 60, 70, 80]
    assert steps(stop="mid", every=20) == [20, 40]
    assert steps(start="mid", stop="HEAD~1") == [50, 60, 70]
    assert steps(start=81) == []
    with counted() as work:
        list(repo.trajectory("model.0.weight", every=20))
    assert work.slices == 8
    with pytest.raises(InvalidInputError, match="interval"):
        repo.trajectory(every=0)
    with pytest.raises(NotFoundError, match="unknown revision"):
        repo.trajectory(start="nothing")


def test_a_trajectory_follows_first_parents(repo: Repo) -> None:
    states = train(6)
    for state in states[:4]:
        repo.commit(state, step=state["step"])
    move_head(handle(repo), repo.resolve(2), None)
    other = Repo.open(repo.root)
    side = [other.commit(state, step=state["step"] + 10) for state in states[4:]]
    assert [e.step for e, _ in other.trajectory("model.*")] == [1, 2, 15, 16]
    main = list(other.trajectory(revision="main"))
    assert [e.step for e, _ in main] == [1, 2, 3, 4]
    assert all(same(state, true) for (_, state), true in zip(main, states, strict=False))
    assert [e.step for e, _ in other.trajectory("model.*", start=2, stop="main")] == [2, 3, 4]
    with pytest.raises(NotFoundError, match="not on the line"):
        other.trajectory(start=side[0].id, stop="main")
    assert [e.tags for e, _ in other.trajectory("model.*", stop=1)] == [()]


def test_a_trajectory_yields_the_selected_tensors(repo: Repo) -> None:
    states = train(3)
    for state in states:
        repo.commit(state, step=state["step"])
    name = "optimizer.state.0.exp_avg"
    for (_, found), true in zip(repo.trajectory(["model.0.*", name]), states, strict=True):
        assert found.keys() == {"model.0.weight", "model.0.bias", name}
        assert same(found["model.0.weight"], true["model"]["0.weight"])
        assert same(found[name], true["optimizer"]["state"][0]["exp_avg"])
    with pytest.raises(NotFoundError, match="no tensor matches"):
        repo.trajectory("nothing.*")


def test_a_reader_may_change_what_it_gets(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    for state in train(5):
        repo.commit(state, step=state["step"])
    for entry, state in repo.trajectory():
        assert same(from_scratch(repo, entry.id), state)
        for tensor in state["model"].values():
            tensor.zero_()
    frozen = [state["model"]["4.weight"] for _, state in repo.trajectory()]
    frozen[0] += 1
    assert not same(frozen[0], frozen[1])  # it never changed, and yet they are two


def test_nothing_is_kept_but_what_the_next_one_stands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo.init(tmp_path)
    for state in train(4):
        repo.commit(state, step=state["step"])
    seen: list[weakref.ref[torch.Tensor]] = []
    alive = []
    decode = PartReader.decode_ahead

    def decode_ahead(reader: PartReader, numbers: Iterable[int]) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        decode(reader, numbers)

    monkeypatch.setattr(PartReader, "decode_ahead", decode_ahead)
    for _, state in repo.trajectory():
        seen.append(weakref.ref(state["optimizer"]["state"][0]["exp_avg"]))
        del state
    assert len(alive) > 4
    assert not any(alive)


# -- any history -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", short([None, 2], [2]))
def test_exact_patches_are_yielded_and_near_values_built_upon(
    every: int | None, tmp_path: Path
) -> None:
    repo = Repo.init(tmp_path)
    states = train(8)
    for state in states:
        entry = repo.commit(state, step=state["step"])
        if state["step"] not in (3, 4):
            repo.pin(entry.id, pinned=True)
    repo.configure("keep-exact", "0")
    repo.commit(train(9)[8], step=9)
    patches = sum(
        len(row.slices)
        for entry in repo.log()
        for part in entry.commit.parts.values()
        if part.exact
        and handle(repo).catalog.has_recipe(part.exact)
        and (every is None or (entry.step or 0) % every == 0)
        for bundle in handle(repo).catalog.recipe(part.exact).bundles
        for row in handle(repo).catalog.bundle(bundle)
    )
    with counted() as work:
        found = list(Repo.open(tmp_path).trajectory(every=every))
    assert work.slices <= own_slices(repo) + patches
    for entry, state in found:
        assert entry.exact == (entry.step not in (3, 4, 9))
        assert entry.step == 9 or same(state, states[(entry.step or 0) - 1]) == entry.exact
        assert same(from_scratch(repo, entry.id), state)


def test_rounded_copies_find_their_masters(tmp_path: Path) -> None:
    repo, masters = Repo.init(tmp_path), torch.randn(300, 40)
    repo.configure("keep-exact", "0")
    for step in range(6):
        masters = masters + torch.randn(300, 40) * 0.01
        model = {"model": {"w": masters.bfloat16()}, "master": {"w": masters}}
        repo.commit(model, step=step)
    with counted() as work:
        found = list(Repo.open(tmp_path).trajectory("model.*"))
    assert work.slices <= 2 * 6  # each copy, and its master for the next one
    for entry, state in found:
        assert same(from_scratch(repo, entry.id)["model"]["w"], state["model.w"])


commits = st.lists(
    st.tuples(
        st.sampled_from(["near", "lossless", "excp"]),
        st.sampled_from(["go on", "add", "remove", "reshape", "stand still", "back", "twins"]),
        st.booleans(),
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.directory_only
@given(commits, st.sampled_from([None, 2, 3]), st.integers(1, 6))
def test_any_history_comes_back_as_checkouts_give_it(
    history: list[tuple[str, str, bool]], every: int | None, depth: int
) -> None:
    draw = torch.Generator().manual_seed(len(history))
    with tempfile.TemporaryDirectory() as folder:
        repo = Repo.init(folder)
        config = (repo.folder / "config.toml").read_text().replace("64", str(depth))
        (repo.folder / "config.toml").write_text(config)
        repo = Repo.open(folder)
        weights = {name: torch.randn(20, 30, generator=draw) for name in ("a", "b")}
        for step, (codec, change, patch) in enumerate(history, start=1):
            if change == "add":
                weights[f"w{step}"] = torch.randn(200, generator=draw)
            elif change == "remove" and len(weights) > 1:
                weights.pop(max(weights))
            elif change == "reshape":
                weights["b"] = torch.randn(30, 20 + step, generator=draw)
            elif change == "twins":
                weights["c"] = weights[max(weights)].clone()
            elif change == "back" and step > 2:
                move_head(handle(repo), repo.resolve("HEAD~1"), None)
                repo = Repo.open(folder)
            still = change == "stand still"
            weights = {
                name: value
                if still and name != "a"
                else value + torch.randn(value.shape, generator=draw) * 0.01
                for name, value in weights.items()
            }
            moments = {name: value.square() for name, value in weights.items()}
            state = {"model": dict(weights), "other": moments, "array": np.arange(200) * step}
            entry = repo.commit(state, step=step, codec=codec)
            if patch:
                repo.pin(entry.id, pinned=True)
        for branch in handle(repo).refs.names("heads"):
            found = list(Repo.open(folder).trajectory(every=every, revision=branch))
            picked = list(Repo.open(folder).trajectory("*.a", every=every, revision=branch))
            assert [e.id for e, _ in found] == [e.id for e, _ in picked]
            for (entry, state), (_, some) in zip(found, picked, strict=True):
                checkout = from_scratch(repo, entry.id)
                assert same(checkout, state)
                for name, tensor in some.items():
                    key, _, rest = name.partition(".")
                    assert same(tensor, checkout[key][rest])
                    assert same(tensor, Repo.open(folder).tensor(name, at=entry.id))


# -- one tensor ------------------------------------------------------------------------------------


def test_one_tensor_reads_its_own_frames(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "0")
    wide = {f"layer{n}": torch.randn(40, 40) for n in range(300)}
    for step in range(4):
        repo.commit({"model": {k: v + step * 0.01 for k, v in wide.items()}}, step=step)
    shutil.rmtree(repo.folder / "cache" / "bases", ignore_errors=True)
    with counted() as whole:
        state = Repo.open(tmp_path).checkout(3)
    shutil.rmtree(repo.folder / "cache" / "bases", ignore_errors=True)
    with counted() as work:
        one = Repo.open(tmp_path).tensor("layer7", at=3)
    assert same(one, state["model"]["layer7"])
    assert work.slices == 4
    assert work.bytes < 0.02 * whole.bytes
    with counted() as work:
        found = list(Repo.open(tmp_path).series("layer7"))
    assert [entry.step for entry, _ in found] == [0, 1, 2, 3]
    assert work.slices == 4


def test_names_of_tensors_and_their_aliases(repo: Repo) -> None:
    shared = torch.randn(20, 30)
    state: State = {
        "model": {
            "a.weight": shared,
            "tied.weight": shared,
            "row": shared[3],
            "x:y.z": torch.ones(3),
        },
        "ema": {"a.weight": torch.zeros(20, 30)},
        "deep": {"model": {"a.weight": torch.ones(200), "b.weight": torch.ones(200) * 2}},
        "array": np.arange(600.0).reshape(20, 30),
    }
    repo.commit(state, step=1)
    assert same(repo.tensor("model.tied.weight"), shared)
    assert same(repo.tensor("row"), shared[3])
    assert same(repo.tensor("x:y.z", at=1), torch.ones(3))
    assert same(repo.tensor("array"), state["array"])
    assert same(repo.tensor("b.weight"), state["deep"]["model"]["b.weight"])
    with pytest.raises(InvalidInputError, match="ambiguous") as ambiguous:
        repo.tensor("a.weight")
    assert "model.a.weight" in str(ambiguous.value.hint)
    with pytest.raises(NotFoundError) as unknown:
        repo.tensor("model.tied.wieght")
    assert "model.tied.weight" in str(unknown.value.hint)
    for name in ("", ".", "weigh", "*"):
        with pytest.raises(NotFoundError):
            repo.tensor(name)
    repo.commit({"model": state["model"], "ema": {"b.weight": shared}}, step=2)
    assert same(repo.tensor("a.weight"), shared)
    assert [e.step for e, _ in repo.series("array")] == [1]
    with pytest.raises(NotFoundError):
        repo.series("nowhere")
