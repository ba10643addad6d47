"""Layouts of one file, of states in Python, and of torch.distributed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from ckptvcs.history.log import LogEntry
from ckptvcs.integrations.distributed import CkptWriter, load_state
from ckptvcs.repo import Repo
from tests.corpus.optimizers import ANYTHING, ELEMENTS, TENSORS
from tests.corpus.parts import Parts, put, take
from tests.corpus.training import State, Training

Tensor = torch.Tensor


class Layout:
    """How a state is committed, and loaded again.  `form` is the most of `optimizers.Entry.form`
    that it can hold.
    """

    form: ClassVar[int] = ANYTHING
    joined: ClassVar[bool] = False  # one tensor holds several weights

    def commit(self, repo: Repo, training: Training, step: int, folder: Path) -> LogEntry:
        """Commit a training at rest; `folder` is empty."""
        raise NotImplementedError

    def restore(self, repo: Repo, step: int, training: Training, folder: Path) -> None:
        """Load a commit into a training."""
        raise NotImplementedError


class Files(Layout):
    """A layout of a file or directory."""

    def commit(self, repo: Repo, training: Training, step: int, folder: Path) -> LogEntry:
        path = self.write(folder, training, step)
        made = repo.commit_path(path, message=f"step {step}", step=step)
        return repo.entry(made.id)

    def restore(self, repo: Repo, step: int, training: Training, folder: Path) -> None:
        target = folder / "back"
        repo.checkout_files(repo.resolve(step), target)
        self.read(target, training)

    def write(self, folder: Path, training: Training, step: int) -> Path:
        """Write a checkpoint below `folder`."""
        raise NotImplementedError

    def read(self, path: Path, training: Training) -> None:
        """Load it."""
        raise NotImplementedError


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


# -- a file of torch.save ------------------------------------------------------------------------


@dataclass(frozen=True)
class Nested(Files):
    """State dicts as they are, under the keys of some trainer: dotted, a number for a place in a
    list.
    """

    model: str
    optimizer: str
    suffix: str = "pt"

    def write(self, folder: Path, training: Training, step: int) -> Path:
        state: State = {"epoch": 1, "global_step": step, "rng_state": torch.get_rng_state()}
        state |= {self.model: training.model.state_dict()}
        place = self.optimizer.split(".")
        value: Any = training.optimizer.state_dict()
        for key in reversed(place[1:]):
            value = [value] if key == "0" else {key: value}
        path = folder / f"ckpt-{step}.{self.suffix}"
        torch.save(state | {place[0]: value}, path)
        return path

    def read(self, path: Path, training: Training) -> None:
        state = load(path)
        training.model.load_state_dict(state[self.model])
        found = state
        for key in self.optimizer.split("."):
            found = found[0 if key == "0" else key]
        training.optimizer.load_state_dict(found)


def distributed(training: Training, *, flat: bool) -> tuple[State, State]:
    """State dicts of model and optimizer with names for weights, as torch.distributed has them."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = get_state_dict(training.model, training.optimizer, options=options)
    return model, dict(optimizer)


def load_distributed(training: Training, model: State, optimizer: State) -> None:
    """Load what `distributed` made."""
    names = {id(p): name for name, p in training.model.named_parameters()}
    order = [names[id(p)] for group in training.optimizer.param_groups for p in group["params"]]
    state: dict[int, State] = {}
    if "param_groups" in optimizer:
        state = {order.index(name): own for name, own in optimizer.get("state", {}).items()}
        groups = optimizer["param_groups"]
    else:
        groups = [
            {"params": [names[id(p)] for p in group["params"]]}
            for group in training.optimizer.param_groups
        ]
        for key, value in optimizer.items():
            kind, _, place = key.partition(".")
            name = max((name for name in order if place.startswith(name + ".")), key=len)
            inner = place[len(name) + 1 :]
            if kind == "state":
                state.setdefault(order.index(name), {})[inner] = value
            else:
                next(group for group in groups if name in group["params"])[inner] = value
    groups = [
        {**group, "params": [order.index(name) for name in group["params"]]} for group in groups
    ]
    training.model.load_state_dict(model)
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Named(Files):
    """What torch.distributed makes of state dicts, by torch.save; as Composer has it or flattened,
    which accelerate, torchtitan and others have.
    """

    flat: bool
    form: ClassVar[int] = TENSORS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        model, optimizer = distributed(training, flat=self.flat)
        state = {"model": model, "optimizer": optimizer, "step": step}
        if not self.flat:
            kind = type(training.optimizer).__name__
            state = {"state": {"model": model, "optimizers": {kind: optimizer}}, "rng": []}
        torch.save(state, folder / "state.pt")
        return folder / "state.pt"

    def read(self, path: Path, training: Training) -> None:
        state = load(path)
        if not self.flat:
            (optimizer,) = state["state"]["optimizers"].values()
            state = {**state["state"], "optimizer": optimizer}
        load_distributed(training, state["model"], state["optimizer"])


