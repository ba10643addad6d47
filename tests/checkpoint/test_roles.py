"""Which moments belong to which weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptvcs.checkpoint.open import Checkpoint, open_checkpoint
from ckptvcs.checkpoint.optimizer_state import Rule
from ckptvcs.checkpoint.roles import LOSSY
from ckptvcs.checkpoint.state import STATE_FILE, state_checkpoint
from ckptvcs.checkpoint.torch_objects import gather


def stepped(
    model: nn.Module, params: Any, optimizer: type = torch.optim.AdamW, **options: Any
) -> Any:
    made = optimizer(params, lr=1e-3, **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    made.step()
    return made


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, 30),
        nn.BatchNorm1d(30),
        nn.Linear(30, 200),
        nn.LayerNorm(200),
        nn.Linear(200, 5),
    )


def pairs(checkpoint: Checkpoint) -> dict[str, str]:
    infos = checkpoint.schema.tensors
    return {i.name: infos[i.pair].name for i in infos if i.pair is not None}


def parts(checkpoint: Checkpoint) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for info in checkpoint.schema.tensors:
        found.setdefault(info.part, set()).add(info.name.split(".")[0])
    return found


def save(path: Path, state: Any) -> Checkpoint:
    torch.save(state, path)
    return open_checkpoint(path)


def expected(model: nn.Module, order: list[int] | None = None) -> dict[str, str]:
    names = [name for name, _ in model.named_parameters()]
    order = order or list(range(len(names)))
    return {
        f"optimizer.state.{position}.{kind}": f"model.{names[number]}"
        for position, number in enumerate(order)
        for kind in ("exp_avg", "exp_avg_sq")
    }


def test_order_in_one_file_with_buffers_between(tmp_path: Path) -> None:
    model = network()
    optimizer = stepped(model, model.parameters())
    checkpoint = save(
        tmp_path / "a.pt",
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        },
    )
    assert pairs(checkpoint) == expected(model)
    assert parts(checkpoint) == {"model": {"model"}, "optimizer": {"optimizer"}, "rest": {"rng"}}
    roles = {i.name: i.role for i in checkpoint.schema.tensors}
    assert roles["model.0.weight"] == "weight"
    assert roles["model.1.running_mean"] == "other"
    assert roles["rng"] == "other"


def test_decay_groups(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 200))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = stepped(model, groups)
    checkpoint = save(
        tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    numbers = {id(p): n for n, p in enumerate(model.parameters())}
    order = [numbers[id(p)] for p in [*matrices, *vectors]]
    assert pairs(checkpoint) == expected(model, order)


def test_names_win_over_order_and_cross_files(tmp_path: Path) -> None:
    model = network()
    named = list(model.named_parameters())[::-1]
    optimizer = stepped(model, named)
    assert "param_names" in optimizer.state_dict()["param_groups"][0]
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    found = pairs(open_checkpoint(folder))
    names = [name for name, _ in named]
    assert found == {
        f"optimizer.pt:state.{n}.{kind}": f"model.safetensors:{name}"
        for n, name in enumerate(names)
        for kind in ("exp_avg", "exp_avg_sq")
    }


def test_a_doubtful_order_pairs_nothing(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
    some = [model[0].weight, model[2].weight]  # could be any two of three
    optimizer = stepped(model, some)
    checkpoint = save(
        tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    assert pairs(checkpoint) == {}
    assert "optimizer" in parts(checkpoint)["optimizer"]


def test_frozen_layers_do_not_confuse(tmp_path: Path) -> None:
    model = network()
    model[4].requires_grad_(False)
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = stepped(model, free)
    checkpoint = save(
        tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    assert pairs(checkpoint) == expected(model, [0, 1, 2, 3, 4, 5, 6, 7])


def test_an_average_of_the_model_does_not_take_its_moments(tmp_path: Path) -> None:
    model, ema = network(), network()
    optimizer = stepped(model, model.parameters())
    checkpoint = save(
        tmp_path / "a.pt",
        {"ema": ema.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()},
    )
    assert pairs(checkpoint) == expected(model)


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(50, 20), "head": nn.Linear(20, 50, bias=False)})
    model["head"].weight = model["wte"].weight
    optimizer = stepped(model, model.parameters())
    checkpoint = save(
        tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    weights = [i for i in checkpoint.schema.tensors if i.part == "model"]
    assert [i.name for i in weights] == ["model.wte.weight"]
    assert {v.name for v in weights[0].views} == {"model.wte.weight", "model.head.weight"}
    assert set(pairs(checkpoint).values()) == {"model.wte.weight"}


def test_steps_are_found(tmp_path: Path) -> None:
    assert save(tmp_path / "a.pt", {"w": torch.ones(3), "global_step": 1234}).step == 1234
    assert save(tmp_path / "b.pt", {"w": torch.ones(3)}).step is None


# -- evidence --------------------------------------------------------------------------------------


def evidence(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Role and evidence of every tensor that has some."""
    infos = checkpoint.schema.tensors
    return {i.name: (i.role, i.evidence) for i in infos if i.evidence}


