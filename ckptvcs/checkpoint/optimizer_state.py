"""Find optimizer states: the moments of each parameter, and the optimizer's rule.

    plain   a dict with `state` (index -> dict of tensors) and `param_groups`
    flat    the same keys in tensor names: `state.layers.0.weight.exp_avg` (torch.distributed),
            `optimizer.state.exp_avg.layers.0.weight` and `{"param": ..., "exp_avg": ...}`
            (Megatron), `zero/layers.0.weight/exp_avg.pt` (universal checkpoints of DeepSpeed)

A name alone is not evidence.  A tensor of a flat state is a moment only if it is beside its weight
or beside the other moment, with the same shape.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from ckptvcs.checkpoint.conventions import words
from ckptvcs.checkpoint.layout import Layout, StoredTensor
from ckptvcs.checkpoint.pickle_reader import StorageRef, TensorRef, walk

FIRST: dict[str, tuple[str, ...]] = {
    "exp_avg": ("exp_avg_sq", "exp_avg_var"),  # Adam and its variants; Lion has no second moment
    "exp_avg_fast": ("exp_avg_sq",),  # AdEMAMix
    "exp_avg_slow": (),
    "momentum_buffer": (),  # SGD, RMSprop, Muon
    "grad_avg": (),  # RMSprop, centred
    "exp_avg_diff": (),  # Adan
    "m": ("v",),
    "mu": ("nu",),  # hand-written optimizers, optax
}
"""Averages of gradients -> the second moments that may divide them, or their roots (state keys)."""

SECOND = words(
    "exp_avg_sq max_exp_avg_sq exp_avg_var",  # Adam, amsgrad, AdaBelief
    "square_avg acc_delta",  # RMSprop, Adadelta
    "sum",  # Adagrad
    "exp_inf",  # Adamax
    "hessian",  # Sophia
    "exp_avg_sq_row exp_avg_sq_col row_var col_var variance",  # Adafactor
    "v nu",
)
"""State keys of moments that are never negative: averages of squares and similar quantities."""

DIVIDING = words("exp_avg_sq max_exp_avg_sq exp_avg_var exp_inf hessian v nu")
"""State keys of second moments that divide (or whose roots divide) a stored average."""

MASTERS = words(
    "master_param master_params master_weight master_weights master fp32_param param_fp32"
)
"""State keys of float32 copies of the weights; these belong to the part `model`."""

FACTORS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))
"""State keys of vectors whose outer product approximates a matrix of second moments."""

ITERATES = frozenset({"z", "ax"})
"""State keys of tensors that change like weights: schedule-free iterates, averages of ASGD."""

MOMENTS = frozenset(FIRST) | SECOND
"""State keys of all moments that the lossy codecs support."""

_SHORT = frozenset({"m", "v", "mu", "nu", "sum", "variance", "hessian"})
"""State keys that have other meanings outside optimizers."""

_FLAT = MOMENTS - _SHORT
_BESIDE = ("w", "p", "param", "params", "value", "model", "weights", "master")
_TRIPLES = {"m": ("v", _BESIDE), "mu": ("nu", tuple(w for w in _BESIDE if w != "value"))}
_WEIGHTS_BESIDE = ("param", "fp32", "fp32_param", "master_param", "master", "p")
_KEYS = _FLAT | {*_TRIPLES, "v", "nu", *_BESIDE, *_WEIGHTS_BESIDE}
"""Parts of names that may be state keys, or keys of the weight beside the moments."""

_EXPECTED = _KEYS | MASTERS | ITERATES
"""Parts of names of tensors that may be beside the moments of a parameter."""

_ADAM = words(
    "step exp_avg exp_avg_sq max_exp_avg_sq mu_product exp_avg_fast exp_avg_slow exp_avg_diff",
    "exp_avg_var master_param master_params param_remainder",
)
"""State keys of optimizers with Adam's update rule.  Any other key means another rule."""

_OPTIMIZER = re.compile(r"(optim|opt_state|adam|sgd|muon|lion)", re.IGNORECASE)
_CHUNK = re.compile(r"\[[0-9:,]*\]\Z")