@dataclass(frozen=True)
class Distcp(Files):
    """A directory of torch.distributed.checkpoint."""

    flat: bool
    form: ClassVar[int] = TENSORS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        model, optimizer = distributed(training, flat=self.flat)
        writer = FileSystemWriter(folder / f"step-{step}")
        save({"model": model, "optimizer": optimizer}, storage_writer=writer, no_dist=True)
        return folder / f"step-{step}"

    def read(self, path: Path, training: Training) -> None:
        found: State = {}
        load_tensors(found, path)
        optimizer = {
            key.removeprefix("optimizer."): value for key, value in found["optimizer"].items()
        }
        load_distributed(training, found["model"], optimizer)


def load_tensors(into: State, path: Path) -> None:
    _load_state_dict(
        into,
        storage_reader=FileSystemReader(path),
        planner=_EmptyStateDictLoadPlanner(),  # type: ignore[no-untyped-call]
        no_dist=True,
    )


@dataclass(frozen=True)
class Writer(Layout):
    """The same, by CkptWriter."""

    flat: bool
    form: ClassVar[int] = TENSORS

    def commit(self, repo: Repo, training: Training, step: int, folder: Path) -> LogEntry:
        model, optimizer = distributed(training, flat=self.flat)
        state = {"model": model, "optimizer": optimizer}
        writer = CkptWriter(repo)
        save(state, checkpoint_id=f"step-{step}", storage_writer=writer, no_dist=True)
        assert writer.entry is not None
        return writer.entry

    def restore(self, repo: Repo, step: int, training: Training, folder: Path) -> None:
        found = load_state(repo, f"step-{step}")
        load_distributed(training, found["model"], found["optimizer"])


# -- states in Python ----------------------------------------------------------------------------


class Objects(Layout):
    """A model and its optimizer, as they are."""

    def commit(self, repo: Repo, training: Training, step: int, folder: Path) -> LogEntry:
        return repo.commit(model=training.model, optimizer=training.optimizer, step=step)

    def restore(self, repo: Repo, step: int, training: Training, folder: Path) -> None:
        repo.checkout(step, into=(training.model, training.optimizer))


class Dicts(Layout):
    """Their state dicts, side by side."""

    def commit(self, repo: Repo, training: Training, step: int, folder: Path) -> LogEntry:
        model, optimizer = training.model.state_dict(), training.optimizer.state_dict()
        return repo.commit({"model": model, "optimizer": optimizer}, step=step)

    def restore(self, repo: Repo, step: int, training: Training, folder: Path) -> None:
        state = repo.checkout(step)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])


# -- written by hand -----------------------------------------------------------------------------

_LETTERS = {"exp_avg": "m", "momentum_buffer": "m", "exp_avg_sq": "v", "square_avg": "v"}
_WORDS = {"exp_avg": "first_moment", "exp_avg_sq": "second_moment", "momentum_buffer": "momentum"}
_GREEK = {"exp_avg": "mu", "exp_avg_sq": "nu", "square_avg": "nu", "momentum_buffer": "trace"}


