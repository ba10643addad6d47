"""Random weights and moments in every layout: no near form has a sign or a zero of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptvcs.repo import Repo

Floats = NDArray[np.float32]
Rows = dict[str, tuple[Floats, Floats, Floats]]  # name -> weight, average, square


def normal(draw: np.random.Generator, size: tuple[int, ...]) -> Floats:
    return draw.standard_normal(size).astype(np.float32)


SHAPES = ((20, 40), (700,), (6, 300), (3, 5, 60))
VALUES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Floats]] = {
    "normal": normal,
    "heavy": lambda d, s: (d.standard_cauchy(s) * 1e-2).astype(np.float32),
    "positive": lambda d, s: np.abs(normal(d, s)) + np.float32(1e-3),
    "negative": lambda d, s: -np.abs(normal(d, s)),
    "sparse": lambda d, s: np.where(d.random(s) < 0.05, normal(d, s), 0).astype(np.float32),
    "binary": lambda d, s: (d.random(s) < 0.5).astype(np.float32),
    "constant": lambda d, s: np.full(s, d.standard_normal(), np.float32),
    "counts": lambda d, s: d.poisson(3, s).astype(np.float32),
    "tiny": lambda d, s: normal(d, s) * np.float32(1e-30),
    "huge": lambda d, s: normal(d, s) * np.float32(1e30),
}


def tensors(rows: Rows, place: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(row[place]) for name, row in rows.items()}


def plain(rows: Rows) -> dict[str, Any]:
    state = {
        n: {"exp_avg": torch.from_numpy(m), "exp_avg_sq": torch.from_numpy(v)}
        for n, (_, m, v) in enumerate(rows.values())
    }
    group = {"params": [*state], "betas": (0.9, 0.99)}
    return {"model": tensors(rows, 0), "optimizer": {"state": state, "param_groups": [group]}}


def named(form: str) -> Callable[[Rows], dict[str, Any]]:
    def make(rows: Rows) -> dict[str, Any]:
        keys = {"exp_avg": 1, "exp_avg_sq": 2}
        flat = {
            form.format(name=name, key=key): value
            for key, place in keys.items()
            for name, value in tensors(rows, place).items()
        }
        return {"model": tensors(rows, 0), "optim": flat}

    return make


LAYOUTS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "plain": plain,
    "flattened": named("state.{name}.{key}"),
    "keyed": named("{key}.{name}"),
    "torch_dist": named("optimizer.state.{key}.{name}"),
    "trees": lambda r: {"params": tensors(r, 0), "mu": tensors(r, 1), "nu": tensors(r, 2)},
    "letters": lambda r: {"w": tensors(r, 0), "m": tensors(r, 1), "v": tensors(r, 2)},
    "buckets": lambda r: {
        str(n): {
            "param": torch.from_numpy(w),
            "exp_avg": torch.from_numpy(m),
            "exp_avg_sq": torch.from_numpy(v),
        }
        for n, (w, m, v) in enumerate(r.values())
    },
    "weights": lambda r: {"model": tensors(r, 0)},
    "averages": lambda r: {"model": tensors(r, 0), "ema": tensors(r, 0), "extra": tensors(r, 2)},
}


@st.composite
def histories(draw: st.DrawFn) -> list[Rows]:
    """Parameters of random distributions over a few commits."""
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    kinds = st.sampled_from(sorted(VALUES))
    rows: Rows = {}
    for number, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))):
        weight, square = (VALUES[draw(kinds)](numbers, shape) for _ in range(2))
        with np.errstate(over="ignore"):  # what is infinite is exact
            square = np.square(square)
        average = (
            np.sqrt(np.minimum(square, 1e30)) * normal(numbers, shape) * np.float32(0.2)
        ).astype(np.float32)
        rows[f"{number}.weight"] = weight, average, square
    states = [rows]
    for _ in range(draw(st.integers(1, 2))):
        rows = {
            name: (
                (w * (1 + np.float32(1e-3) * normal(numbers, w.shape))).astype(np.float32),
                m,
                (np.minimum(v, 1e38) * numbers.uniform(0.5, 2, v.shape)).astype(np.float32),
            )
            for name, (w, m, v) in rows.items()
        }
        states.append(rows)
    return states


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(node, torch.Tensor):
        yield path, node


@given(
    histories(),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(["near", "near:step=4,zone=0.66"]),
)
def test_no_sign_changes_and_no_square_is_lost(states: list[Rows], layout: str, codec: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        repo = Repo.init(folder, codec=codec)
        repo.configure("keep-exact", "0")
        made = [LAYOUTS[layout](rows) for rows in states]
        for step, state in enumerate(made, 1):
            repo.commit(state, step=step)
        for step, state in enumerate(made, 1):
            back = dict(leaves(repo.checkout(step)))
            for path, true in leaves(state):
                near = back[path]
                if not (true < 0).any():
                    assert not (near < 0).any(), path
                if not (true > 0).any():
                    assert not (near > 0).any(), path
                if path.endswith("sq") or ".nu." in path or ".v." in path:
                    assert not ((near == 0) & (true != 0)).any(), path
        repo.close()