def lossy(checkpoint: Checkpoint) -> set[str]:
    return {i.name for i in checkpoint.schema.tensors if i.role in LOSSY}


def matrices(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(20, 30) for name in names}


def test_what_is_not_paired_beside_paired_weights_is_no_weight(tmp_path: Path) -> None:
    model = network()
    model.register_buffer("statistics", torch.randn(40, 40))
    optimizer = stepped(model, model.parameters())
    checkpoint = save(
        tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    known = evidence(checkpoint)
    assert known["model.0.weight"] == ("weight", "moments")
    assert known["optimizer.state.0.exp_avg"] == ("exp_avg", "optimizer")
    assert "model.statistics" not in lossy(checkpoint)


def test_a_module_says_which_of_its_tensors_are_weights() -> None:
    model = network()
    model.register_buffer("statistics", torch.randn(40, 40))
    state, names = gather(model, None, None, STATE_FILE)
    checkpoint = state_checkpoint(state, names)
    assert evidence(checkpoint)["model.0.weight"] == ("weight", "module")
    assert "model.statistics" not in lossy(checkpoint)


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "state_dict",
        "model_state_dict",
        "module",
        "ema",
        "model_ema",
        "netG",
        "generator",
        "teacher",
        "params",
        "net_1",
    ],
)
def test_a_state_dict_is_known_by_its_key_and_its_form(key: str, tmp_path: Path) -> None:
    name = f"{key}.0.weight"
    assert evidence(save(tmp_path / "a.pt", {key: matrices("0.weight"), "step": 3})) == {
        name: ("weight", "state dict")
    }
    nested = {key: {"0": matrices("weight")}}
    assert lossy(save(tmp_path / "b.pt", nested)) == {name}
    mixed = {key: {**matrices("0.weight"), "how": "by hand"}}
    assert not lossy(save(tmp_path / "c.pt", mixed))


def test_what_a_module_made_is_a_state_dict_by_any_key(tmp_path: Path) -> None:
    assert lossy(save(tmp_path / "a.pt", {"thing": nn.Linear(20, 30).state_dict()})) == {
        "thing.weight",
        "thing.bias",
    }
    assert not lossy(save(tmp_path / "b.pt", {"thing": matrices("weight")}))


@pytest.mark.parametrize(
    "key",
    [
        "replay_buffer",
        "obs_rms",
        "router_stats",
        "priorities",
        "modelling_data",
        "statistics",
        "histograms",
        "value_of_states",
        "embeddings_cache",
    ],
)
def test_a_name_of_a_weight_alone_is_no_evidence(key: str, tmp_path: Path) -> None:
    state = {key: matrices("weight", "0.weight", "v", "exp_avg", "exp_avg_sq_of"), "step": 1}
    assert not lossy(save(tmp_path / "a.pt", state))


def test_a_file_of_names_to_tensors_is_a_state_dict_if_the_names_are_such(tmp_path: Path) -> None:
    assert lossy(save(tmp_path / "a.pt", matrices("0.weight", "1.weight"))) == {
        "0.weight",
        "1.weight",
    }
    assert not lossy(save(tmp_path / "b.pt", matrices("rewards", "states", "actions")))
    assert lossy(save(tmp_path / "model.pt", matrices("w"))) == {"w"}
    save_file(matrices("w"), tmp_path / "c.safetensors")
    assert lossy(open_checkpoint(tmp_path / "c.safetensors")) == {"w"}


def moments(shape: tuple[int, ...] = (20, 30)) -> dict[str, torch.Tensor]:
    square = torch.rand(shape)
    return {"exp_avg": 0.1 * square.sqrt() * torch.randn(shape), "exp_avg_sq": square}


def flat(form: str) -> dict[str, torch.Tensor]:
    return {form.format(key): value for key, value in moments().items()}