def _shorter(key: str, names: dict[str, str], keys: Any) -> str:
    """The short name of a key, where no other has it."""
    short = names.get(key, key)
    return short if sum(names.get(other, other) == short for other in keys) == 1 else key


@dataclass(frozen=True)
class Written(Files):
    """A dict that somebody made by hand.  `shape` makes it of weights and states by key, and gives
    these back: (state, names of weights) -> (weights, states).
    """

    shape: Callable[[dict[str, Tensor], dict[str, dict[str, Tensor]]], State]
    back: Callable[[State, list[str]], tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]]
    names: dict[str, str]
    python: bool = False
    form: ClassVar[int] = ELEMENTS

    def _state(self, training: Training) -> tuple[State, State]:
        parts = take(training)
        keys = {key: _shorter(key, self.names, parts.states) for key in parts.states}
        state = self.shape(parts.weights, {keys[key]: own for key, own in parts.states.items()})
        hyper = {"rest": parts.rest, "groups": parts.groups, "keys": keys}
        return state, {"hyper": hyper, "order": list(parts.weights)}

    def _load(self, state: State, training: Training) -> None:
        hyper = state["hyper"]
        weights, states = self.back(state, state["order"])
        full = {short: key for key, short in hyper["keys"].items()}
        weights = {name: torch.as_tensor(value) for name, value in weights.items()}
        found = {
            full[key]: {name: torch.as_tensor(value) for name, value in own.items()}
            for key, own in states.items()
        }
        put(training, Parts(weights, found, hyper["rest"], hyper["groups"]))

    def write(self, folder: Path, training: Training, step: int) -> Path:
        state, hyper = self._state(training)
        torch.save({**state, **hyper}, folder / "state.pt")
        return folder / "state.pt"

    def read(self, path: Path, training: Training) -> None:
        self._load(load(path), training)

    def commit(self, repo: Repo, training: Training, step: int, folder: Path) -> LogEntry:
        if not self.python:
            return super().commit(repo, training, step, folder)
        state, hyper = self._state(training)
        return repo.commit({**_arrays(state), **hyper}, step=step)

    def restore(self, repo: Repo, step: int, training: Training, folder: Path) -> None:
        if not self.python:
            super().restore(repo, step, training, folder)
        else:
            self._load(repo.checkout(step), training)


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, Tensor) and value.dtype != torch.bfloat16 else value


ByName = dict[str, Tensor]


def _lists(weights: ByName, states: dict[str, ByName]) -> State:
    made = {key: [own.get(name) for name in weights] for key, own in states.items()}
    return {"w": weights, **made}


def _from_lists(state: State, order: list[str]) -> tuple[ByName, dict[str, ByName]]:
    keys = state.keys() - {"w", "hyper", "order"}
    return state["w"], {
        key: {n: v for n, v in zip(order, state[key], strict=True) if v is not None} for key in keys
    }


def _tree(by_name: ByName) -> State:
    tree: State = {}
    for name, value in by_name.items():
        layer, _, leaf = name.rpartition(".")
        tree.setdefault(layer, {})[leaf] = value
    return tree


def _leaves(tree: State) -> ByName:
    return {f"{layer}.{leaf}": v for layer, leaves in tree.items() for leaf, v in leaves.items()}


def _trees(weights: ByName, states: dict[str, ByName]) -> State:
    return {"params": _tree(weights), "opt_state": {key: _tree(own) for key, own in states.items()}}


def _from_trees(state: State, order: list[str]) -> tuple[ByName, dict[str, ByName]]:
    states = {key: _leaves(tree) for key, tree in state["opt_state"].items()}
    return _leaves(state["params"]), states


def _from_long_lists(state: State, order: list[str]) -> tuple[ByName, dict[str, ByName]]:
    return _from_lists({**state, "w": dict(zip(order, state["w"], strict=True))}, order)


def _rows(weights: ByName, states: dict[str, ByName]) -> State:
    return {
        name: {"value": weight, **{key: own[name] for key, own in states.items() if name in own}}
        for name, weight in weights.items()
    }


