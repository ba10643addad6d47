"""Repo in Python: states in, the same states out."""

from __future__ import annotations

import argparse
import collections
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptvcs import ConflictError, InvalidInputError, NotFoundError, Repo
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.checkpoint.torch_writer import dump_pickle
from ckptvcs.ops.checkout import save_part
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import move_head
from tests.helpers.comparing import same
from tests.helpers.training import train

pytestmark = pytest.mark.any_backend

ODD_COUNTS: Any = collections.Counter()
ODD_COUNTS["a"] = "text"


def test_a_training_run_comes_back(repo: Repo) -> None:
    states = train(3)
    for state in states:
        entry = repo.commit(state, step=state["step"], metrics={"loss": 1 / state["step"]})
        assert entry.exact
    assert [e.step for e in repo.log()] == [3, 2, 1]
    assert repo.log()[0].metrics == {"loss": 1 / 3}
    assert repo.log()[0].message == ""
    for state in states:
        assert same(repo.checkout(state["step"]), state)
    assert same(repo.checkout("best:loss:min"), states[-1])


def test_a_repo_commits_to_the_branch_that_its_head_was_moved_to(repo: Repo) -> None:
    for step in (1, 2):
        repo.commit({"w": np.full(200, step)}, step=step)
    repo.branch("other", 1)
    assert repo.move_head("other") == "other"
    repo.commit({"w": np.full(200, 7)}, step=2)
    assert repo.move_head("main") == "main"
    assert repo.commit({"w": np.full(200, 3)}, step=3).branch == "main"
    assert [entry.step for entry in repo.log(revision="other")] == [2, 1]
    assert [entry.step for entry in repo.log(revision="main")] == [3, 2, 1]
    assert repo.move_head(1) is None
    assert repo.commit({"w": np.full(200, 9)}, step=2).branch == "main-2"


def test_every_plain_python_value_comes_back(repo: Repo) -> None:
    state: dict[Any, Any] = {
        "none": None,
        "flags": [True, False],
        "ints": [0, -1, 1 << 40, -(1 << 70), 255],
        "floats": [1.5, float("inf"), float("nan"), -0.0],
        "text": "é\ud800\n",
        "bytes": b"\x00\xff",
        "tuple": (1, (2, ()), []),
        7: "int key",
        "empty": {},
        "ordered": collections.OrderedDict(b=1, a=2),
        "set": {"b", 1, 2.5, None},
        "size": torch.Size([3, 4]),
        "counter": collections.Counter({4: 2, 2: 1}),
        "float keys": {0.5: torch.ones(300), 0.25: torch.zeros(300), float("inf"): 1},
        "array": np.arange(2000, dtype=np.float64).reshape(40, 50).T,
        "small array": np.array([[1, 2]], dtype=np.uint16),
        "zero-d": torch.tensor(3),
        "no elements": torch.empty(0, 4),
        "bf16": torch.randn(300).bfloat16(),
        "float8": torch.randn(300).to(torch.float8_e4m3fn),
        "bool": torch.rand(300) > 0.5,
    }
    repo.commit(state, step=1)
    back = repo.checkout(1)
    assert same(back, state | {"array": np.ascontiguousarray(state["array"])})
    assert np.array_equal(back["array"], state["array"])


def test_versions_of_modules_come_back(repo: Repo, tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        _version = 2  # which has the logarithm

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([2.0]))

        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            if local.get("version", 1) < 2:
                state[f"{prefix}scale"] = state[f"{prefix}scale"].log()
            super()._load_from_state_dict(state, prefix, local, *rest)

    def metadata(state: Any) -> Any:
        return state._metadata

    model, other = torch.nn.Sequential(Scaled()), torch.nn.Sequential(scaled := Scaled())
    repo.commit(model=model, step=1)
    torch.nn.init.zeros_(scaled.scale)
    versions = metadata(model.state_dict())
    assert metadata(repo.checkout(1, into=other)["model"]) == versions
    assert scaled.scale.item() == 2
    torch.save(model.state_dict(), tmp_path / "step-2.pt")
    repo.commit_path(tmp_path / "step-2.pt", message="")
    assert metadata(repo.checkout(2)) == versions
    repo.checkout_files(repo.resolve(1), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    assert metadata(loaded) == versions


def test_shared_storage_and_strides(repo: Repo) -> None:
    base = torch.randn(30, 40)
    state = {"base": base, "view": base[3:9, ::2], "transposed": base.T, "tied": base}
    repo.commit(state)
    back = repo.checkout("HEAD")
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        assert back[name].stride() == tensor.stride()
    storages = {t.untyped_storage().data_ptr() for t in back.values()}
    assert len(storages) == 1
    back["base"][3, 0] = 99
    assert back["view"][0, 0] == 99


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {"b": object()}}, "a.b"),
        ({"a": [1, {1, (2, 3)}]}, "a.1"),
        ({"a": ODD_COUNTS}, "at a"),
        ({"a": {1 << 60: 2}}, "at a"),
        ({"args": argparse.Namespace()}, "args"),
        ({"s": torch.eye(3).to_sparse()}, "s"),
        ({"a": np.array(["text"])}, "a"),
        ({"n": np.int64(3)}, "n"),
        ({"c": 1j}, "c"),
        ({("tuple", "key"): 1}, "its top"),
    ],
)
def test_anything_else_is_refused_by_its_path(repo: Repo, value: Any, path: str) -> None:
    with pytest.raises(InvalidInputError, match=path):
        repo.commit(value)
    assert repo.log() == []


