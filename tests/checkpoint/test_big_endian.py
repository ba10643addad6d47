"""Files of big-endian machines are exact, and their numbers are right wherever they are shown."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.decode.part_reader import PartReader, windows
from ckptvcs.errors import InvalidInputError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.checkpoints import save_big
from tests.helpers.comparing import same
from tests.helpers.training import train

WORDS = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "complex64": 4,
    "complex128": 8,
    "uint8": 1,
    "bool": 1,
}


def every_type() -> dict[str, Any]:
    torch.manual_seed(0)
    state: dict[str, Any] = {}
    for name, word in WORDS.items():
        dtype: torch.dtype = getattr(torch, name)
        low = torch.randint(0, 2 if name == "bool" else 100, (40 * 16 * word,), dtype=torch.uint8)
        state[name] = low.view(dtype)[: 40 * 8].reshape(40, 8)
        state[f"{name}.small"] = state[name][:1].clone()
        state[f"{name}.turned"] = state[name].T
    state["empty"] = torch.empty(0, 3)
    return state


def test_the_oracle_is_torch(tmp_path: Path) -> None:
    save_big(every_type(), tmp_path / "a.pt")
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), every_type())


@pytest.mark.parametrize("codec", ["near", "lossless"])
def test_numbers_are_right_and_files_exact(codec: str, tmp_path: Path) -> None:
    state, path = every_type(), tmp_path / "a.pt"
    save_big({"model": state}, path)
    repo = Repo.init(tmp_path / "repo", codec=codec)
    made = repo.commit_path(path, message="", step=1)
    (note,) = made.notes
    assert note.startswith("a.pt: big-endian numbers; ")
    assert note.endswith("of tensors stored exactly, not near")
    assert same(repo.checkout(1)["model"], state)
    repo.checkout_files(made.id, tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == path.read_bytes()
    for name in ("float32", "int64.small", "complex64.turned", "bfloat16"):
        assert torch.equal(repo.tensor(f"model.{name}", at=1), state[name])
    reader = PartReader(handle(repo).restorer(made.id))
    found = windows(reader.schema)
    for name, value in state.items():
        data = reader.window(found[f"model.{name}"])
        assert data == value.contiguous().view(torch.uint8).numpy().tobytes()
    reader.save("model", tmp_path / "model.pt")
    assert same(torch.load(tmp_path / "model.pt", weights_only=True)["model"], state)
    assert repo.verify().damage == []


def test_training_on_such_a_machine_stays_exact(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    states = train(4)
    for step, state in enumerate(states, start=1):
        save_big(state, tmp_path / "a.pt")
        repo.commit_path(tmp_path / "a.pt", message="", step=step)
    for step, state in enumerate(states, start=1):
        assert repo.entry(repo.resolve(step)).exact
        assert same(repo.checkout(step), state)
    trajectory = [state["model.0.weight"] for _, state in repo.trajectory("model.0.weight")]
    assert all(
        torch.equal(one, state["model"]["0.weight"])
        for one, state in zip(trajectory, states, strict=True)
    )


def test_differences_are_those_of_the_numbers(tmp_path: Path) -> None:
    repo, state = Repo.init(tmp_path / "repo", codec="lossless"), train(2)
    save_big(state[0], tmp_path / "a.pt")
    repo.commit_path(tmp_path / "a.pt", message="", step=1)
    torch.save(state[0], tmp_path / "a.pt")
    repo.commit_path(tmp_path / "a.pt", message="", step=2)
    save_big(state[1], tmp_path / "a.pt")
    repo.commit_path(tmp_path / "a.pt", message="", step=3)
    nothing = repo.diff(1, 2)
    assert all(row.sums.norm_difference == 0 for row in nothing.tensors)
    (row,) = [row for row in repo.diff(2, 3).tensors if row.info.name == "model.0.weight"]
    moved = state[1]["model"]["0.weight"].double() - state[0]["model"]["0.weight"].double()
    assert row.sums.norm_difference == pytest.approx(float(moved.norm()))


@pytest.mark.parametrize("what", ["middle", "twice", "legacy"])
def test_an_order_that_is_not_known_is_exact_and_refused(what: str, tmp_path: Path) -> None:
    state, path = (
        {"w": torch.randn(50, 50), "bytes": torch.ones(300, dtype=torch.uint8)},
        (tmp_path / "a.pt"),
    )
    if what == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        assert data.count(b"little_endianq\x02\x88") == 1
        path.write_bytes(data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    elif what == "middle":
        save_big(state, path, b"middle")
    else:
        save_big(state, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("b/byteorder", "little")
    repo = Repo.init(tmp_path / "repo")
    made = repo.commit_path(path, message="", step=1)
    (note,) = made.notes
    assert "unknown order" in note
    assert made.commit.error.weight_rel == 0
    reader = PartReader(handle(repo).restorer(made.id))
    found = windows(reader.schema)
    for read in (
        lambda: repo.checkout(1),
        lambda: repo.tensor("w", at=1),
        lambda: reader.window(found["w"]),
        lambda: reader.save("model", tmp_path / "m.pt"),
        lambda: reader.save("model", tmp_path / "m.safetensors"),
    ):
        with pytest.raises(InvalidInputError, match="big-endian machine") as refused:
            read()
        assert "ckpt checkout" in (refused.value.hint or "")
    assert reader.window(found["bytes"]) == b"\1" * 300
    repo.checkout_files(made.id, tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == path.read_bytes()


def test_moments_and_weights_of_such_files_are_not_near(tmp_path: Path) -> None:
    save_big(train(2)[1], tmp_path / "a.pt")
    made = open_checkpoint(tmp_path / "a.pt")
    wide = [info for info in made.schema.tensors if info.type.word > 1]
    assert {(info.order, info.role, info.pair) for info in wide} == {("big", "other", None)}
    assert not made.rules


def test_a_search_for_nan_sees_their_numbers(tmp_path: Path) -> None:
    from ckptvcs.ops.finite import all_finite

    repo, weight = Repo.init(tmp_path / "repo"), torch.ones(50, 50)
    for step, value in enumerate([1.0, float("nan")], start=1):
        weight[3, 4] = value
        save_big({"model": {"w": weight}}, tmp_path / "a.pt")
        made = repo.commit_path(tmp_path / "a.pt", message="", step=step)
        assert all_finite(handle(repo).catalog, handle(repo).restorer(made.id), set()) == (
            step == 1
        )