@pytest.mark.parametrize(
    "form", ["state.0.weight.{}", "optimizer.state.{}.0.weight", "{}.0.weight", "0.weight.{}"]
)
def test_moments_of_flat_states_are_paired_by_name(form: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "a.pt", {"model": matrices("0.weight"), "optim": flat(form)})
    assert set(pairs(checkpoint).values()) == {"model.0.weight"}
    assert {role for role, how in evidence(checkpoint).values() if how == "beside its moments"} == {
        "exp_avg",
        "exp_avg_sq",
    }
    parts = {i.name: i.part for i in checkpoint.schema.tensors}
    assert {part for name, part in parts.items() if name.startswith("optim.")} == {"optimizer"}


def test_one_moment_without_the_other_needs_its_weight(tmp_path: Path) -> None:
    buffer = {"state.0.weight.momentum_buffer": torch.randn(20, 30)}
    alone = save(tmp_path / "a.pt", {"optim": buffer, "model": matrices("other.kernel")})
    assert lossy(alone) == {"model.other.kernel"}
    beside = save(tmp_path / "b.pt", {"optim": buffer, "model": matrices("0.weight")})
    assert "optim.state.0.weight.momentum_buffer" in lossy(beside)


def test_a_universal_checkpoint_holds_weights_beside_their_moments(tmp_path: Path) -> None:
    folder = tmp_path / "zero" / "layers.0.weight"
    folder.mkdir(parents=True)
    for name, value in {**moments(), "fp32": torch.randn(20, 30)}.items():
        torch.save({"param": value}, folder / f"{name}.pt")
    checkpoint = open_checkpoint(tmp_path)
    weight = "zero/layers.0.weight/fp32.pt:param"
    assert evidence(checkpoint)[weight] == ("weight", "moments")
    assert pairs(checkpoint) == {
        f"zero/layers.0.weight/{key}.pt:param": weight for key in ("exp_avg", "exp_avg_sq")
    }


def test_partitions_of_deepspeed_are_paired_with_their_moments(tmp_path: Path) -> None:
    state = {
        "state": {n: moments((600,)) for n in range(2)},
        "param_groups": [{"params": [0]}, {"params": [1]}],
    }
    checkpoint = save(
        tmp_path / "a.pt",
        {
            "optimizer_state_dict": {
                "base_optimizer_state": state,
                "single_partition_of_fp32_groups": [torch.randn(600), torch.randn(600)],
            }
        },
    )
    names = [f"optimizer_state_dict.single_partition_of_fp32_groups.{n}" for n in range(2)]
    assert [*dict.fromkeys(pairs(checkpoint).values())] == names


def test_an_optimizer_that_keeps_more_than_moments_is_exact(tmp_path: Path) -> None:
    state = {0: {**moments(), "GG": [torch.eye(20), torch.eye(30)]}}
    optimizer = {"state": state, "param_groups": [{"params": [0]}]}
    checkpoint = save(tmp_path / "a.pt", {"model": matrices("0.weight"), "optimizer": optimizer})
    assert lossy(checkpoint) == {"model.0.weight"}


@pytest.mark.parametrize(("key", "lossily"), [("z", True), ("ax", True), ("Q", False)])
def test_states_that_move_like_weights_belong_to_the_model(
    key: str, lossily: bool, tmp_path: Path
) -> None:
    optimizer = {"state": {0: {key: torch.randn(20, 30)}}, "param_groups": [{"params": [0]}]}
    checkpoint = save(tmp_path / "a.pt", {"model": matrices("w"), "optimizer": optimizer})
    (info,) = (i for i in checkpoint.schema.tensors if i.name.endswith(f".{key}"))
    assert (info.role in LOSSY, info.part) == (lossily, "model" if lossily else "optimizer")


def test_a_window_of_something_else_on_a_weight_makes_it_exact(tmp_path: Path) -> None:
    flat = torch.randn(4096 + 2000)
    state = {"model": {"w.weight": flat[:4096].view(64, 64)}, "statistics": flat[4096:]}
    assert not lossy(save(tmp_path / "a.pt", state))
    squares = torch.rand(2000)
    both = {"exp_avg": squares[:600].view(20, 30), "exp_avg_sq": squares[600:1200].view(20, 30)}
    optimizer = {"state": {0: both}, "param_groups": [{"params": [0]}]}
    checkpoint = save(tmp_path / "b.pt", {"model": matrices("0.weight"), "optimizer": optimizer})
    assert not {name for name in lossy(checkpoint) if name.startswith("optimizer")}
    tied = matrices("a.weight")
    tied["b.weight"] = tied["a.weight"]
    assert len(lossy(save(tmp_path / "c.pt", {"model": tied}))) == 1


