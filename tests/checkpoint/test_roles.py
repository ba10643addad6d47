"""Which moments belong to which weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ckptvcs.checkpoint.checkpoint import Checkpoint, open_checkpoint


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
        nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 200), nn.LayerNorm(200),
        nn.Linear(200, 5),
    )  # fmt: skip


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
        for position, number in enumerate(order) for kind in ("exp_avg", "exp_avg_sq")
    }  # fmt: skip


def test_order_in_one_file_with_buffers_between(tmp_path: Path) -> None:
    model = network()
    optimizer = stepped(model, model.parameters())
    checkpoint = save(
        tmp_path / "a.pt",
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
         "rng": torch.get_rng_state()},
    )  # fmt: skip
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
        for n, name in enumerate(names) for kind in ("exp_avg", "exp_avg_sq")
    }  # fmt: skip


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
        {"ema": ema.state_dict(), "model": model.state_dict(),
         "optimizer": optimizer.state_dict()},
    )  # fmt: skip
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
