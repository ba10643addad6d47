"""Every optimizer of the corpus, by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from tests.corpus.training import Make, Optimizer, Reference
from tests.corpus.written import Adam8bit, MasterAdam, MuonWithAdam, Shampoo, SophiaG

ELEMENTS, TENSORS, ANYTHING = 0, 1, 2
"""What the state of a weight is made of: numbers and floats of the weight's shape; numbers and
tensors; anything that can be saved.
"""


@dataclass(frozen=True)
class Entry:
    """An optimizer, the model of `training.MODELS` that it trains, what its state is made of."""

    name: str
    make: Make
    model: str = "words"
    form: int = ELEMENTS


def _all(kind: Any, **settings: Any) -> Make:
    """An optimizer of all weights of a model that are trained, in one group."""

    def make(model: nn.Module) -> Optimizer:
        made: Optimizer = kind([p for p in model.parameters() if p.requires_grad], **settings)
        return made

    return make


def _from(package: str, name: str, **settings: Any) -> Make:
    """The same, from a package that is loaded when it is needed."""

    def make(model: nn.Module) -> Optimizer:
        return _all(getattr(import_module(package), name), **settings)(model)

    return make


def _two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As most trainers make them: matrices decay, vectors do not."""
    weights = list(model.parameters())
    return [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]


def _hidden(model: Any) -> list[dict[str, Any]]:
    hidden = [model.into.weight, model.middle.weight]
    rest = [p for p in model.parameters() if all(p is not one for one in hidden)]
    return [
        {"params": hidden, "use_muon": True, "lr": 0.01},
        {"params": rest, "use_muon": False, "lr": 2e-3},
    ]


_TORCH: dict[str, dict[str, dict[str, Any]]] = {
    "Adadelta": {"": {"lr": 1.0}},
    "Adafactor": {"": {"lr": 1e-2}},
    "Adagrad": {"": {"lr": 1e-2}},
    "Adam": {"": {"lr": 2e-3}, "amsgrad": {"lr": 2e-3, "amsgrad": True, "betas": (0.9, 0.95)}},
    "AdamW": {"": {"lr": 2e-3, "betas": (0.9, 0.95)}, "0.999": {"lr": 2e-3}},
    "Adamax": {"": {"lr": 2e-3}},
    "ASGD": {"": {"lr": 0.1, "t0": 50}},
    "LBFGS": {"": {"lr": 0.02, "max_iter": 1, "history_size": 5}},
    "Muon": {"": {"lr": 0.01}},
    "NAdam": {"": {"lr": 2e-3}},
    "RAdam": {"": {"lr": 2e-3}},
    "RMSprop": {"": {"lr": 1e-3}, "momentum": {"lr": 1e-3, "momentum": 0.9, "centered": True}},
    "Rprop": {"": {"lr": 1e-4, "step_sizes": (1e-6, 1e-2)}},
    "SGD": {
        "": {"lr": 0.1},
        "momentum": {"lr": 0.05, "momentum": 0.9},
        "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    },
    "SparseAdam": {"": {"lr": 1e-2}},
}
"""Settings for each optimizer of torch.optim, by a word that tells them apart."""

_MODELS = {"Muon": "matrices", "SparseAdam": "pairs"}
_FORMS = {"Adafactor": TENSORS, "LBFGS": ANYTHING}


def _of_torch() -> list[Entry]:
    kinds = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    return [
        Entry(
            f"{name} {word}".strip(),
            _all(kinds[name], **settings),
            _MODELS.get(name, "words"),
            _FORMS.get(name, ELEMENTS),
        )
        for name in sorted(kinds)
        for word, settings in _TORCH[name].items()
    ]


_PACKAGED: dict[str, tuple[dict[str, Any], int]] = {
    "Lion": ({"lr": 3e-4}, ELEMENTS),
    "AdEMAMix": ({"lr": 1e-3}, ELEMENTS),
    "SOAP": ({"lr": 2e-3, "precondition_frequency": 5}, ANYTHING),
    "Adan": ({"lr": 2e-3}, ELEMENTS),
    "Lamb": ({"lr": 5e-3}, TENSORS),
    "AdaBelief": ({"lr": 2e-3}, ELEMENTS),
    "Prodigy": ({"lr": 1.0}, ELEMENTS),
    "CAME": ({"lr": 1e-3}, TENSORS),
    "LARS": ({"lr": 0.5}, ELEMENTS),
    "Tiger": ({"lr": 1e-3}, ELEMENTS),
    "ADOPT": ({"lr": 2e-3}, ELEMENTS),
    "MARS": ({"lr": 2e-3}, ELEMENTS),
    "NovoGrad": ({"lr": 1e-2}, TENSORS),
    "Yogi": ({"lr": 5e-3}, ELEMENTS),
    "MADGRAD": ({"lr": 1e-3}, ANYTHING),
    "LaProp": ({"lr": 1e-3}, ELEMENTS),
    "StableAdamW": ({"lr": 2e-3}, ANYTHING),
}
"""Those of the package pytorch_optimizer."""

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in [
        *_of_torch(),
        Entry("AdamW groups", lambda m: torch.optim.AdamW(_two_groups(m), lr=2e-3)),
        Entry("AdamW double", _all(torch.optim.AdamW, lr=2e-3), "double", TENSORS),
        Entry("AdamW half", _all(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95)), "half", TENSORS),
        Entry("AdamW complex", _all(torch.optim.AdamW, lr=5e-3), "waves", TENSORS),
        Entry("AdamW adapters", _all(torch.optim.AdamW, lr=5e-3), "adapted", TENSORS),
        Entry("Muon with Adam", lambda m: MuonWithAdam(_hidden(m))),
        Entry("Sophia", _all(SophiaG, lr=1e-3)),
        Entry("Shampoo", _all(Shampoo, lr=0.1, momentum=0.9), form=TENSORS),
        Entry("schedule-free AdamW", _from("schedulefree", "AdamWScheduleFree", lr=5e-3)),
        Entry("schedule-free SGD", _from("schedulefree", "SGDScheduleFree", lr=1.0)),
        Entry(
            "transformers Adafactor",
            _from("transformers", "Adafactor", lr=1e-2, relative_step=False, beta1=0.9),
            form=TENSORS,
        ),
        Entry("masters", _all(MasterAdam, lr=2e-3), "half", TENSORS),
        Entry("remainders", _all(MasterAdam, lr=2e-3, remainders=True), "half", TENSORS),
        Entry("8-bit Adam", _all(Adam8bit, lr=2e-3), "small", TENSORS),
        Entry("8-bit Adam nested", _all(Adam8bit, lr=2e-3, nested=True), "small", ANYTHING),
        *(
            Entry(name, _from("pytorch_optimizer", name, **settings), form=form)
            for name, (settings, form) in _PACKAGED.items()
        ),
    ]
}
"""All of torch.optim (one that a release of torch adds fails here until it has settings), and what
is used besides.
"""


@cache
def run_of(name: str) -> Reference:
    """The uninterrupted run of an optimizer, trained once in a process."""
    return Reference.of(ENTRIES[name].model, ENTRIES[name].make)