def test_a_module_within_a_wrapper_says_which_tensors_are_weights() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.inner.register_buffer("memory", torch.randn(40, 40))

        def state_dict(self, *args: Any, **options: Any) -> Any:
            return self.inner.state_dict(*args, **options)

    state, names = gather(Wrapper(), None, None, STATE_FILE)
    found = evidence(state_checkpoint(state, names))
    assert found["model.0.weight"] == ("weight", "module")
    assert "model.memory" not in found


def test_where_the_order_is_doubtful_only_parameters_are_weights(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
    model.register_buffer("center", torch.randn(1, 256))
    model.register_buffer("queue", torch.randn(16, 16))
    optimizer = stepped(model, [model[0].weight, model[2].weight])
    checkpoint = save(
        tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    names = {name for name in lossy(checkpoint) if name.startswith("model")}
    assert names == {f"model.{n}.weight" for n in range(3)}


@pytest.mark.parametrize(
    "state",
    [
        {"obs_norm_state_dict": matrices("mean", "var")},
        {"dino_loss": matrices("center")},
        {"policy": matrices("actions")},
        {"critic": matrices("targets")},
        {"rollouts": {"actor": matrices("weight")}},
        {"normalizer": {"params": matrices("weight")}},
        {"replay_buffer": {"state_dict": matrices("0.weight")}},
        {"reward_norm": {"exp_avg": torch.randn(20, 30), "exp_avg_sq": torch.rand(20, 30)}},
        {
            "latents": {
                "mu": torch.randn(20, 30),
                "nu": torch.rand(20, 30),
                "value": torch.rand(20, 30),
            }
        },
    ],
)
def test_what_is_called_like_weights_elsewhere_is_exact(state: Any, tmp_path: Path) -> None:
    assert not lossy(save(tmp_path / "a.pt", state))


@pytest.mark.parametrize(
    "name",
    [
        "replay_buffer.safetensors",
        "normalizer.safetensors",
        "model_inputs.pt",
        "loss_ema.pt",
        "sample_weights.pt",
        "model_stats.pt",
    ],
)
def test_a_file_may_say_that_it_holds_something_else(name: str, tmp_path: Path) -> None:
    path, state = tmp_path / name, matrices("first", "second")
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    assert not lossy(open_checkpoint(path))


@pytest.mark.parametrize("name", ["w.codes", "optimizer.state.w", "replay.obs", "w.absmax.of"])
def test_what_stands_below_something_else_is_no_weight(name: str, tmp_path: Path) -> None:
    state = {"w": torch.randn(20, 30), "0.weight": torch.randn(20, 30), name: torch.rand(20, 30)}
    save_file(state, tmp_path / "model.safetensors")
    assert lossy(open_checkpoint(tmp_path / "model.safetensors")) == {"w", "0.weight"}


def test_parameters_of_any_name_are_paired_with_their_moments(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Parameter(torch.randn(20, 30))
            self.after = nn.Parameter(torch.randn(30, 20, dtype=torch.complex64))

    model = Bare()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    known = evidence(save(tmp_path / "a.pt", both))
    assert known["model.before"] == known["model.after"] == ("weight", "moments")
    # Alone they may be buffers.
    assert not lossy(save(tmp_path / "b.pt", {"model": model.state_dict()}))


def rule_of_first(state: dict[str, Any], path: Path) -> Rule:
    checkpoint = save(path, {"model": matrices("a.weight"), **state})
    (number,) = (
        number for number, info in enumerate(checkpoint.schema.tensors) if info.role == "exp_avg"
    )
    return checkpoint.rules[number]


def test_names_of_moments_alone_do_not_say_for_sure_that_they_are_those_of_adam(
    tmp_path: Path,
) -> None:
    named = {f"state.a.weight.{key}": value for key, value in moments().items()}
    assert rule_of_first(named, tmp_path / "a.pt") == Rule(kind="adam", is_sure=False)
    more = {**named, "state.a.weight.last_grad": torch.randn(20, 30)}
    assert rule_of_first(more, tmp_path / "b.pt").kind == ""
    number = {**named, "state.a.weight.step": torch.tensor(3.0)}
    assert rule_of_first(number, tmp_path / "c.pt").kind == "adam"
    factored = {**named, "state.b.weight.exp_avg_sq_row": torch.rand(200)}
    assert rule_of_first(factored, tmp_path / "d.pt").kind == ""