@dataclass(frozen=True)
class Rule:
    """An optimizer's update rule, from its `param_groups`; the defaults are those of Adam.

    `beta1` is also the momentum.  `alpha` is the weight of the slow average (AdEMAMix), or rho
    (Sophia).  `kind` is `adam`, `sgd`, `lion`, `muon`, or empty if the rule is unknown.  `is_sure`
    is false if only state names show the kind: LaProp, for one, has the same names as Adam.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    alpha: float = 0.0
    kind: str = ""
    is_sure: bool = True


@dataclass
class Slot:
    """A parameter of an optimizer, with its state tensors by key.

    names           possible names of the parameter, the most likely one first
    weight          the parameter's tensor, if it is beside its moments
    closed          it also has state of unknown use (such as the bases of SOAP): stay exact
    doubtful        its tensors are moments only if a weight has one of its names
    is_optimizers   its name contains the name of an optimizer
    """

    state: dict[str, StoredTensor]
    names: tuple[str, ...]
    rule: Rule
    weight: StoredTensor | None = None
    closed: bool = False
    doubtful: bool = False
    is_optimizers: bool = False


@dataclass
class Optimizer:
    """A plain optimizer state in a file: its parameter groups, and all tensors below it."""

    groups: list[list[Slot]]
    file: int
    tensors: list[StoredTensor] = field(default_factory=list)

    @property
    def slots(self) -> list[Slot]:
        """The parameters of all groups."""
        return [slot for group in self.groups for slot in group]


Names = dict[tuple[str, str], list[list[str | None]]]
"""Parameter names by file and dotted path of an optimizer or module in it.

An optimizer has one list for each group, with None for unknown names; a module has one list.
"""


def storage_key(node: object) -> str | None:
    """Return the key of a tree node's storage in its file; None for other nodes."""
    if isinstance(node, StoredTensor):
        return node.key
    if isinstance(node, TensorRef):
        return node.storage.key
    return node.key if isinstance(node, StorageRef) else None


# -- plain -----------------------------------------------------------------------------------------


def find_optimizers(
    layout: Layout, file: int, given: Mapping[str, list[list[str | None]]]
) -> Iterable[Optimizer]:
    """Yield the plain optimizer states of a file; `given` has parameter names by dotted path."""
    by_key = layout.by_key
    for path, node in walk(layout.tree, (dict,)):
        if not isinstance(node, dict) or not _is_optimizer(node):
            continue
        state, groups = node["state"], node["param_groups"]
        rows = given.get(".".join(path), [])
        slots = []
        for number, group in enumerate(groups):
            names = _group_names(group, rows[number] if number < len(rows) else None)
            pairs = zip(group["params"], names, strict=True)
            slots.append([_slot(_entry(state, i), by_key, name, group) for i, name in pairs])
        keys = (storage_key(inner) for _, inner in walk(node, (TensorRef, StorageRef)))
        below = [by_key[key] for key in dict.fromkeys(keys) if key is not None and key in by_key]
        optimizer = Optimizer(slots, file, below)
        _take_partitions(optimizer, layout, path, by_key)
        yield optimizer


def _is_optimizer(node: dict[Any, Any]) -> bool:
    """Return whether a dict has the form of an optimizer's state dict."""
    groups = node.get("param_groups")
    return (
        isinstance(node.get("state"), dict)
        and isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    )


def _group_names(group: dict[Any, Any], given: list[str | None] | None) -> list[str | None]:
    """Return the names of the parameters of a group, None for each unknown one."""
    parameters = group["params"]
    names: Any = group.get("param_names") if given is None else given
    if names is None and all(type(index) is str for index in parameters):
        names = parameters  # torch's `get_optimizer_state_dict` uses names as indices
    if not isinstance(names, list) or len(names) != len(parameters):
        return [None] * len(parameters)
    return [name if type(name) is str else None for name in names]


def _take_partitions(
    optimizer: Optimizer, layout: Layout, path: tuple[str, ...], by_key: Mapping[str, StoredTensor]
) -> None:
    """Give the slots of a ZeRO partition their flat float32 weights.

    DeepSpeed stores these in a list beside the state, in the order of the groups.
    """
    beside = layout.tree
    for step in path[:-1]:
        beside = beside.get(step) if isinstance(beside, dict) else None
    if not isinstance(beside, dict) or path[-1:] != ("base_optimizer_state",):
        return
    flat = beside.get("single_partition_of_fp32_groups") or beside.get("fp32_flat_groups")
    slots = optimizer.slots
    if not isinstance(flat, list) or len(flat) != len(slots):
        return
    for slot, node in zip(slots, flat, strict=True):
        weight = by_key.get(storage_key(node) or "")
        shapes = {tensor.shape for key, tensor in slot.state.items() if key in MOMENTS}
        if weight is not None and weight.dtype == "F32" and shapes == {weight.shape}:
            slot.weight = weight


