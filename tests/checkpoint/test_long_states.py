"""However much a state holds besides its tensors, it comes back, and its weights are near."""

from __future__ import annotations

import pickle
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.pickle_reader import Inert
from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.decode.part_reader import PartReader
from ckptvcs.errors import InvalidInputError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.profiles import short


def nested(levels: int) -> Any:
    value: Any = 7
    for level in range(levels):
        value = {"k": value} if level % 2 else [value]
    return value


def permutation() -> list[int]:
    return random.Random(0).sample(range(1_000_000), 1_000_000)


LONG: dict[str, Callable[[], Any]] = {
    "permutation": permutation,
    "history": lambda: [{"step": i, "loss": 1 / (i + 1)} for i in range(30_000)],
    "tuple": lambda: tuple(i / 3 for i in range(300_000)),
    "pairs": lambda: [(i, str(i)) for i in range(100_000)],
    "wide": lambda: dict.fromkeys(range(300_000)),
    "deep": lambda: nested(900),
    "empty": lambda: [[] for _ in range(40_000)] + [{} for _ in range(40_000)],
    "set": lambda: set(range(300_000)),
    "counter": lambda: Counter({str(i): i for i in range(60_000)}),
    "bytes": lambda: random.Random(0).randbytes(3_000_000) * 23,  # above the 64 MiB of before
    "text": lambda: "a\u00e9\U0001f600" * 1_000_000,
}


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in kind and content, however deep they are."""
    left = [(a, b)]
    while left:
        one, other = left.pop()
        if type(one) is not type(other):
            return False
        if isinstance(one, dict) and not isinstance(one, Counter):
            if [*one] != [*other]:
                return False
            left += zip(one.values(), other.values(), strict=True)
        elif isinstance(one, list | tuple):
            if len(one) != len(other):
                return False
            left += zip(one, other, strict=True)
        elif isinstance(one, torch.Tensor):
            if not torch.equal(one, other):
                return False
        elif one != other:
            return False
    return True


@pytest.mark.parametrize("name", short(LONG, ["history", "deep"]))
def test_a_state_comes_back(name: str, tmp_path: Path) -> None:
    repo, value = Repo.init(tmp_path), LONG[name]()
    repo.commit({"model": {"w": torch.ones(50, 50)}, "rest": value}, step=1)
    state = repo.checkout(1)
    assert same(state["rest"], value)
    assert torch.equal(state["model"]["w"], torch.ones(50, 50))


@pytest.mark.parametrize(
    ("protocol", "zipped"), short([(2, True), (5, False), (5, True), (2, False)], [(5, False)])
)
def test_a_file_has_named_tensors(zipped: bool, protocol: int, tmp_path: Path) -> None:
    value = {
        "model": {"w": torch.randn(50, 50)},
        "order": permutation()[:100_000],
        "deep": nested(250),
    }
    path = tmp_path / "a.pt"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    made = open_checkpoint(path)
    assert made.schema.tensors[0].name == "model.w"
    assert not made.notes
    repo = Repo.init(tmp_path / "repo")
    repo.commit_path(path, message="", step=1)
    assert same(repo.checkout(1), value)


@pytest.mark.slow
def test_weights_beside_a_long_list_are_near(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    weight, history, sizes = torch.randn(400, 400), [], []
    for step in range(1, 5):
        weight = weight + 1e-4 * torch.randn(400, 400)
        history += [{"step": i, "loss": 1.0} for i in range(8_000)]
        sizes.append(repo.commit({"model": {"w": weight}, "history": history}, step=step))
    assert [entry.fidelity["model"] for entry in sizes[:1]] == ["exact"]
    entry = repo.entry(repo.resolve(2))
    assert entry.fidelity["model"] == "near"
    assert entry.commit.data_bytes < weight.nbytes / 4
    assert repo.checkout(4)["history"] == history


@pytest.mark.slow
def test_a_numpy_array_of_objects_hides_no_tensors(tmp_path: Path) -> None:
    value: dict[str, Any] = {
        "model": {"w": torch.randn(50, 50)},
        "objects": np.array([{"a": i} for i in range(20_000)], dtype=object),
        "numbers": np.arange(10_000_000),  # 80 MB of a pickle
    }
    torch.save(value, tmp_path / "a.pt")
    made = open_checkpoint(tmp_path / "a.pt")
    assert "model.w" in [info.name for info in made.schema.tensors]
    repo = Repo.init(tmp_path / "repo")
    repo.commit_path(tmp_path / "a.pt", message="", step=1)
    state = repo.checkout(1)
    assert torch.equal(state["model"]["w"], value["model"]["w"])
    assert isinstance(state["objects"], Inert)
    assert state["objects"].state[4][19_999] == {"a": 19_999}


def test_a_state_with_too_much_beside_its_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptvcs.checkpoint import torch_writer

    monkeypatch.setattr(torch_writer, "MAX_PICKLE_BYTES", 1 << 20)
    with pytest.raises(InvalidInputError, match="besides its tensors, up to text") as refused:
        state_checkpoint({"list": [0.5], "text": "x" * (1 << 20)})
    assert refused.value.hint
    with pytest.raises(InvalidInputError, match="nested too deeply"):
        state_checkpoint(nested(1100))


def test_what_holds_itself_is_refused() -> None:
    row: list[Any] = []
    row.append(row)
    with pytest.raises(InvalidInputError, match="nested too deeply"):
        state_checkpoint({"row": row})


def test_lists_and_dicts_that_hold_themselves_come_back(tmp_path: Path) -> None:
    row: list[Any] = [1]
    row.append((row, {"row": row}))
    torch.save({"row": row, "w": torch.ones(3)}, tmp_path / "a.pt")
    repo = Repo.init(tmp_path / "repo")
    repo.commit_path(tmp_path / "a.pt", message="", step=1)
    back = repo.checkout(1)["row"]
    assert back[1][0] is back
    assert back[1][1]["row"] is back


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.just(torch.arange(5)),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(-5, 1 << 50), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
        | st.sets(st.integers(0, 99) | st.text())
    ),
    max_leaves=40,
)


@given(plain)
def test_any_state_comes_back(value: Any) -> None:
    from ckptvcs.checkpoint import torch_zip
    from ckptvcs.checkpoint.state import fill

    source = state_checkpoint(value).files[0].source
    layout = torch_zip.parse(source)
    assert layout is not None
    places = {found.key: found for found in layout.tensors}

    def data(ref: Any) -> np.ndarray[Any, Any]:
        found = places[ref.storage.key]
        return np.frombuffer(source.read(found.offset, found.size), np.uint8).copy()

    assert same(fill(layout.tree, data, layout.arrays), value)


def test_a_state_whose_structure_was_lost_is_not_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pickle cannot be read any more, that is said."""
    repo = Repo.init(tmp_path)
    made = repo.commit({"w": torch.ones(300), "x": [1]}, step=1)
    none = repo.commit(None, step=2)
    assert repo.checkout(none.id) is None

    def fail(*_: object) -> None:
        raise pickle.UnpicklingError("its objects take too much memory")

    monkeypatch.setattr("ckptvcs.checkpoint.torch_zip.read_pickle", fail)
    with pytest.raises(InvalidInputError, match="too much memory") as refused:
        PartReader(handle(repo).restorer(made.id)).state()
    assert "ckpt checkout" in (refused.value.hint or "")
