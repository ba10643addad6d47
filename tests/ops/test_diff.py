"""What lies between two commits, against the same numbers from torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptvcs import InvalidInputError, NotFoundError, Repo
from ckptvcs.codec.dtypes import DTYPES, OF_TORCH
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.words import to_float64
from ckptvcs.decode.chain import ChainReader
from ckptvcs.ops.diff import Comparison
from ckptvcs.ops.diff_sums import Sums, sum_up
from ckptvcs.ops.finite import all_finite
from ckptvcs.ops.history_reader import handle
from tests.helpers.training import train

pytestmark = pytest.mark.any_backend

floats = hnp.arrays(np.float32, st.shared(st.integers(0, 40)), elements=st.floats(width=32))


def words(array: np.ndarray[Any, Any]) -> Any:
    return array.view(np.uint32)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("theirs", [t for t in OF_TORCH if hasattr(torch, t)])
def test_numbers_are_those_of_torch(theirs: str) -> None:
    dtype = getattr(torch, theirs)
    ours = OF_TORCH[theirs]
    size = DTYPES[ours].size
    if ours in ("F4", "C32"):
        pytest.skip("torch has no arithmetic for it")
    octets = np.arange(256, dtype=np.uint8)
    if ours == "BOOL":
        octets = octets[:2]
    if size > 1:
        octets = np.random.default_rng(0).integers(0, 256, 4000 * size, dtype=np.uint8)
    true = torch.from_numpy(octets.copy()).view(dtype)
    wide = torch.view_as_real(true).reshape(-1).double() if true.is_complex() else true.double()
    found = to_float64(octets.view(f"<u{DTYPES[ours].word}"), ours)
    assert np.array_equal(found, wide.numpy(), equal_nan=True)


def test_pairs_of_four_bits() -> None:
    assert to_float64(np.array([0x2F, 0x91], np.uint8), "F4").tolist() == [-6, 1, 0.5, -0.5]


@given(floats)
def test_nothing_lies_between_a_state_and_itself(values: np.ndarray[Any, Any]) -> None:
    sums = sum_up(words(values), words(values), "F32")
    finite = np.isfinite(values)
    assert (sums.dd, sums.max_abs, sums.changed) == (0, 0, 0)
    assert sums.nonfinite_a == sums.nonfinite_b == np.count_nonzero(~finite)
    assert math.isnan(sums.relative) if values.size and not finite.any() else sums.relative == 0
    if sums.aa:
        assert sums.cosine == pytest.approx(1)


@given(floats, floats, st.integers(0, 40))
def test_sums_are_what_numpy_finds(
    a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], cut: int
) -> None:
    sums = sum_up(words(a), words(b), "F32")
    both = np.isfinite(a) & np.isfinite(b)
    x, y = a[both].astype(np.float64), b[both].astype(np.float64)
    assert sums.entries == a.size
    assert sums.changed == np.count_nonzero(words(a) != words(b))
    assert sums.nonfinite_a == np.count_nonzero(~np.isfinite(a))
    assert sums.nonfinite_b == np.count_nonzero(~np.isfinite(b))
    assert sums.norm_a == pytest.approx(np.linalg.norm(x), rel=1e-12)
    assert sums.norm_difference == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
    assert sums.max_abs == (np.abs(y - x).max() if x.size else 0)
    assert math.isnan(sums.cosine) or -1 <= sums.cosine <= 1
    parts = Sums()
    for part in (slice(0, cut), slice(cut, None)):
        parts.add(sum_up(words(a[part]), words(b[part]), "F32"))
    assert (parts.entries, parts.compared, parts.changed) == (
        sums.entries,
        sums.compared,
        sums.changed,
    )
    assert parts.max_abs == sums.max_abs
    assert same(parts.relative, sums.relative) or parts.relative == pytest.approx(sums.relative)


def check(found: Comparison, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The numbers of a comparison, against the tensors themselves."""
    for tensor in found.tensors:
        x, y = a[tensor.info.name].double(), b[tensor.info.name].double()
        sums = tensor.sums
        assert sums.entries == x.numel()
        assert sums.norm_a == pytest.approx(float(x.norm()), rel=1e-9)
        assert sums.norm_b == pytest.approx(float(y.norm()), rel=1e-9)
        assert sums.norm_difference == pytest.approx(float((y - x).norm()), rel=1e-9)
        assert sums.max_abs == float((y - x).abs().max())
        assert sums.changed == int((x != y).sum())
        if x.norm() and y.norm():
            cosine = float(torch.dot(x.reshape(-1), y.reshape(-1)) / x.norm() / y.norm())
            assert sums.cosine == pytest.approx(cosine, abs=1e-9)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of the tensor of every slice that is decoded, once for each side."""
    names: list[str] = []
    decode = ChainReader.decode_pair

    def spy(self: ChainReader, a: Any, b: Any, info: Any, *rest: Any) -> Any:
        names.extend([info.name, info.name])
        return decode(self, a, b, info, *rest)

    monkeypatch.setattr(ChainReader, "decode_pair", spy)
    return names


def test_a_training_run(repo: Repo, decoded: list[str]) -> None:
    states = train(4)
    for state in states:
        repo.commit(state, step=10 * state["step"], metrics={"loss": 1 / state["step"]})
    decoded.clear()
    seen: list[int] = []
    found = repo.diff(10, 40, only="model", progress=seen.append)
    before, after = ({f"model.{k}": v for k, v in states[n]["model"].items()} for n in (0, 3))
    check(found, before, after)
    names = {tensor.info.name for tensor in found.tensors}
    same_names = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert "model.4.weight" in same_names
    assert {info.name for info in found.unchanged} == same_names
    assert names == before.keys() - same_names
    assert set(decoded) <= names
    assert len(decoded) == 2 * len(set(decoded)) > 0
    assert sum(seen) == sum(2 * v.numel() * v.element_size() for v in before.values())
    changes = [tensor.sums.relative for tensor in found.tensors]
    assert changes == sorted(changes, reverse=True)
    assert found.steps == 30
    weights = [tensor.sums for tensor in found.tensors if tensor.info.role == "weight"]
    assert len(weights) < len(names)  # buffers are no weights
    assert found.total.dd == pytest.approx(sum(sums.dd for sums in weights))
    assert found.update_ratio(found.total) == found.total.relative / 30
    told = {name: (a, b) for name, a, b in found.metadata}
    assert told["step"] == (10, 40)
    assert told["metrics.loss"] == (1, 0.25)
    assert found.total.changed == sum(sums.changed for sums in weights)


def test_parts_and_their_order(repo: Repo, decoded: list[str]) -> None:
    states = train(2)
    for state in states:
        repo.commit(state, step=state["step"])
    decoded.clear()
    found = repo.diff()
    parts = [tensor.info.part for tensor in found.tensors]
    assert list(dict.fromkeys(parts)) == ["model", "optimizer", "rest"]
    decoded.clear()
    moments = repo.diff(only="optimizer")
    assert {name.split(".")[0] for name in decoded} == {"optimizer"}
    assert moments.total.entries == 0
    cosines = [t.sums.cosine for t in found.ordered("cosine") if t.info.part == "model"]
    assert cosines == sorted(cosines)
    by_name = [t.info.name for t in moments.ordered("name")]
    assert by_name == sorted(by_name)
    with pytest.raises(InvalidInputError, match="sort"):
        found.ordered("size")
    assert repo.diff("HEAD", "HEAD").tensors == ()


def test_tensors_that_come_and_go(repo: Repo) -> None:
    big = torch.randn(300)
    shared = {"same": big, "small": torch.ones(3), "none": torch.empty(0, 4)}
    repo.commit({"model": {**shared, "gone": big + 1, "grown": big + 3, "cast": big + 4}}, step=1)
    now = {
        "came": big + 2,
        "grown": torch.randn(301),
        "cast": big.double(),
        "small": torch.zeros(3),
    }
    repo.commit({"model": {**shared, **now}}, step=1)  # starts a branch
    found = repo.diff("main", "HEAD")
    assert [info.name for info in found.added] == ["model.came"]
    assert [info.name for info in found.removed] == ["model.gone"]
    assert {a.name: (a.dtype, b.dtype, b.shape) for a, b in found.reshaped} == {
        "model.grown": ("F32", "F32", (301,)),
        "model.cast": ("F32", "F64", (300,)),
    }
    assert {info.name for info in found.unchanged} == {"model.same", "model.none"}
    (small,) = found.tensors
    assert (small.sums.relative, small.sums.norm_b) == (1, 0)
    assert math.isnan(small.sums.cosine)
    assert found.steps == 0
    assert found.update_ratio(small.sums) is None
    with pytest.raises(NotFoundError, match="part 'optimizer'"):
        repo.diff("HEAD", "HEAD", only="optimizer")


def test_large_tensors_of_every_kind(repo: Repo, decoded: list[str]) -> None:
    torch.manual_seed(0)
    count = 5 * SLICE_WORDS // 2
    a = {
        "long": torch.randn(count),
        "also": torch.randn(SLICE_WORDS),
        "few": torch.randn(300),
        "half": torch.randn(500).half(),
        "ints": torch.arange(400),
        "complex": torch.randn(200, dtype=torch.complex64),
    }
    b = {name: value + 1 for name, value in a.items()}
    b["long"][-1] = a["long"][-1] - 7
    repo.commit({"model": a}, step=1)
    repo.commit({"model": b}, step=2)
    decoded.clear()
    found = repo.diff()
    assert decoded.count("model.long") == 6
    real = {f"model.{k}": (v, b[k]) for k, v in a.items() if not v.is_complex()}
    tensors = tuple(t for t in found.tensors if t.info.name in real)
    assert len(tensors) == len(real)
    for tensor in tensors:
        x, y = real[tensor.info.name]
        assert tensor.sums.norm_difference == pytest.approx(float((y.double() - x.double()).norm()))
        assert tensor.sums.max_abs == float((y.double() - x.double()).abs().max())
    (pairs,) = (t.sums for t in found.tensors if t.info.name == "model.complex")
    assert (pairs.entries, pairs.changed) == (200, 200)
    assert pairs.norm_difference == pytest.approx(math.sqrt(200))


def test_numbers_that_are_not_finite(repo: Repo) -> None:
    weight = torch.randn(400)
    broken = weight + 0.5
    broken[3], broken[5] = float("nan"), float("inf")
    torch.manual_seed(1)
    state = {"a": torch.randn(300), "weight": weight, "lost": torch.ones(200)}
    repo.commit({"model": state}, step=1)
    moved = {"a": state["a"] + 100, "weight": broken, "lost": torch.full((200,), torch.nan)}
    repo.commit({"model": moved}, step=2)
    found = repo.diff()
    names = [tensor.info.name for tensor in found.tensors]
    assert names == ["model.lost", "model.weight", "model.a"]
    lost, sums, _ = (tensor.sums for tensor in found.tensors)
    assert (sums.nonfinite_a, sums.nonfinite_b) == (0, 2)
    assert sums.max_abs == pytest.approx(0.5)
    assert math.isnan(lost.relative)
    assert (found.total.nonfinite_b, found.total.entries) == (202, 900)
    assert math.isfinite(found.total.relative)
    known: set[bytes] = set()
    assert all_finite(handle(repo).catalog, handle(repo).restorer(repo.resolve(1)), known)
    assert len(known) == 3
    assert not all_finite(handle(repo).catalog, handle(repo).restorer(repo.resolve(2)), known)


def near_repo(folder: Path) -> Repo:
    """A repository whose commits are near from the first moment on."""
    config = Repo.init(folder, codec="near").folder / "config.toml"
    config.write_text(config.read_text("utf-8") + "keep-exact = 0\n", "utf-8")
    return Repo.open(folder)


def test_near_commits_are_compared_as_they_check_out(tmp_path: Path) -> None:
    repo = near_repo(tmp_path)
    states = train(6)
    for state in states:
        repo.commit(state, step=state["step"])
    found = repo.diff(5, 6, only="model")
    a, b = ({f"model.{k}": v for k, v in repo.checkout(n)["model"].items()} for n in (5, 6))
    check(found, a, b)
    near = [tensor for tensor in found.tensors if tensor.error_b]
    assert near
    for tensor in near:
        true = states[5]["model"][tensor.info.name.removeprefix("model.")]
        off = float((b[tensor.info.name] - true).norm() / true.norm())
        assert tensor.error_b == pytest.approx(off, rel=0.02)
    exact = [tensor for tensor in found.tensors if tensor.error_a is None is tensor.error_b]
    assert exact
    assert not any(tensor.below_error for tensor in exact)


def test_an_exact_form_is_preferred(tmp_path: Path) -> None:
    repo = near_repo(tmp_path)
    states = train(3)
    for state in states:
        repo.commit(state, step=state["step"])
    assert any(tensor.error_a for tensor in repo.diff(2, 3).tensors)
    # The same content without loss: what was near has an exact form from now on.
    repo.commit(states[1], step=4, codec="lossless")
    assert repo.entry(repo.resolve(2)).exact
    again = repo.diff(2, 4)
    assert again.tensors == ()
    assert len(again.unchanged) > 20
    found = repo.diff(2, 3, only="model")
    assert not any(tensor.error_a for tensor in found.tensors)
    assert any(tensor.error_b for tensor in found.tensors)


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """The tensors of a state by the names that they have in a commit."""
    if isinstance(state, dict):
        found: dict[str, Any] = {}
        for key, value in state.items():
            found |= flat(value, f"{path}.{key}" if path else str(key))
        return found
    return {path: state} if isinstance(state, torch.Tensor) else {}


@given(
    seed=st.integers(0, 2**20),
    codec=st.sampled_from(["near", "excp", "lossless"]),
    kept=st.integers(0, 2),
    moves=st.lists(st.booleans(), min_size=3, max_size=3),
    tiny=st.booleans(),
)
def test_what_is_called_the_same_was_the_same(
    seed: int,
    codec: str,
    kept: int,
    moves: list[bool],
    tiny: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    repo = Repo.init(tmp_path_factory.mktemp("repo"))
    repo.configure("keep-exact", str(kept))
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    weights = {f"w{n}": some(60, 20) for n in range(3)}
    weights["tied"] = weights["w0"].clone()
    states = []
    for step in range(1, 6):
        for name, moved in zip(("w0", "w1", "w2"), moves, strict=True):
            if moved:
                weights[name] = weights[name] + (1e-9 if tiny else 0.01) * some(60, 20)
        weights["tied"] = weights["w0"].clone()
        moments = {
            n: {"exp_avg": some(60, 20) * (1e-12 if tiny else 1), "exp_avg_sq": some(60, 20) ** 2}
            for n in range(3)
        }
        state = {
            "model": dict(weights),
            "count": torch.arange(500) + step,
            "optimizer": {"state": moments, "param_groups": [{"params": [0, 1, 2], "lr": 0.1}]},
        }
        states.append(state)
        repo.commit(state, step=step, codec=codec)
    for a in range(1, 6):
        for b in range(a, 6):
            before, after = flat(states[a - 1]), flat(states[b - 1])
            equal = {name for name in before if torch.equal(before[name], after[name])}
            found = repo.diff(a, b)
            assert {info.name for info in found.unchanged} <= equal
            assert not {t.info.name for t in found.tensors if t.changed} & equal
            assert not {one.info.name for one in found.indistinguishable if one.differs} & equal
            assert all(one.near_a or one.near_b for one in found.indistinguishable)
            exact = {t.info.name for t in found.tensors if t.changed is not None}
            for tensor in found.tensors:
                if tensor.info.name in exact:
                    one, two = before[tensor.info.name], after[tensor.info.name]
                    assert tensor.changed == int((one != two).sum())
            seen = [info.name for info in found.unchanged]
            seen += [tensor.info.name for tensor in found.tensors]
            seen += [one.info.name for one in found.indistinguishable]
            assert sorted(seen) == sorted(before)
            if a == b:
                assert {info.name for info in found.unchanged} == before.keys()
            if codec == "lossless" or (a > 5 - kept and kept):
                assert {info.name for info in found.unchanged} == equal


def test_near_forms_that_are_equal_prove_nothing(tmp_path: Path) -> None:
    repo = near_repo(tmp_path)
    states = train(3)
    for state in states:
        repo.commit(state, step=state["step"])
    repo.commit(repo.checkout(3), step=4)  # the near form itself, which is exact there
    found = repo.diff(3, 4)
    assert not found.tensors
    names = {one.info.name for one in found.indistinguishable}
    before, after = flat(states[2]), flat(repo.checkout(4))
    assert names == {name for name in before if not torch.equal(before[name], after[name])}
    assert all(
        (one.near_a, one.near_b, one.differs) == (True, False, False)
        for one in found.indistinguishable
    )
    assert repo.diff(3, 3).indistinguishable == ()  # whatever it was, it is the same


def test_what_coding_kept_is_not_called_changed(tmp_path: Path) -> None:
    repo = near_repo(tmp_path)
    for state in train(3):
        repo.commit(state, step=state["step"])
    found = repo.diff(2, 3)
    near = [tensor for tensor in found.tensors if tensor.near_a or tensor.near_b]
    assert near
    assert [tensor.changed for tensor in near] == [None] * len(near)
    assert found.total_changed is None
    counts = [t.changed for t in found.ordered("changed") if t.info.part == "model"]
    known = [count for count in counts if count is not None]
    assert counts == sorted(known, reverse=True) + [None] * (len(counts) - len(known))


def near_run(root: Path) -> tuple[Repo, list[dict[str, Any]]]:
    """Three near commits, of which the last two are exact."""
    repo, states = Repo.init(root), train(3)
    for state in states:
        repo.commit(state, step=state["step"])
    return repo, states


def test_tensors_are_chosen_by_name(repo: Repo) -> None:
    for state in train(2):
        repo.commit(state)
    whole = repo.diff()
    seen: list[int] = []
    found = repo.diff(name="model.*.weight", progress=seen.append)
    weights = [t for t in whole.tensors if t.name.startswith("model.") and "weight" in t.name]
    assert found.tensors == tuple(weights)
    assert {info.name for info in found.unchanged} == {"model.4.weight"}
    tensors = repo.tensors("HEAD", "model.*.weight", small=True)
    assert sum(seen) == 2 * sum(one.size_bytes for one in tensors)
    assert {t.name for t in repo.diff(name="exp_avg_sq").tensors} == {
        t.name for t in whole.tensors if "exp_avg_sq" in t.name
    }
    with pytest.raises(NotFoundError, match="no tensor matches 'layer'"):
        repo.diff(name="layer")


def test_layers_are_sums_over_their_tensors(repo: Repo) -> None:
    states = train(2)
    for state in states:
        repo.commit(state)
    layers = {(layer.name, layer.role): layer for layer in repo.diff().layers()}
    before, after = ({**state["model"]} for state in states)
    names = ["0.weight", "0.bias"]
    one, other = (torch.cat([s[n].flatten() for n in names]).double() for s in (before, after))
    layer = layers["model.0", "weight"]
    assert sorted(tensor.name for tensor in layer.tensors) == ["model.0.bias", "model.0.weight"]
    assert layer.sums.norm_a == pytest.approx(float(one.norm()))
    assert layer.sums.norm_difference == pytest.approx(float((other - one).norm()))
    assert layer.changed == int((one != other).sum())
    # Moments and step counters have the layer of their weight.
    assert {tensor.name for tensor in layers["model.0", "exp_avg"].tensors} == {
        f"optimizer.state.{number}.exp_avg" for number in (0, 1)
    }
    assert len(layers["model.0", "step"].tensors) == 2
    ordered = repo.diff().layers("norm_a")
    norms = [layer.sums.norm_a for layer in ordered if layer.part == "model"]
    assert norms == sorted(norms, reverse=True)
    with pytest.raises(InvalidInputError, match="unknown sort key"):
        repo.diff().layers("size")


def test_a_commit_is_compared_with_its_near_form(tmp_path: Path) -> None:
    repo, states = near_run(tmp_path / "run")
    found = repo.diff_near(3)
    assert found.a.exact
    assert not found.b.exact
    repo.checkout_files(3, tmp_path / "near.pt", near=True)
    near = torch.load(tmp_path / "near.pt", weights_only=True)
    check_near = {f"model.{k}": v for k, v in near["model"].items()}
    exact = {f"model.{k}": v for k, v in states[2]["model"].items()}
    weights = [tensor for tensor in found.tensors if tensor.part == "model"]
    for tensor in weights:
        true = exact[tensor.name].double()
        error = float((check_near[tensor.name].double() - true).norm() / true.norm())
        assert tensor.sums.relative == pytest.approx(error, rel=1e-6)
        assert tensor.error_b == pytest.approx(error, rel=1e-2)
        assert tensor.changed is None
    equal = {name for name, value in exact.items() if torch.equal(value, check_near[name])}
    same_names = {info.name for info in found.unchanged if info.part == "model"}
    assert same_names == equal
    assert {tensor.name for tensor in weights} == exact.keys() - equal
    assert found.total.relative == pytest.approx(found.a.commit.error.weight_rel, rel=1e-2)
    with pytest.raises(InvalidInputError, match="is only near now"):
        repo.diff_near(1)


def test_only_near_codecs_have_near_forms(repo: Repo, tmp_path: Path) -> None:
    state = train(1)[0]
    repo.commit(state)
    with pytest.raises(InvalidInputError, match="has no near form"):
        repo.diff_near()
    with pytest.raises(InvalidInputError, match="has no near form"):
        repo.checkout_files("HEAD", tmp_path / "near.pt", near=True)
    with pytest.raises(InvalidInputError, match="written as a copy"):
        repo.checkout_files("HEAD", near=True)
    with pytest.raises(InvalidInputError, match="cannot be required to be exact"):
        repo.checkout_files("HEAD", tmp_path / "near.pt", near=True, exact=True)
    assert not (tmp_path / "near.pt").exists()