def _from_rows(state: State, order: list[str]) -> tuple[ByName, dict[str, ByName]]:
    states: dict[str, ByName] = {}
    for name in order:
        for key in state[name].keys() - {"value"}:
            states.setdefault(key, {})[name] = state[name][key]
    return {name: state[name]["value"] for name in order}, states


def _chain(weights: ByName, states: dict[str, ByName]) -> State:
    return {"params": weights, "opt_state": ({}, {"count": 1, **states})}


def _from_chain(state: State, order: list[str]) -> tuple[ByName, dict[str, ByName]]:
    states = state["opt_state"][1]
    return state["params"], {key: states[key] for key in states.keys() - {"count"}}


def _keyed(weights: ByName, states: dict[str, ByName]) -> State:
    return {**weights, **{f"{k}.{n}": v for k, own in states.items() for n, v in own.items()}}


def _from_keyed(state: State, order: list[str]) -> tuple[ByName, dict[str, ByName]]:
    states: dict[str, ByName] = {}
    for key in state.keys() - set(order) - {"hyper", "order"}:
        kind, _, name = key.partition(".")
        states.setdefault(kind, {})[name] = state[key]
    return {name: state[name] for name in order}, states


# -- safetensors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Safetensors(Files):
    """Weights and states by `NAME.KEY` in safetensors: one file, or two in a directory."""

    single: bool
    form: ClassVar[int] = TENSORS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        parts = take(training, any_shape=True)
        states = {f"{n}.{k}": v for k, own in parts.states.items() for n, v in own.items()}
        more = {"rest": json.dumps(_plain(parts.rest)), "groups": json.dumps(_plain(parts.groups))}
        if self.single:
            save_file({**parts.weights, **states}, folder / "state.safetensors", more)
            return folder / "state.safetensors"
        save_file(parts.weights, folder / "model.safetensors")
        save_file(states, folder / "optimizer.safetensors", more)
        return folder

    def read(self, path: Path, training: Training) -> None:
        from safetensors import safe_open

        holder = path if self.single else path / "optimizer.safetensors"
        with safe_open(holder, "pt") as file:
            more = file.metadata()
        tensors = load_file(holder)
        if not self.single:
            tensors |= load_file(path / "model.safetensors")
        names = list(training.model.state_dict())
        states: dict[str, ByName] = {}
        for key in tensors.keys() - set(names):
            name, _, kind = key.rpartition(".")
            states.setdefault(kind, {})[name] = tensors[key]
        weights = {name: tensors[name] for name in names}
        rest, groups = (_tensors(json.loads(more[key])) for key in ("rest", "groups"))
        put(training, Parts(weights, states, rest, groups))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).rpartition(".")[2]}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    return [_tensors(item) for item in value] if isinstance(value, list) else value


LAYOUTS: dict[str, Layout] = {
    "plain": Nested("model", "optimizer"),
    "lightning": Nested("state_dict", "optimizer_states.0", "ckpt"),
    "fairseq": Nested("model", "last_optimizer_state"),
    "objects": Objects(),
    "state dicts": Dicts(),
    "names": Named(flat=False),
    "flattened": Named(flat=True),
    "distcp": Distcp(flat=False),
    "distcp flattened": Distcp(flat=True),
    "CkptWriter": Writer(flat=False),
    "CkptWriter flattened": Writer(flat=True),
    "w, m, v": Written(_lists, _from_lists, _LETTERS),
    "lists": Written(
        lambda weights, states: {**_lists(weights, states), "w": list(weights.values())},
        _from_long_lists,
        _WORDS,
    ),
    "rows": Written(_rows, _from_rows, _LETTERS),
    "chain": Written(_chain, _from_chain, _GREEK),
    "params, mu, nu": Written(_trees, _from_trees, _GREEK),
    "arrays": Written(_trees, _from_trees, _GREEK, python=True),
    "keyed": Written(_keyed, _from_keyed, {}),
    "safetensors": Safetensors(single=True),
    "two safetensors": Safetensors(single=False),
}
