"""Modules and optimizers: committed as they are, loaded in place, and their pairs known exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptvcs import InvalidInputError, NotFoundError, Repo
from ckptvcs.ops.history_reader import handle
from tests.helpers.comparing import same

pytestmark = pytest.mark.any_backend


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
    tensors = handle(repo).catalog.schema(entry.commit.schema).tensors
    pairs = {info.name: tensors[info.pair].name for info in tensors if info.pair is not None}
    order = ["3.weight", "0.weight", "2.bias", "2.weight", "0.bias", "3.bias"]
    assert pairs == {
        f"optimizer.state.{number}.{moment}": f"model.{name}"
        for number, name in enumerate(order)
        for moment in ("exp_avg", "exp_avg_sq")
    }
    again = repo.commit({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step=4)
    assert not any(
        i.pair is not None for i in handle(repo).catalog.schema(again.commit.schema).tensors
    )


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


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"extra": {"a": 1}},
        {"model": 3},
        {"optimizer": [3]},
        {"model": torch.nn.Linear(2, 2), "extra": {"model": 1}},
        {"state": {"a": 1}, "model": torch.nn.Linear(2, 2)},
        {"state": {"a": 1}, "extra": {"b": 1}},
    ],
)
def test_what_cannot_be_committed(repo: Repo, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        repo.commit(**given)
    assert not repo.log()


def test_what_cannot_be_loaded(repo: Repo) -> None:
    repo.commit(model=torch.nn.Linear(2, 2), step=1)
    with pytest.raises(InvalidInputError, match="does not fit"):
        repo.checkout(into=torch.nn.Linear(3, 2))
    with pytest.raises(NotFoundError, match="has no 'optimizer'"):
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
        (wider, "size mismatch"),
        ({"model": other, "ema": other}, "has no 'ema'"),
        ((other, torch.optim.SGD(other.parameters(), 0.1)), r"groups have \[2, 4\] parameters"),
        ((other, [reordered, reordered]), "states: 1, not 2"),
        ({"model": other, "optimizer": other}, "does not fit"),
    ):
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
    with pytest.raises(
        InvalidInputError, match=r"exp_avg 0 has shape \[40, 40\], its parameter \[40\]"
    ):
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
    assert (
        refused.value.hint
        == "commit model._orig_mod: this commit has the names of the wrapped model"
    )


# -- states of all shapes and types ----------------------------------------------------------------


class Rounded(torch.optim.Optimizer):
    """Keeps what torch's own way of loading would cast: float32 and float64 averages of bfloat16
    weights, codes, a mask, a count above what bfloat16 can hold, and rows of these.
    """

    def __init__(self, weights: Any) -> None:
        super().__init__(weights, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weight in self.param_groups[0]["params"]:
            state, grad = self.state[weight], weight.grad.double()
            state["step"] = state.get("step", torch.tensor(0.0)) + 1
            state["exp_avg"] = 0.9 * state.get("exp_avg", 0) + 0.1 * grad.float()
            state["fine"] = 0.9 * state.get("fine", 0) + grad
            state["codes"] = (grad * 1e4).to(torch.uint8)
            state["mask"] = grad > 0
            state["count"] = torch.tensor(16_777_217)
            state["factors"] = [state["fine"].sum(-1), {"deep": state["exp_avg"].flatten()[:7]}]
            state["pair"] = (state["exp_avg"].half(), 3)
            weight.sub_(0.01 * state["exp_avg"].to(weight.dtype))


class Converting(Rounded):
    """Does with what it has loaded what it likes."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            assert state["exp_avg"].dtype == torch.float32
            state["exp_avg"] = state["exp_avg"].half()


class Wrapper:
    """As accelerate has it around an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)


class Parallel(torch.nn.Module):
    """As DistributedDataParallel has it around a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, given: torch.Tensor) -> Any:
        return self.module(given)