def test_a_state_checks_out_to_a_file_that_torch_reads(repo: Repo, tmp_path: Path) -> None:
    state = train(1)[0] | {"bytes": b"\xffx", "f8": torch.ones(300).to(torch.float8_e5m2)}
    repo.commit(state, step=5)
    done = repo.checkout_files(repo.resolve(5), tmp_path / "state.pt")
    assert done.exact
    assert same(torch.load(tmp_path / "state.pt", weights_only=True)["model"], state["model"])
    mapped = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    assert torch.equal(mapped["f8"].float(), state["f8"].float())


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20)
)
plain: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        leaves
        | st.lists(plain, max_size=3)
        | st.tuples(plain, plain)
        | st.dictionaries(st.text(), plain, max_size=3)
    )
)


@given(plain)
def test_pickles_are_what_torch_accepts(value: Any) -> None:
    import io
    import pickle

    data = dump_pickle(value, lambda _, __: None)
    assert same(pickle.loads(data), value)
    checkpoint: Checkpoint = state_checkpoint({"v": value})
    source = checkpoint.files[0].source
    back = torch.load(io.BytesIO(source.read(0, source.size)), weights_only=True)
    assert same(back["v"], value)


def test_two_writers(repo: Repo) -> None:
    other = Repo.open(repo.root)
    repo.commit({"a": 1}, step=1)
    other.commit({"a": 2}, step=2)
    repo.commit({"a": 3}, step=3)
    assert [e.commit.step for e in other.log()] == [3, 2, 1]
    head = handle(repo).refs.read("heads/main")
    handle(repo).refs.publish("heads/main", head, commit=None, time="t", action="test")
    with pytest.raises(ConflictError):
        handle(other).refs.publish("heads/main", head, commit=None, time="t", action="test")


def test_a_repository_opens_from_its_root_or_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError):
        Repo.open(tmp_path)
    repo = Repo.init(tmp_path)
    assert Repo.open(tmp_path).folder == Repo.open(tmp_path / ".ckpt").folder == repo.folder
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert Repo.open(Repo.locate()).log() == []


def test_a_checkout_elsewhere_does_not_fork_a_trainer(repo: Repo) -> None:
    for step in (1, 2):
        repo.commit({"x": step}, step=step)
    other = Repo.open(repo.root)
    move_head(handle(other), other.resolve(1), None)
    repo.commit({"x": 3}, step=3)
    main = handle(repo).revisions.branch("main")
    assert main is not None
    assert handle(repo).catalog.commit(main).step == 3
    assert [e.commit.step for e in repo.log(revision="main")] == [3, 2, 1]


def test_content_that_was_there_before_is_found_again(repo: Repo) -> None:
    states = train(4)
    first = [repo.commit(state, step=n) for n, state in enumerate(states, start=1)]
    again = repo.commit(states[1], step=5)
    assert again.commit.data_bytes == 0
    assert again.commit.parts == first[1].commit.parts
    assert (again.commit.kind, again.commit.depth) == (first[1].commit.kind, first[1].commit.depth)
    assert same(repo.checkout(5), states[1])
    repo.commit(states[0] | {"step": 9}, step=9)
    assert not repo.verify().damage


@pytest.mark.parametrize("step", [1.5, True, -1, "7", 1 << 62, torch.ones(2)])
def test_steps_that_are_none(repo: Repo, step: Any) -> None:
    with pytest.raises(InvalidInputError, match="step"):
        repo.commit({"x": 1}, step=step)
    assert repo.log() == []


@pytest.mark.parametrize("value", [True, "x", None, 10**400, [1]])
def test_metrics_that_are_none(repo: Repo, value: Any) -> None:
    with pytest.raises(InvalidInputError, match="metric 'a'"):
        repo.commit({"x": 1}, metrics={"a": value})
    with pytest.raises(InvalidInputError, match="message"):
        repo.commit({"x": 1}, message=value if value != "x" else 5)  # type: ignore[arg-type]
    assert repo.log() == []


