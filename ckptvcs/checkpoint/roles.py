"""What each tensor is for: part, role, and the weight that a moment belongs to.

Roles are found, not configured, and a wrong one costs quality, never correctness: values that
are coded with loss are measured, and everything that is not understood is exact.

    optimizer   a dict with `state` (index -> dict of tensors) and `param_groups`
    pairs       by `param_names` in the groups; else by the order of parameters in the same file,
                where the shapes allow exactly one alignment; else none
    weight      a float tensor reached through dicts only, and not a known buffer
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ckptvcs.checkpoint.layout import Found, Layout
from ckptvcs.checkpoint.pickles import StorageRef, TensorRef, walk
from ckptvcs.dtypes import WEIGHT_DTYPES

WEIGHT, OTHER = "weight", "other"

FIRST = {
    "exp_avg": "exp_avg_sq",  # Adam and its kin; Lion keeps it alone
    "momentum_buffer": None,  # SGD, RMSprop, Muon
    "grad_avg": None,  # RMSprop, centered
    "exp_avg_diff": None,  # Adan
}
"""Keys of optimizer state that are averages of gradients -> the key whose root divides them."""

SECOND = frozenset({
    "exp_avg_sq", "max_exp_avg_sq",  # Adam, amsgrad
    "square_avg",  # RMSprop
    "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance",  # Adafactor
})  # fmt: skip
"""Keys of optimizer state that are averages of squared gradients."""

MASTERS = frozenset({
    "master_param", "master_params", "master_weight", "master_weights", "master", "fp32_param",
    "param_fp32",
})  # fmt: skip
"""Keys of optimizer state that are the weights themselves, in float32: they belong to the model."""

MOMENTS = frozenset(FIRST) | SECOND
"""Keys of optimizer state that lossy coding knows how to treat."""

LOSSY = MOMENTS | {WEIGHT}
"""Roles of tensors that are coded with loss, where their type allows it."""


@dataclass(frozen=True)
class Rule:
    """What an optimizer does with its moments, from its `param_groups`; else Adam's defaults."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


_BUFFERS = frozenset({
    "running_mean", "running_var", "num_batches_tracked", "inv_freq", "position_ids",
    "masked_bias", "attn_mask", "causal_mask", "token_type_ids",
})  # fmt: skip

_REST_FILES = (
    "rng_state", "random_states", "scheduler", "scaler", "training_args", "trainer_state",
    "sampler", "dl_state_dict", "custom_checkpoint",
)  # fmt: skip
_REST_KEYS = frozenset({
    "rng", "rng_state", "rng_states", "cuda_rng_state", "torch_rng_state", "numpy_rng_state",
    "scheduler", "lr_scheduler", "lr_schedulers", "scaler", "grad_scaler", "args", "config",
    "hyper_parameters", "callbacks", "loops", "random_state", "sampler",
})  # fmt: skip
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "")


@dataclass
class Role:
    """What one found tensor is for; `pair` is the weight of a moment, `rule` its optimizer's."""

    part: str
    role: str
    pair: Found | None = None
    rule: Rule | None = None


@dataclass
class _Slot:
    """A parameter of an optimizer: its state tensors by key, and its name if the file has it."""

    state: dict[str, Found]
    name: str | None
    rule: Rule


@dataclass
class _Optimizer:
    groups: list[list[_Slot]]
    file: int


Names = dict[tuple[str, str], list[list[str | None]]]
"""For an optimizer, by the file it is in and its place there (dotted), the names of the parameters
of each group, as far as they are known.
"""