def _exactly(one: Any, other: Any) -> bool:
    """Equal in kind, type and bits."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_exactly(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(_exactly, one, other))
    return bool(type(one) is type(other) and one == other)


def _rounded(kind: Any = Rounded) -> tuple[torch.nn.Sequential, Any]:
    model = _model().bfloat16()
    return model, kind(model.parameters())


def _steps(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 40).bfloat16()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["plain", "wrapped", "parallel", "row", "dict", "by key", "deep"])
def test_states_keep_their_types(how: str, repo: Repo) -> None:
    model, optimizer = _rounded()
    _steps(model, optimizer, range(3))
    given: Any = {"row": [optimizer], "dict": {"a": optimizer}, "deep": {"a": optimizer}}
    net = Parallel(model) if how == "parallel" else model
    repo.commit(model=net, optimizer=given.get(how, optimizer), step=3)
    other, fresh = _rounded()
    into: dict[str, Any] = {
        "plain": (other, fresh),
        "wrapped": (other, Wrapper(fresh)),
        "parallel": (Parallel(other), fresh),
        "row": (other, [fresh]),
        "dict": (other, {"a": fresh}),
        "by key": {"optimizer": fresh, "model": other},
        "deep": {"optimizer": {"a": fresh}, "model": other},
    }
    repo.checkout(3, into=into[how])
    assert _exactly(fresh.state_dict(), optimizer.state_dict())
    assert _exactly(dict(other.state_dict()), dict(model.state_dict()))
    assert not fresh._optimizer_load_state_dict_pre_hooks
    assert not fresh._optimizer_load_state_dict_post_hooks
    for one, two in ((model, optimizer), (other, fresh)):
        _steps(one, two, range(3, 6))
    assert _exactly(fresh.state_dict(), optimizer.state_dict())


def test_what_an_optimizer_does_with_what_it_has_loaded_stays_done(repo: Repo) -> None:
    model, optimizer = _rounded()
    _steps(model, optimizer, range(2))
    repo.commit(model=model, optimizer=optimizer, step=2)
    other, fresh = _rounded(Converting)
    repo.checkout(2, into=(other, fresh))
    loaded = fresh.state[other.get_parameter("0.weight")]
    assert loaded["exp_avg"].dtype == torch.float16
    assert _exactly(loaded["fine"], optimizer.state[model[0].weight]["fine"])


def test_hooks_of_others_see_what_they_saw_before(repo: Repo) -> None:
    model, optimizer = _rounded()
    _steps(model, optimizer, range(2))
    repo.commit(model=model, optimizer=optimizer, step=2)
    other, fresh = _rounded()
    seen, first = [], other.get_parameter("0.weight")

    def renamed(_: Any, state: Any) -> Any:
        rows = {n: {f"my_{k}": v for k, v in row.items()} for n, row in state["state"].items()}
        return {**state, "state": rows}

    fresh.register_load_state_dict_pre_hook(renamed)
    fresh.register_load_state_dict_post_hook(
        lambda made: seen.append(made.state[first]["my_exp_avg"].dtype)
    )
    repo.checkout(2, into=(other, fresh))
    assert seen == [torch.float32]
    assert _exactly(fresh.state[first]["my_fine"], optimizer.state[model[0].weight]["fine"])


def test_states_go_to_the_device_of_their_parameters(repo: Repo) -> None:
    model, optimizer = _rounded()
    _steps(model, optimizer, range(2))
    repo.commit(model=model, optimizer=optimizer, step=2)
    other = _model().bfloat16().to("meta")
    fresh = Rounded(other.parameters())
    repo.checkout(2, into={"optimizer": fresh})
    row = fresh.state[other.get_parameter("0.weight")]
    assert {str(row[name].device) for name in ("exp_avg", "fine", "codes", "count")} == {"meta"}
    assert row["exp_avg"].dtype == torch.float32
    assert row["count"].dtype == torch.int64


class Factored(torch.optim.Optimizer):
    """States of every shape but that of their parameter."""

    def __init__(self, weights: Any, kind: str) -> None:
        super().__init__(weights, {"lr": 0.01})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weight in self.param_groups[0]["params"]:
            state, square = self.state[weight], weight.grad.square()
            wide = weight.dim() == 2
            if self.kind == "adafactor" and wide:
                state |= {"exp_avg_sq_row": square.mean(-1), "exp_avg_sq_col": square.mean(-2)}
            elif self.kind == "adafactor":
                state["exp_avg_sq"] = square
            elif self.kind == "unnamed factors":
                state["exp_avg_sq"] = square.mean(-1) if wide else square
            elif self.kind == "low rank" and wide:
                state |= {"exp_avg": weight.grad[:8] + 0, "exp_avg_sq": square[:8] + 0}
            elif self.kind == "scalars":
                state |= {"exp_avg": weight.grad + 0, "exp_avg_sq": square.mean()}
            elif self.kind == "shampoo":
                state |= {
                    "momentum_buffer": weight.grad + 0,
                    "exp_avg_sq": [square.T @ square] if wide else [square],
                }
            else:
                state |= {"exp_avg": weight.grad + 0, "exp_avg_sq": square}


KINDS = ["adafactor", "unnamed factors", "low rank", "scalars", "shampoo", "plain"]


def _shapes(kind: str, *, turned: bool = False) -> tuple[Any, Factored]:
    """A model in which the shape of every factor is also that of some parameter."""
    torch.manual_seed(0)
    model = torch.nn.ParameterList(
        [
            torch.nn.Parameter(torch.randn(shape))
            for shape in [(64, 32), (64,), (32, 64), (32,), (8, 32), (8, 64), (8,), ()]
        ]
    )
    weights = [*model][::-1] if turned else [*model]
    return model, Factored(weights, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_other_shapes_are_loaded(kind: str, repo: Repo) -> None:
    model, optimizer = _shapes(kind)
    sum((weight**3).sum() for weight in model).backward()
    optimizer.step()
    repo.commit(model=model, optimizer=optimizer, step=1)
    other, fresh = _shapes(kind)
    repo.checkout(1, into=(other, fresh))
    assert _exactly(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", ["scalars", "shampoo", "plain"])
def test_another_order_is_refused(kind: str, repo: Repo) -> None:
    model, optimizer = _shapes(kind)
    sum((weight**3).sum() for weight in model).backward()
    optimizer.step()
    repo.commit(model=model, optimizer=optimizer, step=1)
    other, fresh = _shapes(kind, turned=True)
    with pytest.raises(InvalidInputError, match="its parameter"):
        repo.checkout(1, into=(other, fresh))
    assert not fresh.state


def test_another_order_is_refused_where_some_have_no_moments(repo: Repo) -> None:
    model, optimizer = _shapes("plain")
    sum((weight**3).sum() for weight in list(model)[:4]).backward()
    for weight in list(model)[4:]:
        weight.grad = None
    optimizer.param_groups[0]["params"] = list(model)[:4]
    optimizer.step()
    optimizer.param_groups[0]["params"] = list(model)
    repo.commit(model=model, optimizer=optimizer, step=1)
    other, fresh = _shapes("plain", turned=True)
    with pytest.raises(InvalidInputError, match="its parameter"):
        repo.checkout(1, into=(other, fresh))
    other, fresh = _shapes("plain")
    repo.checkout(1, into=(other, fresh))
    assert _exactly(fresh.state_dict(), optimizer.state_dict())


def test_a_dict_of_optimizers_lacks_one(repo: Repo) -> None:
    model, optimizer = _shapes("plain")
    repo.commit(model=model, optimizer={"a": optimizer}, step=1)
    with pytest.raises(NotFoundError, match=r"the commit has no 'optimizer\.b'"):
        repo.checkout(1, into=(model, {"b": optimizer}))
    for wrong in ((model, optimizer, {"a": optimizer}), ({"a": optimizer}, {"a": optimizer})):
        with pytest.raises(InvalidInputError, match="one module and its optimizers"):
            repo.checkout(1, into=wrong)
