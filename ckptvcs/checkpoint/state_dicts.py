"""Where state dicts of models stand in checkpoints: keys, files, and the form that they have."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import PurePosixPath

from ckptvcs.checkpoint.layout import StoredTensor
from ckptvcs.checkpoint.optimizer_state import storage_key
from ckptvcs.checkpoint.pickle_reader import METADATA, InertDict, StorageRef, TensorRef

_BUFFERS = frozenset(
    {
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "inv_freq",
        "position_ids",
        "masked_bias",
        "attn_mask",
        "causal_mask",
        "token_type_ids",
        "original_inv_freq",
        "relative_position_index",
        "expert_bias",
        "tokens_per_expert",
        "e_score_correction_bias",
        "mean",
        "var",
        "std",
        "_mean",
        "_var",
        "_std",
        "count",
        "center",
        "queue",
    }
)
"""Last steps of names that are no parameters."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_MODELS = frozenset(
    {"model", "module", "net", "network", "weights", "ema", "swa", "master", "params"}
)
"""Words of keys that say that a model stands there."""

_ROLES = frozenset(
    {
        "generator",
        "discriminator",
        "actor",
        "critic",
        "policy",
        "encoder",
        "decoder",
        "backbone",
        "unet",
        "vae",
        "transformer",
        "lora",
        "adapter",
        "teacher",
        "student",
    }
)
"""Words of keys that say so if most of the names there are those of parameters."""

_BESIDE = re.compile(
    r"(state|dict|weight|param|master_params?|sma|avg|averaged?|shadow|target|online|gen|disc"
    r"|value|head|text|g|d|q)"
)
_ELSE = frozenset(
    {
        "buffer",
        "buffers",
        "replay",
        "rollout",
        "rollouts",
        "normalizer",
        "normaliser",
        "dataloader",
        "dataset",
        "stats",
        "statistics",
        "loss",
        "losses",
        "input",
        "inputs",
        "cache",
        "sample",
        "samples",
        "history",
        "metrics",
        "queue",
        "rms",
        "priorities",
        "obs",
        "observations",
    }
)
"""Words of keys and files that say that something else stands there, or below."""

_OPTIMIZERS = frozenset({"optim", "optims", "optimizer", "optimizers", "opt"})
"""Words of keys that say that an optimizer stands there, or below."""

_FILES = frozenset({"model", "ema", "weights", "lora", "adapter"})
_PARAMETERS = re.compile(r"(weight|bias|kernel|embed|proj|lora_|_flat_param)")


def may_be_weight(name: str, names: Container[str]) -> bool:
    """Whether the name of a tensor in a state dict that has these `names` may be that of a weight:
    not of a buffer, of state of an optimizer, of what stands below another tensor, or below a key
    that says something else.
    """
    steps = name.split(".")
    if steps[-1] in _BUFFERS or any(word in _OPTIMIZERS for s in steps for word in _words(s)):
        return False
    if not is_parameter(name) and any(word in _ELSE for word in _words(steps[0])):
        return False
    return not any(".".join(steps[:at]) in names for at in range(1, len(steps)))


def is_parameter(name: str) -> bool:
    """Whether a name ends as those of parameters do."""
    return bool(_PARAMETERS.search(name.rpartition(".")[2]))


def _words(step: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(step)]


def is_place(path: str, form: str, steps: tuple[str, ...], node: dict[object, object]) -> bool:
    """Whether the state dict of a model stands at some steps in a file of some form."""
    stem = _words(PurePosixPath(path).name.partition(".")[0])
    if steps:
        known = steps[-1] == "_parameters" or _is_models(steps[-1], node)
    else:
        known = form == "safetensors" or not _FILES.isdisjoint(stem) or _is_models_top(node)
    if not known and (not _is_made_by_module(node) or may_be_buffers(node)):
        return False
    if any(step.startswith("@") or step == "_buffers" for step in steps):
        return False
    return all(_ELSE.isdisjoint(words) for words in (stem, *map(_words, steps)))


def _is_made_by_module(node: dict[object, object]) -> bool:
    return isinstance(node, InertDict) and isinstance(node.state, dict) and METADATA in node.state


def may_be_buffers(node: dict[object, object]) -> bool:
    """Whether a module made a state dict in which no name is that of a parameter: it may hold
    nothing but buffers.
    """
    named = any(isinstance(key, str) and is_parameter(key) for key in node)
    return _is_made_by_module(node) and not named


def _is_models(step: str, node: dict[object, object]) -> bool:
    """Whether a key says that a model stands there: `model`, `model_ema`, `netG`, `params`, ..."""
    words = _words(step)
    known = all(
        word in _MODELS or word in _ROLES or _BESIDE.fullmatch(word) or word.isdigit()
        for word in words
    )
    if not known:
        return False
    if any(word in _MODELS for word in words) or words[-2:] == ["state", "dict"]:
        return True
    if not any(word in _ROLES for word in words):
        return False
    names = [name for name, _ in leaves_of(node) or []]
    return _has_parameters(names, len(names))


def _is_models_top(node: dict[object, object]) -> bool:
    """Return whether the names at the top of a file are those of a model's parameters."""
    return _has_parameters([key for key in node if isinstance(key, str)], len(node))


def _has_parameters(names: list[str], count: int) -> bool:
    """Whether at least half of `count` names are those of parameters."""
    return 2 * sum(map(is_parameter, names)) >= count > 0


def leaves_of(node: dict[object, object]) -> list[tuple[str, str]] | None:
    """The dotted name and the storage key of every tensor below a dict; None where it holds
    anything but tensors, dicts of them, and what modules keep beside.
    """
    found: list[tuple[str, str]] = []
    stack: list[tuple[str, object]] = [("", node)]
    seen: set[int] = set()
    while stack:
        name, at = stack.pop()
        if isinstance(at, dict):
            if id(at) in seen:
                return None
            seen.add(id(at))
            dot = "." if name else ""
            below = [(f"{name}{dot}{key}", value) for key, value in at.items()]
            stack += reversed(below)
        elif isinstance(at, TensorRef | StorageRef | StoredTensor):
            found.append((name, storage_key(at) or ""))
        elif at is not None and not name.endswith("_extra_state"):
            return None
    return found
