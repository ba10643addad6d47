"""Recognize the state dicts of models by their form and place (keys and file names)."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import PurePosixPath

from ckptvcs.checkpoint.conventions import words
from ckptvcs.checkpoint.layout import StoredTensor
from ckptvcs.checkpoint.optimizer_state import storage_key
from ckptvcs.checkpoint.pickle_reader import METADATA, InertDict, StorageRef, TensorRef

_BUFFERS = words(
    "running_mean running_var num_batches_tracked inv_freq position_ids masked_bias attn_mask",
    "causal_mask token_type_ids original_inv_freq relative_position_index expert_bias",
    "tokens_per_expert e_score_correction_bias mean var std _mean _var _std count center queue",
)
"""Last parts of the names of well-known buffers."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_MODELS = words("model module net network weights ema swa master params")
"""Words in the keys of models."""

_ROLES = words(
    "generator discriminator actor critic policy encoder decoder backbone unet vae transformer",
    "lora adapter teacher student",
)
"""Words in the keys of models if at least half of the names there end like parameters."""

_BESIDE = re.compile(
    r"(state|dict|weight|param|master_params?|sma|avg|averaged?|shadow|target|online|gen|disc"
    r"|value|head|text|g|d|q)"
)
_EXCLUDING = words(
    "buffer buffers replay rollout rollouts normalizer normaliser dataloader dataset stats",
    "statistics loss losses input inputs cache sample samples history metrics queue rms",
    "priorities obs observations",
)
"""Words in keys and file names that exclude everything below them."""

_OPTIMIZERS = frozenset({"optim", "optims", "optimizer", "optimizers", "opt"})
"""Words in the keys of optimizers."""

_FILES = frozenset({"model", "ema", "weights", "lora", "adapter"})
_PARAMETERS = re.compile(r"(weight|bias|kernel|embed|proj|lora_|_flat_param)")


def may_be_weight(name: str, names: Container[str]) -> bool:
    """Return whether a tensor of a state dict with these `names` may be a weight, by its name.

    Not weights: well-known buffers, tensors below the key of an optimizer or an excluding key, and
    names that continue the name of another tensor.
    """
    steps = name.split(".")
    if steps[-1] in _BUFFERS or any(word in _OPTIMIZERS for s in steps for word in _words(s)):
        return False
    if not is_parameter(name) and any(word in _EXCLUDING for word in _words(steps[0])):
        return False
    return not any(".".join(steps[:at]) in names for at in range(1, len(steps)))


def is_parameter(name: str) -> bool:
    """Return whether a name ends like a parameter's (`weight`, `bias`, `kernel`, ...)."""
    return bool(_PARAMETERS.search(name.rpartition(".")[2]))


def _words(step: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(step)]


def is_place(path: str, form: str, steps: tuple[str, ...], node: dict[object, object]) -> bool:
    """Return whether the path `steps` in a file of format `form` is a place for a state dict."""
    stem = _words(PurePosixPath(path).name.partition(".")[0])
    if steps:
        is_model = steps[-1] == "_parameters" or _is_model_key(steps[-1], node)
    else:
        is_model = form == "safetensors" or not _FILES.isdisjoint(stem) or _is_model_file(node)
    if not is_model and (not _is_made_by_module(node) or may_be_buffers(node)):
        return False
    if any(step.startswith("@") or step == "_buffers" for step in steps):
        return False
    return all(_EXCLUDING.isdisjoint(words) for words in (stem, *map(_words, steps)))


def _is_made_by_module(node: dict[object, object]) -> bool:
    return isinstance(node, InertDict) and isinstance(node.state, dict) and METADATA in node.state


def may_be_buffers(node: dict[object, object]) -> bool:
    """Return whether a state dict of a module may have only buffers.

    This is so if no name in it ends like a parameter.
    """
    named = any(isinstance(key, str) and is_parameter(key) for key in node)
    return _is_made_by_module(node) and not named


def _is_model_key(step: str, node: dict[object, object]) -> bool:
    """Return whether a key is one of a model: `model`, `model_ema`, `netG`, `params`, ..."""
    words = _words(step)
    if not all(
        word in _MODELS or word in _ROLES or _BESIDE.fullmatch(word) or word.isdigit()
        for word in words
    ):
        return False
    if any(word in _MODELS for word in words) or words[-2:] == ["state", "dict"]:
        return True
    if not any(word in _ROLES for word in words):
        return False
    names = [name for name, _ in leaves_of(node) or []]
    return _has_parameters(names, len(names))


def _is_model_file(node: dict[object, object]) -> bool:
    """Return whether at least half of the names at the top of a file end like parameters."""
    return _has_parameters([key for key in node if isinstance(key, str)], len(node))


def _has_parameters(names: list[str], count: int) -> bool:
    """Return whether at least half of `count` names end like parameters."""
    return 2 * sum(map(is_parameter, names)) >= count > 0


def leaves_of(node: dict[object, object]) -> list[tuple[str, str]] | None:
    """Return the dotted name and the storage key of every tensor below a dict.

    Return None if the dict has values other than tensors, dicts of tensors, None, and the
    `_extra_state` of modules.
    """
    leaves: list[tuple[str, str]] = []
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
            leaves.append((name, storage_key(at) or ""))
        elif at is not None and not name.endswith("_extra_state"):
            return None
    return leaves