def _entry(state: dict[Any, Any], index: object) -> dict[Any, Any]:
    entry = state.get(index) if isinstance(index, int | str) else None
    if entry is None and type(index) is int:
        entry = state.get(str(index))  # torch.distributed.checkpoint converts keys to str
    return entry if isinstance(entry, dict) else {}


def _slot(
    entry: dict[Any, Any],
    by_key: Mapping[str, StoredTensor],
    name: str | None,
    group: dict[Any, Any],
) -> Slot:
    keys = {key: storage_key(node) for key, node in entry.items() if isinstance(key, str)}
    state = {
        key: by_key[place] for key, place in keys.items() if place is not None and place in by_key
    }
    closed = any(isinstance(node, list | tuple | dict) for node in entry.values())
    rule = rule_of(group, entry.keys())
    return Slot(state, () if name is None else (name,), rule, closed=closed)


def rule_of(group: Mapping[Any, Any], keys: Iterable[str]) -> Rule:
    """Return the rule of a parameter group; missing or invalid values become defaults.

    `keys` are the state keys of its parameters.
    """
    kept = set(keys) - {"step"}
    betas = group.get("betas")
    pair = betas if isinstance(betas, list | tuple) and len(betas) > 1 else (None, None)
    first = group.get("momentum") if "momentum_buffer" in kept else pair[0]
    second = next((group[key] for key in ("alpha", "rho") if key in group), pair[1])
    alpha: object = 0.0
    if kept & {"exp_avg_slow", "hessian"}:
        second, alpha = pair[1], group.get("rho" if "hessian" in kept else "alpha")
    return Rule(
        _number(first, 1, Rule.beta1),
        _number(second, 1, Rule.beta2),
        _number(group.get("eps"), 1, Rule.eps),
        _number(alpha, 1e3, 0.0),
        _optimizer_kind(group, kept, has_betas=pair[1] is not None),
    )


def _number(value: object, limit: float, default: float) -> float:
    """Return a value in [0, limit), or the default for any other value."""
    return float(value) if isinstance(value, float | int) and 0 <= value < limit else default


def _optimizer_kind(group: Mapping[Any, Any], kept: set[str], *, has_betas: bool) -> str:
    if kept == {"momentum_buffer"} and "ns_steps" in group:
        return "muon"
    if kept == {"momentum_buffer"} and "dampening" in group:
        return "sgd"
    if kept == {"exp_avg"} and has_betas:
        return "lion"
    return "adam" if kept & SECOND and kept <= _ADAM else ""


# -- flat ------------------------------------------------------------------------------------------


def find_flat(
    files: list[tuple[str, Layout]], taken: set[StoredTensor], weights: Container[StoredTensor]
) -> Iterable[Slot]:
    """Yield slots of moments that have their state keys in their names.

    Args:
        files: path and layout of all files
        taken: the tensors to skip
        weights: the tensors in state dicts of models
    """
    named = [
        (*_steps(path, tensor), tensor)
        for path, layout in files
        for tensor in layout.tensors
        if tensor not in taken and tensor.key and not tensor.inline
    ]
    by_base = _by_base(named)
    if not by_base:
        return
    betas, strange = _flat_betas(files), _strange_bases(named, by_base, weights)
    # Optimizers with factored second moments average steps, not gradients.
    is_factored = any(row.keys() & {*FACTORS[0], *FACTORS[1]} for row in by_base.values())
    for base, row in by_base.items():
        for slot in _flat_slots(base, row, betas):
            kind = "" if is_factored or base in strange else slot.rule.kind
            slot.rule = replace(slot.rule, kind=kind, is_sure=False)
            yield slot


def _by_base(named: list[_Named]) -> dict[_Base, dict[str, StoredTensor]]:
    """Return the tensors of each base by state key."""
    by_base: dict[_Base, dict[str, StoredTensor]] = {}
    for steps, chunk, tensor in named:
        for at, step in enumerate(steps):
            is_last = at + 1 == len(steps) and step in SECOND and "state" in steps[:at]
            if is_last or step in _KEYS:
                by_base.setdefault(_base(steps, at, chunk), {}).setdefault(step, tensor)
    return by_base