def assign_roles(files: list[tuple[str, Layout]], names: Names) -> list[list[Role]]:
    """Roles for every tensor of every file (path, layout), in their order; `names` count more than
    those that stand in the files.
    """
    roles = [[_default_role(path, found) for found in layout.tensors] for path, layout in files]
    by_id = {
        id(found): role
        for (_, layout), row in zip(files, roles, strict=True)
        for found, role in zip(layout.tensors, row, strict=True)
    }
    optimizers: list[_Optimizer] = []
    for number, (path, layout) in enumerate(files):
        known = {found.key: found for found in layout.tensors if found.key}
        given = {place: row for (file, place), row in names.items() if file == path}
        optimizers += _find_optimizers(layout.tree, known, number, given)
    for optimizer in optimizers:
        for slot in (slot for group in optimizer.groups for slot in group):
            for key, found in slot.state.items():
                master = key in MASTERS and found.dtype == "F32"
                by_id[id(found)].part = "model" if master else "optimizer"
                by_id[id(found)].role = WEIGHT if master else key
                by_id[id(found)].rule = slot.rule
    candidates = [
        (found, number)
        for number, (_, layout) in enumerate(files)
        for found in _weights(layout, by_id)
    ]
    for found, _ in candidates:
        by_id[id(found)].role = WEIGHT
    for optimizer in optimizers:
        for slot, weight in _pair(optimizer, candidates):
            for found in slot.state.values():
                if found.shape == weight.shape:
                    by_id[id(found)].pair = weight
    return roles


def _default_role(path: str, found: Found) -> Role:
    stem = PurePosixPath(path).name
    top = found.name.split(".")[0].lower()
    unnamed = not found.key or found.name.startswith("storage.")
    if unnamed or stem.startswith(_REST_FILES) or top in _REST_KEYS or "rng" in top.split("_"):
        return Role("rest", OTHER)
    return Role("optimizer" if stem.startswith("optimizer") else "model", OTHER)


def _storage_key(node: object) -> str | None:
    if isinstance(node, TensorRef):
        return node.storage.key
    return node.key if isinstance(node, StorageRef) else None


def _find_optimizers(
    tree: object, known: dict[str, Found], file: int, given: dict[str, list[list[str | None]]]
) -> Iterable[_Optimizer]:
    for path, node in walk(tree):
        if not isinstance(node, dict):
            continue
        state, groups = node.get("state"), node.get("param_groups")
        if not isinstance(state, dict) or not isinstance(groups, list):
            continue
        slots: list[list[_Slot]] = []
        rows = given.get(".".join(path), [])
        for number, group in enumerate(groups):
            if not isinstance(group, dict) or not isinstance(group.get("params"), list):
                break
            names = rows[number] if number < len(rows) else group.get("param_names")
            if names is None and all(type(index) is str for index in group["params"]):
                names = group["params"]  # as `get_optimizer_state_dict` of torch has them
            if not isinstance(names, list) or len(names) != len(group["params"]):
                names = [None] * len(group["params"])
            rule = _rule(group)
            slots.append([
                _Slot(
                    _state_tensors(state, index, known), name if type(name) is str else None, rule
                )
                for index, name in zip(group["params"], names, strict=True)
            ])  # fmt: skip
        else:
            yield _Optimizer(slots, file)


def _rule(group: dict[Any, Any]) -> Rule:
    """What a group of parameters says of its moments; a default for what is missing or absurd."""
    betas = group.get("betas")
    pair = betas if isinstance(betas, list | tuple) and len(betas) > 1 else (None, None)
    values = (pair[0], group.get("alpha", pair[1]), group.get("eps"))
    known = (
        value if isinstance(value, float | int) and 0 <= value < 1 else default
        for value, default in zip(values, (Rule.beta1, Rule.beta2, Rule.eps), strict=True)
    )
    return Rule(*known)


def _state_tensors(
    state: dict[Any, Any], index: object, known: dict[str, Found]
) -> dict[str, Found]:
    entry = state.get(index) if isinstance(index, int | str) else None
    if entry is None and type(index) is int:
        entry = state.get(str(index))  # torch.distributed.checkpoint makes all keys text
    if not isinstance(entry, dict):
        return {}
    keys = {name: _storage_key(node) for name, node in entry.items() if isinstance(name, str)}
    return {name: known[key] for name, key in keys.items() if key is not None and key in known}


