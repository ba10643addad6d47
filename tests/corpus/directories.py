"""Layouts of directories: Hugging Face, DeepSpeed, FSDP, Megatron."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from tests.corpus.layouts import Files, Layout, load, load_tensors
from tests.corpus.optimizers import ANYTHING, ELEMENTS
from tests.corpus.parts import ByName, Parts, cut, join, put, ranges, shares, take
from tests.corpus.training import State, Training

RANKS = 2


@dataclass(frozen=True)
class HuggingFace(Files):
    """`checkpoint-N` of the Trainer, or `accelerator.save_state`; its weights in so many files."""

    optimizer: str
    shards: int = 1
    form: ClassVar[int] = ANYTHING

    def write(self, folder: Path, training: Training, step: int) -> Path:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        weights = training.model.state_dict()
        for number, file in enumerate(self._files()):
            share = {name: weights[name] for name in list(weights)[number :: self.shards]}
            save_file(share, path / file, {"format": "pt"})
        torch.save(training.optimizer.state_dict(), path / self.optimizer)
        torch.save({"cpu": torch.get_rng_state()}, path / "rng_state.pth")
        (path / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        return path

    def read(self, path: Path, training: Training) -> None:
        found = [load_file(path / file) for file in self._files()]
        training.model.load_state_dict({n: v for share in found for n, v in share.items()})
        training.optimizer.load_state_dict(load(path / self.optimizer))

    def _files(self) -> list[str]:
        if self.shards == 1:
            return ["model.safetensors"]
        return [
            f"model-{number + 1:05}-of-{self.shards:05}.safetensors"
            for number in range(self.shards)
        ]


class fragment_address:
    """Where a weight lies in a flat share."""

    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


@contextmanager
def _deepspeed() -> Iterator[None]:
    """Pickles name the class as those of DeepSpeed do."""
    name = fragment_address.__module__ = "deepspeed.utils.tensor_fragment"
    parents = ("deepspeed", "deepspeed.utils", name)
    modules = {parent: ModuleType(parent) for parent in parents}
    modules[name].fragment_address = fragment_address  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for parent in parents:
            del sys.modules[parent]


@dataclass(frozen=True)
class Zero(Files):
    """A directory of DeepSpeed: 16-bit weights, and a share of flat float32 weights and states for
    each rank.  In stage 3 a rank has its share of each weight, and the model's file has none.
    """

    stage: int
    joined: ClassVar[bool] = True
    form: ClassVar[int] = ELEMENTS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        path = folder / f"global_step{step}"
        path.mkdir()
        parts = take(training)
        kind = torch.bfloat16
        module = {name: value.to(kind) for name, value in parts.weights.items()}
        shapes = [
            OrderedDict((name, parts.weights[name].shape) for name in group["params"])
            for group in parts.groups
        ]
        common = {"ds_config": {"zero_optimization": {"stage": self.stage}}, "ds_version": "0.16.3"}
        for rank in range(RANKS if self.stage == 3 else 1):
            name = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
            state = {
                "module": {} if self.stage == 3 else module,
                "buffer_names": [],
                "optimizer": None,
                "param_shapes": shapes,
                "frozen_param_shapes": None,
                "shared_params": {},
                "lr_scheduler": None,
                "global_steps": step,
                "dp_world_size": RANKS,
                **common,
            }
            torch.save(state, path / f"{name}mp_rank_00_model_states.pt")
        with _deepspeed():
            for rank in range(RANKS):
                name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
                torch.save(
                    {"optimizer_state_dict": self._share(parts, rank), **common}, path / name
                )
        return path

    def _flat(self, tensors: ByName, names: list[str], rank: int) -> torch.Tensor:
        if self.stage == 3:
            return join([shares(join([tensors[n]], RANKS), RANKS)[rank] for n in names])
        return shares(join([tensors[name] for name in names], 2 * RANKS), RANKS)[rank]

    def _share(self, parts: Parts, rank: int) -> State:
        base: State = {"state": {}, "param_groups": []}
        flats, mappings = [], []
        for number, group in enumerate(parts.groups):
            names = group["params"]
            flats.append(self._flat(parts.weights, names, rank))
            base["state"][number] = {
                **dict(parts.rest.get(names[0], {})),
                **{k: self._flat(v, names, rank) for k, v in parts.of_group(number).items()},
            }
            base["param_groups"].append({**group, "params": [number]})
            mappings.append(
                OrderedDict(
                    (name, fragment_address(numel, start))
                    for name, start, numel in ranges(names, parts.weights, rank, len(flats[-1]))
                )
            )
        shared = {
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "zero_stage": self.stage,
            "partition_count": [RANKS] * len(flats),
        }
        # What stands in param_groups names its weights by numbers; the loader needs the names.
        names_of_groups = [group["params"] for group in parts.groups]
        if self.stage == 3:
            return {
                **shared,
                "optimizer_state_dict": base,
                "fp32_flat_groups": flats,
                "names": names_of_groups,
            }
        return {
            **shared,
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": flats,
            "group_paddings": [0] * len(flats),
            "param_slice_mappings": mappings,
            "names": names_of_groups,
        }

    def read(self, path: Path, training: Training) -> None:
        with _deepspeed():
            rows = [
                load(path / f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt")
                for r in range(RANKS)
            ]
        ranks = [row["optimizer_state_dict"] for row in rows]
        base = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        flat = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        like = training.model.state_dict()
        weights: ByName = {}
        states: dict[str, ByName] = {}
        rest: dict[str, State] = {}
        groups = []
        for number, names in enumerate(ranks[0]["names"]):
            weights |= self._whole([rank[flat][number] for rank in ranks], names, like)
            own = [rank[base]["state"].get(number, {}) for rank in ranks]
            for key, value in own[0].items():
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    whole = self._whole([one[key] for one in own], names, like)
                    states.setdefault(key, {}).update(whole)
                else:
                    for name in names:
                        rest.setdefault(name, {})[key] = _own(value)
            groups.append({**ranks[0][base]["param_groups"][number], "params": names})
        put(training, Parts(weights, states, rest, groups))

    def _whole(self, flats: list[torch.Tensor], names: list[str], like: ByName) -> ByName:
        if self.stage < 3:
            return cut(torch.cat(flats), names, like)
        found, at = {}, 0
        for name in names:
            size = -(-like[name].numel() // RANKS)
            whole = torch.cat([flat[at : at + size] for flat in flats])
            found[name] = whole[: like[name].numel()].view(like[name].shape)
            at += size
        return found


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Universal(Files):
    """A universal checkpoint of DeepSpeed: a folder for each weight."""

    form: ClassVar[int] = ELEMENTS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        path = folder / f"global_step{step}_universal"
        parts = take(training)
        for name, weight in parts.weights.items():
            own = path / "zero" / name
            own.mkdir(parents=True)
            torch.save({"param": weight}, own / "fp32.pt")
            for key, by_name in parts.states.items():
                if name in by_name:
                    torch.save({"param": by_name[name]}, own / f"{key}.pt")
            torch.save(parts.rest.get(name, {}), own / "step.pt")
        state = {"param_groups": parts.groups, "zero_stage": 1}
        torch.save({"optimizer_state_dict": state}, path / "zero" / "optimizer_state.pt")
        module = {name: value.to(torch.bfloat16) for name, value in parts.weights.items()}
        info = {"universal_checkpoint_version": 0.2, "original_vocab_size": 512}
        torch.save(
            {"module": module, "global_steps": step, "universal_checkpoint_info": info},
            path / "mp_rank_00_model_states.pt",
        )
        return path

    def read(self, path: Path, training: Training) -> None:
        weights: ByName = {}
        states: dict[str, ByName] = {}
        rest: dict[str, State] = {}
        for name in training.model.state_dict():
            for file in (path / "zero" / name).iterdir():
                found = load(file)
                if file.stem == "step":
                    rest[name] = found
                elif file.stem == "fp32":
                    weights[name] = found["param"]
                else:
                    states.setdefault(file.stem, {})[name] = found["param"]
        saved = load(path / "zero" / "optimizer_state.pt")["optimizer_state_dict"]
        put(training, Parts(weights, states, rest, saved["param_groups"]))


@dataclass(frozen=True)
class FlatParameters(Files):
    """FSDP with flat parameters: two units, and a file of each kind for each rank."""

    joined: ClassVar[bool] = True
    form: ClassVar[int] = ELEMENTS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        parts = take(training)
        units = _units(parts)
        for rank in range(RANKS):
            model: State = {}
            state: State = {}
            for unit, names in units.items():
                model[unit] = shares(join([parts.weights[n] for n in names], RANKS), RANKS)[rank]
                state[unit] = {
                    **parts.rest.get(names[0], {}),
                    **{
                        key: shares(join([own[n] for n in names], RANKS), RANKS)[rank]
                        for key, own in parts.states.items()
                        if names[0] in own
                    },
                }
            group = {**parts.groups[0], "params": list(units)}
            optimizer = {"state": state, "param_groups": [group]}
            torch.save(model, path / f"pytorch_model_fsdp_rank{rank}.bin")
            torch.save({**optimizer, "groups": parts.groups}, path / f"optimizer_rank{rank}.bin")
        return path

    def read(self, path: Path, training: Training) -> None:
        models = [load(path / f"pytorch_model_fsdp_rank{rank}.bin") for rank in range(RANKS)]
        saved = [load(path / f"optimizer_rank{rank}.bin") for rank in range(RANKS)]
        like = training.model.state_dict()
        parts = Parts({}, {}, {}, saved[0]["groups"])
        for unit, names in _units(Parts(dict(like), {}, {}, parts.groups)).items():
            parts.weights |= cut(torch.cat([model[unit] for model in models]), names, like)
            for key, value in saved[0]["state"][unit].items():
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    whole = torch.cat([one["state"][unit][key] for one in saved])
                    parts.states.setdefault(key, {}).update(cut(whole, names, like))
                else:
                    for name in names:
                        parts.rest.setdefault(name, {})[key] = _own(value)
        put(training, parts)


def _units(parts: Parts) -> dict[str, list[str]]:
    """Names of weights by their flat parameter: one for each group of the optimizer and half of
    the model.
    """
    units: dict[str, list[str]] = {}
    for number, group in enumerate(parts.groups):
        for name in group["params"]:
            half = "layers.0" if name.startswith(("embed", "into", "last")) else "layers.1"
            units.setdefault(f"_fsdp_wrapped_module.{half}._flat_param{number}", []).append(name)
    return units


def _decoder(name: str) -> str:
    """A name as Megatron has it."""
    inner = {
        "embed.": "embedding.word_embeddings.",
        "into.": "decoder.layers.0.mlp.linear_fc1.",
        "middle.": "decoder.layers.0.mlp.linear_fc2.",
        "head.": "output_layer.",
        "norm.": "decoder.layers.0.input_layernorm.",
    }
    for start, other in inner.items():
        if name.startswith(start):
            return other + name[len(start) :]
    return f"decoder.{name}"


@dataclass(frozen=True)
class Megatron(Files):
    """`iter_0000100` of Megatron: the distributed optimizer has the weights' float32 masters and
    states in buckets, from the last weight to the first.
    """

    joined: ClassVar[bool] = True
    form: ClassVar[int] = ELEMENTS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        path = folder / f"iter_{step:07}"
        (path / "mp_rank_00").mkdir(parents=True)
        parts = take(training)
        model = {_decoder(name): value.to(torch.bfloat16) for name, value in parts.weights.items()}
        saved = {
            "param_groups": [
                {**group, "params": list(range(len(group["params"])))} for group in parts.groups
            ]
        }
        state = {
            "args": {"num_layers": 2},
            "checkpoint_version": 3.0,
            "iteration": step,
            "model": model,
            "optimizer": {"optimizer": saved},
            "opt_param_scheduler": {"num_steps": step * 64},
            "rest": parts.rest,
            "groups": parts.groups,
        }
        torch.save(state, path / "mp_rank_00" / "model_optim_rng.pt")
        buckets: dict[int, Any] = {}
        for number, group in enumerate(parts.groups):
            names = group["params"][::-1]
            tensors = {"param": parts.weights, **parts.of_group(number)}
            kinds = (torch.bfloat16, torch.float32)
            flats = {key: join([own[n] for n in names], 128) for key, own in tensors.items()}
            buckets[number] = {kinds: [{**flats, "numel_unpadded": 0}]}
        torch.save(buckets, path / "mp_rank_00" / "distrib_optim.pt")
        return path

    def read(self, path: Path, training: Training) -> None:
        state = load(path / "mp_rank_00" / "model_optim_rng.pt")
        like = training.model.state_dict()
        parts = Parts({}, {}, state["rest"], state["groups"])
        for number, by_kind in load(path / "mp_rank_00" / "distrib_optim.pt").items():
            names = parts.groups[number]["params"][::-1]
            ((bucket,),) = by_kind.values()
            for key, flat in bucket.items():
                if key == "param":
                    parts.weights |= cut(flat, names, like)
                elif key != "numel_unpadded":
                    parts.states.setdefault(key, {}).update(cut(flat, names, like))
        put(training, parts)


@dataclass(frozen=True)
class MegatronNames(Files):
    """The same as `torch_dist`: a directory of torch.distributed.checkpoint whose names begin with
    what a tensor is.
    """

    form: ClassVar[int] = ELEMENTS

    def write(self, folder: Path, training: Training, step: int) -> Path:
        path = folder / f"iter_{step:07}"
        parts = take(training)
        state: State = {_decoder(n): v.to(torch.bfloat16) for n, v in parts.weights.items()}
        for key, own in {"fp32_param": parts.weights, **parts.states}.items():
            state |= {f"optimizer.state.{key}.{_decoder(n)}": v for n, v in own.items()}
        save(state, storage_writer=FileSystemWriter(path), no_dist=True)
        common = {
            "iteration": step,
            "rest": parts.rest,
            "groups": parts.groups,
            "optimizer": {"param_groups": [{"params": [0]}]},
        }
        torch.save(common, path / "common.pt")
        return path

    def read(self, path: Path, training: Training) -> None:
        common = load(path / "common.pt")
        found: State = {}
        load_tensors(found, path)
        parts = Parts({}, {}, common["rest"], common["groups"])
        for name in training.model.state_dict():
            place = _decoder(name)
            for key, value in found.items():
                if key.startswith("optimizer.state.") and key.endswith("." + place):
                    kind = key.removeprefix("optimizer.state.").removesuffix("." + place)
                    if kind == "fp32_param":
                        parts.weights[name] = value
                    else:
                        parts.states.setdefault(kind, {})[name] = value
        put(training, parts)


DIRECTORIES: dict[str, Layout] = {
    "trainer": HuggingFace("optimizer.pt"),
    "trainer shards": HuggingFace("optimizer.pt", shards=2),
    "accelerate": HuggingFace("optimizer.bin"),
    "zero 2": Zero(2),
    "zero 3": Zero(3),
    "universal": Universal(),
    "flat parameters": FlatParameters(),
    "megatron": Megatron(),
    "megatron torch_dist": MegatronNames(),
}
