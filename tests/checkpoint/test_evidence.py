"""What nothing says is a weight or a moment comes back bit for bit, whatever it looks like."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptvcs.repo import Repo
from tests.corpus.outcome import leaves, same

State = dict[str, Any]
Draw = np.random.Generator
Array = NDArray[Any]

HOLDERS = [
    "replay_buffer",
    "obs_rms",
    "router_stats",
    "priorities",
    "statistics",
    "memory",
    "env",
    "curriculum",
    "returns",
    "cache",
    "loss_history",
    "normaliser",
    "data",
    "filter",
]
"""Keys of what a run keeps besides its model."""

NAMES = [
    "weight",
    "v",
    "weights",
    "bias",
    "w",
    "var",
    "variance",
    "mean",
    "sum",
    "count",
    "done",
    "nu",
    "reward",
    "gamma",
    "beta",
    "scale",
    "square_avg",
    "hessian",
    "norm.weight",
    "expert.0.weight",
    "z",
    "p",
    "values",
    "logits",
    "exp_inf",
    "running_var",
    "embedding",
    "kernel",
    "a b",
    "",
]
"""Names of tensors, of which many are those of weights and second moments elsewhere."""


def _ranks(draw: Draw, size: int) -> Array:
    return draw.permutation(size).astype(np.float64)


DISTRIBUTIONS: dict[str, Callable[[Draw, int], Array]] = {
    "binary": lambda d, n: d.integers(0, 2, n),
    "counts": lambda d, n: d.poisson(3, n),
    "probabilities": lambda d, n: d.random(n),
    "shares": lambda d, n: d.dirichlet(np.full(n, 0.3)),
    "heavy tails": lambda d, n: d.standard_cauchy(n),
    "wide": lambda d, n: np.exp(d.normal(0, 6, n)),
    "negative": lambda d, n: -np.exp(d.normal(0, 2, n)),
    "sparse": lambda d, n: d.normal(size=n) * (d.random(n) < 0.05),
    "constant": lambda d, n: np.full(n, d.normal()),
    "zeros": lambda d, n: np.zeros(n),
    "ranks": _ranks,
    "normal": lambda d, n: d.normal(0, 0.02, n),
    "squares": lambda d, n: np.square(d.normal(0, 1e-4, n)),
    "coarse": lambda d, n: np.round(d.normal(size=n) * 8) / 8,
    "infinite": lambda d, n: np.where(d.random(n) < 0.01, np.inf, d.normal(size=n)),
}

TYPES = ["float32"] * 4 + ["float64", "float16", "bfloat16", "int64", "uint8", "bool", "complex64"]
CHANGES = ["nothing", "some", "all", "drift", "decay"]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 4000)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 20), st.integers(1, 16), st.integers(1, 16)),
)


class Held:
    """One tensor of a state, as it changes from commit to commit."""

    def __init__(self, kind: str, shape: tuple[int, ...], dtype: str, *, array: bool) -> None:
        self.kind, self.shape, self.dtype = kind, shape, dtype
        self.array = array and dtype != "bfloat16"
        self.values = np.zeros(0)

    def change(self, how: str, draw: Draw) -> None:
        """Take one step of the run."""
        fresh = DISTRIBUTIONS[self.kind](draw, int(np.prod(self.shape))).astype(np.float64)
        if not self.values.size or how == "all":
            self.values = fresh
        elif how == "some":
            self.values = np.where(draw.random(fresh.size) < 0.1, fresh, self.values)
        elif how == "drift":  # as a weight in training does
            self.values = self.values * (1 + 1e-3 * draw.normal(size=fresh.size))
        elif how == "decay":  # as a moment does
            self.values = 0.9 * self.values + 0.1 * fresh

    def tensor(self) -> torch.Tensor | Array:
        """Its values now."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.dtype == "bfloat16":
                return torch.from_numpy(self.values).bfloat16().reshape(self.shape)
            if self.dtype == "int64":
                made = np.nan_to_num(self.values, posinf=1, neginf=0).clip(-1e9, 1e9)
            else:
                made = self.values % 251 if self.dtype == "uint8" else self.values
                made = np.nan_to_num(made) if self.dtype == "uint8" else made
            made = made.astype(self.dtype).reshape(self.shape)
        return made if self.array else torch.from_numpy(made)


