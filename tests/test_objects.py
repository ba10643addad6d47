"""Modules and optimizers: committed as they are, loaded in place, and their pairs known exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptvcs import InvalidInputError, NotFoundError, Repo
from tests.test_api import same


def _model() -> torch.nn.Sequential:
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(40, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
    )


def _grouped(model: torch.nn.Module) -> torch.optim.AdamW:
    """Two groups, as trainers have them, in an order that no file tells."""
    named = dict(model.named_parameters())
    rows = [["3.weight", "0.weight"], ["2.bias", "2.weight", "0.bias", "3.bias"]]
    groups: list[dict[str, Any]] = [{"params": [named[name] for name in row]} for row in rows]
    groups[0]["weight_decay"] = 0.1
    return torch.optim.AdamW(groups)


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        loss = model(torch.randn(8, 40)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_moments_are_paired_with_their_weights(repo: Repo) -> None:
    model = _model()
    optimizer = _grouped(model)
    _train(model, optimizer, range(3))
    entry = repo.commit(model=model, optimizer=optimizer, step=3)
    tensors = repo.catalog.schema(entry.commit.schema).tensors
    pairs = {info.name: tensors[info.pair].name for info in tensors if info.pair is not None}
    order = ["3.weight", "0.weight", "2.bias", "2.weight", "0.bias", "3.bias"]
    assert pairs == {
        f"optimizer.state.{number}.{moment}": f"model.{name}"
        for number, name in enumerate(order) for moment in ("exp_avg", "exp_avg_sq")
    }  # fmt: skip
    again = repo.commit({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step=4)
    assert not any(i.pair is not None for i in repo.catalog.schema(again.commit.schema).tensors)


def test_training_goes_on_from_a_commit(repo: Repo) -> None:
    model = _model()
    optimizer = _grouped(model)
    _train(model, optimizer, range(3))
    repo.commit(model=model, optimizer=optimizer, step=3, extra={"epoch": 1})
    other = _model()
    other_optimizer = _grouped(other)
    weight = other[0].weight
    state = repo.checkout(3, into=(other, other_optimizer))
    assert state["epoch"] == 1
    assert other[0].weight is weight  # in place
    for one, two in ((model, optimizer), (other, other_optimizer)):
        _train(one, two, range(3, 6))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


def test_several_optimizers_and_objects_by_key(repo: Repo) -> None:
    model = _model()
    optimizers = [torch.optim.SGD(layer.parameters(), 0.1, 0.9) for layer in (model[0], model[2])]
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 1) for one in optimizers]
    for one, two in zip(optimizers, schedulers, strict=True):
        _train(model, one, range(2))
        two.step()
    extra = {"scheduler": schedulers[0].state_dict()}
    repo.commit(model=model, optimizer=optimizers, extra=extra, step=1)
    other = _model()
    row = [torch.optim.SGD(layer.parameters(), 0.5) for layer in (other[0], other[2])]
    repo.checkout(into=(other, *row))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert [one.state_dict()["state"].keys() for one in row] == [{0, 1}, {0, 1}]
    scheduler = torch.optim.lr_scheduler.StepLR(row[0], 1)
    repo.checkout(into={"scheduler": scheduler, "model": other})
    assert scheduler.last_epoch == schedulers[0].last_epoch


@pytest.mark.parametrize("given", [
    {}, {"extra": {"a": 1}}, {"model": 3}, {"optimizer": [3]},
    {"model": torch.nn.Linear(2, 2), "extra": {"model": 1}},
    {"state": {"a": 1}, "model": torch.nn.Linear(2, 2)}, {"state": {"a": 1}, "extra": {"b": 1}},
])  # fmt: skip
def test_what_cannot_be_committed(repo: Repo, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        repo.commit(**given)
    assert not repo.log()


def test_what_cannot_be_loaded(repo: Repo) -> None:
    repo.commit(model=torch.nn.Linear(2, 2), step=1)
    with pytest.raises(InvalidInputError, match="does not fit"):
        repo.checkout(into=torch.nn.Linear(3, 2))
    with pytest.raises(NotFoundError, match="holds no 'optimizer'"):
        repo.checkout(into=(model := torch.nn.Linear(2, 2), torch.optim.SGD(model.parameters())))
    with pytest.raises(InvalidInputError, match="one module"):
        repo.checkout(into=(model, model))


def test_nothing_is_loaded_where_something_does_not_fit(repo: Repo) -> None:
    model = _model()
    optimizer = _grouped(model)
    _train(model, optimizer, range(2))
    repo.commit(model=model, optimizer=optimizer, step=1)
    other = _model()
    before = [weight.clone() for weight in other.parameters()]
    reordered = torch.optim.AdamW([*other.parameters()][::-1])
    wider = torch.nn.Sequential(*[*other][:-1], torch.nn.Linear(40, 41))
    for into, why in (
        (wider, "size mismatch"), ({"model": other, "ema": other}, "holds no 'ema'"),
        ((other, torch.optim.SGD(other.parameters(), 0.1)), r"groups of \[2, 4\] parameters"),
        ((other, [reordered, reordered]), "holds 1 of 'optimizer'"),
        ({"model": other, "optimizer": other}, "does not fit"),
    ):  # fmt: skip
        with pytest.raises((InvalidInputError, NotFoundError), match=why) as refused:
            repo.checkout(1, into=into)
        assert "\n" not in str(refused.value)
        assert all(map(torch.equal, before, other.parameters()))


def test_moments_of_other_parameters(repo: Repo) -> None:
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    _train(model, optimizer, range(2))
    repo.commit(model=model, optimizer=optimizer, step=1)
    moved = torch.optim.AdamW([model.bias, model.weight])
    with pytest.raises(InvalidInputError, match=r"exp_avg 0 is \[40, 40\], its parameter \[40\]"):
        repo.checkout(1, into=moved)
    assert not moved.state


@pytest.mark.parametrize("as_row", [False, True])
def test_one_optimizer_in_a_row(as_row: bool, repo: Repo) -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    _train(model, optimizer, range(2))
    repo.commit(model=model, optimizer=[optimizer] if as_row else optimizer, step=1)
    for given in ("alone", "row", "key"):
        other = _model()
        fresh = torch.optim.AdamW(other.parameters())
        into = {"alone": (other, fresh), "row": (other, [fresh]), "key": {"optimizer": [fresh]}}
        repo.checkout(1, into=into[given])
        assert same(fresh.state_dict(), optimizer.state_dict())


def test_a_compiled_model_says_so(repo: Repo) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    repo.commit(model=Wrapped(_model()), step=1)
    with pytest.raises(InvalidInputError) as refused:
        repo.checkout(1, into=_model())
    assert refused.value.hint == "it was wrapped when it was committed: commit model._orig_mod"