def _strange_bases(
    named: list[_Named],
    by_base: Mapping[_Base, Mapping[str, StoredTensor]],
    weights: Container[StoredTensor],
) -> set[_Base]:
    """Return the bases of parameters that have a tensor of unknown use beside their moments."""
    return {
        base
        for steps, chunk, tensor in named
        if tensor not in weights
        for at, step in enumerate(steps)
        if step not in _EXPECTED
        for base in (_base(steps, at, chunk),)
        if any(other.shape == tensor.shape for other in by_base.get(base, {}).values())
    }


def _steps(path: str, tensor: StoredTensor) -> tuple[tuple[str, ...], str]:
    """Return the parts of a tensor's file path and name, and its chunk (`[4:8,0:16]`)."""
    name, chunk = tensor.name + tensor.part, ""
    if name.endswith("]") and (cut := _CHUNK.search(name)):
        name, chunk = name[: cut.start()], cut[0]
    file = PurePosixPath(path)
    return (*file.parent.parts, file.stem, *name.split(".")), chunk


_Named = tuple[tuple[str, ...], str, StoredTensor]
"""A tensor with the parts of its file path and name, and its chunk."""

_Base = tuple[str, ...]
"""The name of a tensor of a parameter, with `*` for the state key."""


def _base(steps: tuple[str, ...], at: int, chunk: str) -> _Base:
    return (*steps[:at], "*", *steps[at + 1 :], chunk)


def _flat_slots(
    base: tuple[str, ...], row: dict[str, StoredTensor], betas: Mapping[str, object]
) -> Iterable[Slot]:
    """Yield the slots of tensors with the same base."""
    names, is_optimizers = _names(base), _says_optimizer(base)
    state = {key: tensor for key, tensor in row.items() if key in _FLAT}
    shapes = {tensor.shape for tensor in state.values()}
    if state and len(shapes) == 1:
        weight = _master(row, shapes.pop())
        rule = rule_of(betas, state.keys())
        yield Slot(state, names, rule, weight, is_optimizers=is_optimizers)
        return
    for first, (second, weights) in _TRIPLES.items():
        if first in row and second in row and row[first].shape == row[second].shape:
            slot = Slot({first: row[first], second: row[second]}, (), Rule(kind="adam"))
            slot.weight = _beside(row, weights, row[first].shape)
            if slot.weight is None:
                slot.names, slot.doubtful, slot.is_optimizers = names, True, is_optimizers
            yield slot
            return
    for key, tensor in row.items():
        if key in SECOND & _SHORT:
            yield Slot({key: tensor}, names, Rule(), doubtful=True, is_optimizers=is_optimizers)


def _beside(
    row: dict[str, StoredTensor], weights: tuple[str, ...], shape: tuple[int, ...]
) -> StoredTensor | None:
    """Return the first tensor with a key of a weight, if it has this shape."""
    weight = next((row[key] for key in weights if key in row), None)
    return weight if weight is not None and weight.shape == shape else None


def _master(row: dict[str, StoredTensor], shape: tuple[int, ...]) -> StoredTensor | None:
    """Return the float32 weight of a flat slot."""
    masters = (row[key] for key in _WEIGHTS_BESIDE if key in row)
    return next(
        (tensor for tensor in masters if (tensor.shape, tensor.dtype) == (shape, "F32")), None
    )


def _says_optimizer(base: tuple[str, ...]) -> bool:
    return any(step == "state" or _OPTIMIZER.search(step) for step in base)


def _names(base: tuple[str, ...]) -> tuple[str, ...]:
    """Return possible names of a flat state's parameter, the longest first."""
    steps = [step for step in base if step and step != "*" and not _CHUNK.fullmatch(step)]
    while steps and steps[-1] == "param":
        steps.pop()
    return tuple(".".join(steps[at:]) for at in range(len(steps)))


def _flat_betas(files: list[tuple[str, Layout]]) -> dict[str, object]:
    """Return the options of flat parameter groups (`param_groups.NAME.betas`).

    The first group's options count for all.
    """
    values: dict[str, object] = {}
    for _, layout in files:
        for _, node in walk(layout.tree, (dict,)):
            assert isinstance(node, dict)
            for key, value in node.items():
                if isinstance(key, str) and key.startswith("param_groups."):
                    values.setdefault(key.rpartition(".")[2], value)
    return values


def has_moment_name(tensor: StoredTensor) -> bool:
    """Return whether a tensor's name has a state key that no weight has in its name."""
    steps = _CHUNK.sub("", tensor.name).split(".")
    return any(step in _FLAT for step in steps)