HELD = st.builds(
    Held,
    st.sampled_from(sorted(DISTRIBUTIONS)),
    SHAPES,
    st.sampled_from(TYPES),
    array=st.booleans(),
)


@st.composite
def trees(draw: Any) -> State:
    """A nested state.  No name comes twice, so that nothing is a weight beside its moment."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=8, unique=True))
    tree: State = {"epoch": 3}
    for name in names:
        inner = tree.setdefault(draw(st.sampled_from(HOLDERS)), {})
        for step in draw(st.lists(st.sampled_from([*HOLDERS, 0, "list"]), max_size=2)):
            inner = inner.setdefault(step, {})
        inner[name] = draw(HELD)
    return tree


def at_present(tree: Any) -> Any:
    """The state that a tree holds now; dicts named `list` become lists."""
    if isinstance(tree, Held):
        return tree.tensor()
    if not isinstance(tree, dict):
        return tree
    return {
        key: [at_present(one) for one in item.values()] if key == "list" else at_present(item)
        for key, item in tree.items()
    }


def held(tree: Any) -> Iterator[Held]:
    """All that changes in a tree."""
    return (leaf for _, leaf in leaves(tree) if isinstance(leaf, Held))


def differences(true: Any, back: Any) -> list[str]:
    """Paths of what did not come back as it was."""
    was, now = dict(leaves(true)), dict(leaves(back))
    wrong = sorted(was.keys() ^ now.keys())
    for path, value in was.items():
        if path in now and isinstance(value, torch.Tensor | np.ndarray):
            if type(now[path]) is not type(value) or not same(value, now[path]):
                wrong.append(path)
        elif path in now and now[path] != value:
            wrong.append(path)
    return wrong


RUNS = st.lists(st.sampled_from(CHANGES), min_size=2, max_size=4)


def _run(tree: State, changes: list[str], seed: int) -> Iterator[tuple[int, State]]:
    """The states of a run, from step 1."""
    draw = np.random.default_rng(seed)
    for step, how in enumerate(["all", *changes], 1):
        for one in held(tree):
            one.change(how, draw)
        yield step, at_present(tree)


def _near(folder: str | Path) -> Repo:
    repo = Repo.init(folder)
    repo.configure("keep-exact", "0")
    return repo


@given(trees(), RUNS, st.integers(0, 1 << 30))
def test_a_state_without_model_comes_back_exactly(
    tree: State, changes: list[str], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, _near(folder) as repo:
        true = dict(_run(tree, changes, seed))
        for step, state in true.items():
            entry = repo.commit(state, step=step)
            assert entry.exact, f"step {step} is near"
        for step, state in true.items():
            assert not differences(state, repo.checkout(step)), step
        assert not repo.verify().damage


@given(trees(), RUNS, st.integers(0, 1 << 30))
def test_a_file_without_model_comes_back_byte_for_byte(
    tree: State, changes: list[str], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, _near(Path(folder) / "repo") as repo:
        bytes_of: dict[int, bytes] = {}
        path = Path(folder) / "state.pt"
        for step, state in _run(tree, changes, seed):
            torch.save(state, path)
            bytes_of[step] = path.read_bytes()
            repo.commit_path(path, message="", step=step)
        for step, content in bytes_of.items():
            repo.checkout_files(repo.resolve(step), Path(folder) / f"back-{step}")
            assert (Path(folder) / f"back-{step}").read_bytes() == content, step


@given(trees(), RUNS, st.integers(0, 1 << 30))
def test_what_lies_beside_a_model_comes_back_exactly(
    tree: State, changes: list[str], seed: int
) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(24, 60), torch.nn.Linear(60, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder, _near(folder) as repo:
        true = {}
        for step, state in _run(tree, changes, seed):
            model(torch.randn(16, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            repo.commit(model=model, optimizer=optimizer, extra=state, step=step)
            true[step] = state
        for step, state in true.items():
            back = repo.checkout(step)
            assert not differences(state, {key: back[key] for key in state}), step