def test_numbers_of_numpy_and_torch_are_taken(repo: Repo) -> None:
    metrics = {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": float("inf")}
    made = repo.commit({"x": 1}, step=np.int64(7), metrics=metrics)  # type: ignore[arg-type]
    assert made.commit.step == 7
    assert dict(repo.log()[0].commit.metrics) == {"a": 0.5, "b": 2.0, "c": float("inf")}


@pytest.mark.parametrize(
    "value",
    [
        np.ma.array([1, 2], mask=[False, True]),
        collections.defaultdict(int),
        frozenset((1,)),
        np.float64(1.5),
        torch.nn.parameter.UninitializedParameter(),
    ],
)
def test_what_would_come_back_as_something_else_is_refused(repo: Repo, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"deep\.x"):
        repo.commit({"deep": {"x": value}})


@pytest.mark.parametrize("state", [None, 5, "text", [1], torch.ones(3)])
def test_any_state(repo: Repo, state: Any) -> None:
    repo.commit(state)
    assert same(repo.checkout("HEAD"), state)


@pytest.mark.directory_only
def test_a_working_directory_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (two, one):
        folder.mkdir()
        monkeypatch.chdir(folder)
        repo = Repo.init("runs")
        repo.commit({"x": 1}, step=1)
    monkeypatch.chdir(two)
    repo.commit({"x": 2}, step=2)
    repo.commit_async({"x": 3}, step=3).result()
    repo.close()
    assert [entry.step for entry in Repo.open(one / "runs").log()] == [3, 2, 1]
    assert [entry.step for entry in Repo.open("runs").log()] == [1]


@pytest.mark.parametrize(
    "moment",
    [
        "ckptvcs.history.refs.Refs.publish",
        "ckptvcs.ops.repository.write_format",
        "ckptvcs.store.disk.replace",
    ],
)
def test_processes_that_make_the_same_repository(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pkgutil.resolve_name(moment)
    made: list[Repo] = []

    def beside(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        made.append(Repo.init(tmp_path))
        made[0].commit({"x": 1}, step=1)
        return real(*args, **options)

    monkeypatch.setattr(moment, beside)
    repo = Repo.init(tmp_path)
    assert made
    assert repo.commit({"x": 2}, step=2).step == 2
    assert [entry.step for entry in repo.log()] == [2, 1]
    assert not repo.verify().damage


@pytest.mark.directory_only
def test_a_repository_made_again_at_the_same_path(tmp_path: Path) -> None:
    state = train(1)[0]
    for _ in range(2):
        repo = Repo.init(tmp_path / "again", codec="lossless")
        repo.commit(state, step=1)
        assert same(repo.checkout(1), state)
        assert not repo.verify().damage
        shutil.rmtree(tmp_path / "again")


def test_an_id_without_letters_is_found(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    name = repo.commit({"w": torch.zeros(3)}, step=7).id
    ids = handle(repo).catalog.store.ids
    monkeypatch.setattr(
        handle(repo).catalog.store,
        "ids",
        lambda kind, prefix: [name] if prefix == "12345678" else ids(kind, prefix),
    )
    assert repo.resolve("12345678") == name
    with pytest.raises(NotFoundError):
        repo.resolve("1234567")
    with pytest.raises(NotFoundError):
        repo.resolve("1" * 30)


def test_a_file_with_tensors_without_elements(repo: Repo, tmp_path: Path) -> None:
    """They come back as others do, under their whole names; so does a part that holds no others."""
    state = {"a:b": torch.empty(0, 3), "c": torch.ones(2, dtype=torch.float16), "d": torch.empty(0)}
    save_file(state, tmp_path / "model.safetensors")
    name = repo.commit_path(tmp_path / "model.safetensors", message="").id
    assert same(dict(sorted(repo.checkout("HEAD").items())), state)
    assert save_part(handle(repo), name, "model", tmp_path / "model.pt", require="exact") == "exact"
    assert same(dict(sorted(torch.load(tmp_path / "model.pt").items())), state)


@pytest.mark.parametrize("shape", [[2**40, 2**40, 0], [2**55] * 9 + [0]])
def test_a_shape_that_no_tensor_can_have(shape: list[int], repo: Repo, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    name = repo.commit_path(path, message="").id
    with pytest.raises(InvalidInputError, match="shape"):
        repo.checkout("HEAD")
    with pytest.raises(InvalidInputError, match="shape"):
        repo.tensor("w")
    repo.checkout_files(name, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_progress_counts_the_bytes_of_both_passes(tmp_path: Path) -> None:
    class Passes:
        """A progress that tells the passes of a commit apart."""

        read = encoded = 0

        def __call__(self, count: int) -> None:
            self.encoded += count

        def reading(self, count: int) -> None:
            assert self.encoded == 0
            self.read += count

    path = tmp_path / "m.pt"
    torch.save({"w": torch.randn(300, 300)}, path)
    passes = Passes()
    Repo.init(tmp_path).commit_path(path, message="x", progress=passes)
    assert passes.read == path.stat().st_size
    assert passes.encoded == 4 * 300 * 300