def _weights(layout: Layout, roles: dict[int, Role]) -> list[Found]:
    """The float tensors of a file that can be weights, in the file's own order of names."""
    if layout.format == "safetensors":
        ordered = layout.tensors
    else:
        known = {found.key: found for found in layout.tensors if found.key}
        keys = (_storage_key(node) for path, node in walk(layout.tree) if _plain(path))
        ordered = [known[key] for key in dict.fromkeys(keys) if key is not None and key in known]
    return [
        found for found in ordered
        if roles[id(found)].part == "model" and found.dtype in WEIGHT_DTYPES
        and found.name.split(".")[-1] not in _BUFFERS
    ]  # fmt: skip


def _plain(path: tuple[str, ...]) -> bool:
    """Whether a path leads through dicts and modules only, not through calls or buffers."""
    return not any(step.startswith("@") or step == "_buffers" for step in path)


def _pair(optimizer: _Optimizer, candidates: list[tuple[Found, int]]) -> list[tuple[_Slot, Found]]:
    slots = [slot for group in optimizer.groups for slot in group]
    if any(slot.name is not None for slot in slots):
        # Shards of a weight have one name: first those that stand where the optimizer does.
        own = [found for found, file in candidates if file == optimizer.file]
        return _pair_by_name(slots, own) or _pair_by_name(slots, [found for found, _ in candidates])
    containers: dict[str, list[Found]] = {}
    for found, file in candidates:
        if file == optimizer.file:
            top, dot, _ = found.name.partition(".")
            containers.setdefault(top if dot else "", []).append(found)
    fitting = {}
    for name, founds in containers.items():
        pairs = _pair_by_order(optimizer.groups, founds)
        if pairs:
            fitting[name] = pairs
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    # A copy of the model (an average, say) fits as well as the model: prefer what says so.
    return next((fitting[name] for name in _MODEL_KEYS if name in fitting), [])


def _pair_by_name(slots: list[_Slot], weights: list[Found]) -> list[tuple[_Slot, Found]]:
    """Names match whole, or as the end of one tensor's name only."""
    ends: dict[str, list[Found]] = {}
    for found in weights:
        names = {found.name, *(view.name for view in found.views)}
        for name in names:
            steps = name.split(".")
            for start in range(len(steps)):
                ends.setdefault(".".join(steps[start:]), []).append(found)
    pairs = []
    for slot in slots:
        options = ends.get(slot.name or "", [])
        whole = [found for found in options if found.name == slot.name]
        options = whole or [found for found in options if found.name.split(".")[0] in _MODEL_KEYS] \
            or options  # fmt: skip
        if len(options) == 1:
            pairs.append((slot, options[0]))
    return pairs


def _shape(slot: _Slot) -> tuple[int, ...] | None:
    """The shape of a parameter, as its moments show it; None where it has none."""
    shapes = {found.shape for key, found in slot.state.items() if key != "step"}
    return shapes.pop() if len(shapes) == 1 else None


def _pair_by_order(groups: list[list[_Slot]], weights: list[Found]) -> list[tuple[_Slot, Found]]:
    """Pairs if every group is a subsequence of the weights in exactly one way, without overlap."""
    pairs: list[tuple[_Slot, Found]] = []
    taken: set[int] = set()
    shapes = [found.shape for found in weights]
    for group in groups:
        known = [(slot, shape) for slot in group if (shape := _shape(slot)) is not None]
        wanted = [shape for _, shape in known]
        first = _embed(wanted, shapes)
        last = _embed(wanted[::-1], shapes[::-1])
        if first is None or last is None:
            return []
        if first != [len(shapes) - 1 - position for position in reversed(last)]:
            return []
        if taken.intersection(first):
            return []
        taken.update(first)
        pairs += [
            (slot, weights[position]) for (slot, _), position in zip(known, first, strict=True)
        ]
    return pairs


def _embed(wanted: list[tuple[int, ...]], shapes: list[tuple[int, ...]]) -> list[int] | None:
    """The leftmost way to find `wanted` as a subsequence of `shapes`."""
    positions, at = [], 0
    for shape in wanted:
        while at < len(shapes) and shapes[at] != shape:
            at += 1
        if at == len(shapes):
            return None
        positions.append(at)
        at += 1
    return positions
