"""The runs of the corpus: small language models, trained on the standard library's sources.

A run is the same on every call: its batches follow from their order and the step.  Order 0 is the
run that is committed and goes on uninterrupted; the others tell how much of a loss is luck.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from scripts.tinygpt import corpus, tokenize

VOCAB, CONTEXT, BATCH = 512, 6, 64
COMMITS = (20, 40, 60, 80, 100)
RESUMED = 80  # the commit that is taken back
MORE = 100  # steps from there on
ORDERS = (1, 2, 3, 4, 5)  # of other batches
_WHOLE = 512  # windows, for an optimizer that takes all data in each step
_HELD_OUT = 40_000  # tokens that no batch has

Optimizer = torch.optim.Optimizer
State = dict[str, Any]
Make = Callable[[nn.Module], Optimizer]


class Words(nn.Module):
    """Token ids (B, CONTEXT) -> logits (B, VOCAB): an embedding and layers with biases and a norm;
    `plain` leaves nothing but matrices.
    """

    def __init__(self, *, plain: bool = False, width: int = 192, embedded: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, embedded)
        self.into = nn.Linear(CONTEXT * embedded, width, bias=not plain)
        self.norm = nn.Identity() if plain else nn.LayerNorm(width)
        self.middle = nn.Linear(width, width, bias=not plain)
        self.head = nn.Linear(width, VOCAB, bias=not plain)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm(self.into(self.embed(ids).flatten(1))))
        logits: torch.Tensor = self.head(x + F.gelu(self.middle(x)))
        return logits


class Adapted(Words):
    """The same, frozen but for its norm, with adapters of rank 8 to its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.norm.requires_grad_(True)
        for name in ("into", "middle", "head"):
            layer = getattr(self, name)
            setattr(self, name, Adapter(layer, 8))


class Adapter(nn.Module):
    """A frozen layer and the product of two narrow matrices."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + 4 * self.lora_B(self.lora_A(x))
        return out


class Waves(nn.Module):
    """Two tables of complex numbers, and the real part of what a complex matrix makes of them."""

    def __init__(self) -> None:
        super().__init__()
        kind = torch.complex64
        self.last = nn.Parameter(0.3 * torch.randn(VOCAB, 64, dtype=kind))
        self.before = nn.Parameter(0.3 * torch.randn(VOCAB, 64, dtype=kind))
        self.head = nn.Parameter(0.1 * torch.randn(64, VOCAB, dtype=kind))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        both = self.last[ids[:, -1]] + self.before[ids[:, -2]]
        logits: torch.Tensor = (both @ self.head).real
        return logits


class Pairs(nn.Module):
    """The same by two tables, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Embedding(VOCAB, VOCAB, sparse=True)
        self.before = nn.Embedding(VOCAB, VOCAB, sparse=True)
        for table in (self.last, self.before):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(ids[:, -1]) + self.before(ids[:, -2])
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "words": Words,
    "matrices": lambda: Words(plain=True),
    "small": lambda: Words(width=96, embedded=32),
    "half": lambda: Words().to(torch.bfloat16),
    "double": lambda: Words().to(torch.float64),
    "adapted": Adapted,
    "waves": Waves,
    "pairs": Pairs,
}


@cache
def tokens() -> torch.Tensor:
    """All tokens, of which the last `_HELD_OUT` are for evaluation alone."""
    return torch.from_numpy(tokenize(corpus(400_000), VOCAB))


def _windows(starts: torch.Tensor) -> torch.Tensor:
    return tokens()[starts[:, None] + torch.arange(CONTEXT + 1)]


def batch(order: int, step: int, size: int = BATCH) -> torch.Tensor:
    """Windows (size, CONTEXT + 1) of one step."""
    draw = torch.Generator().manual_seed(1_000_003 * order + step)
    limit = len(tokens()) - _HELD_OUT - CONTEXT - 1
    return _windows(torch.randint(limit, (size,), generator=draw))


def losses_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross entropies of the last tokens of windows."""
    logits = model(windows[:, :CONTEXT]).float()
    return F.cross_entropy(logits, windows[:, CONTEXT], reduction="none")


@dataclass
class Training:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: Optimizer

    @classmethod
    def new(cls, model: str, make: Make, seed: int = 0) -> Training:
        """One that has not begun."""
        torch.manual_seed(seed)
        made = MODELS[model]()
        return cls(made, make(made))

    @classmethod
    def saved(cls, model: str, make: Make, snapshot: Snapshot) -> Training:
        """One that has been loaded."""
        made = cls.new(model, make, seed=1)
        made.load(snapshot)
        return made

    @property
    def whole(self) -> bool:
        """Whether all data is taken in each step: LBFGS takes no sampled gradients."""
        return isinstance(self.optimizer, torch.optim.LBFGS)

    def run(self, order: int, start: int, steps: int) -> None:
        """Make the steps after step `start`."""
        for step in range(start + 1, start + steps + 1):
            windows = batch(0, 0, _WHOLE) if self.whole else batch(order, step)

            def closure(windows: torch.Tensor = windows) -> float:
                self.optimizer.zero_grad()
                loss = losses_of(self.model, windows).mean()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.item()

            if self.whole:
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()

    def begin(self) -> None:
        """Take the weights that are trained; schedule-free optimizers evaluate and save others."""
        self._switch("train")

    def rest(self) -> None:
        """Take the weights that are evaluated and saved."""
        self._switch("eval")

    def _switch(self, name: str) -> None:
        switch = getattr(self.optimizer, name, None)
        if switch is not None:
            switch()

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        self.rest()
        yield
        self.begin()

    def losses(self) -> torch.Tensor:
        """Losses on the tokens that no batch has; on all data where that is taken in each step."""
        if self.whole:
            windows = batch(0, 0, _WHOLE)
        else:
            first = len(tokens()) - _HELD_OUT
            windows = _windows(torch.arange(first, len(tokens()) - CONTEXT - 1, 13))
        with self._at_rest(), torch.no_grad():
            return torch.cat([losses_of(self.model, part) for part in torch.split(windows, 512)])

    def loss(self) -> float:
        """Their mean."""
        return self.losses().mean().item()

    def snapshot(self) -> Snapshot:
        """Copies of both states, as they are saved."""
        with self._at_rest():
            return Snapshot(
                copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())
            )

    def load(self, snapshot: Snapshot) -> None:
        """Load what was saved; `begin` goes on from there."""
        self.model.load_state_dict(snapshot.model)
        self.optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))


@dataclass(frozen=True)
class Snapshot:
    """State dicts of a model and of its optimizer."""

    model: State
    optimizer: State


@dataclass(frozen=True)
class Reference:
    """A run that nothing interrupts: its states at commits, the loss at its beginning, and those
    `MORE` steps after the commit that is taken back.
    """

    model: str
    make: Make
    states: dict[int, Snapshot]
    begun: float
    losses: torch.Tensor

    @classmethod
    def of(cls, model: str, make: Make) -> Reference:
        """Train a run to its end."""
        training = Training.new(model, make)
        begun, states, at = training.loss(), {}, 0
        training.begin()
        for step in COMMITS:
            training.run(0, at, step - at)
            states[step], at = training.snapshot(), step
        training.run(0, at, RESUMED + MORE - at)
        return cls(model, make, states, begun, training.losses())

    def new(self) -> Training:
        """A training of the same kind that has not begun, with weights of its own."""
        return Training.new(self.model, self.make, seed=1)

    def at(self, step: int) -> Training:
        """The run as it was saved at a commit."""
        return Training.saved(self.model, self.make, self.states[step])

    @property
    def loss(self) -> float:
        """The loss at the end."""
        return self.losses.mean().item()

    def above(self, losses: torch.Tensor) -> tuple[float, float]:
        """How far other losses at the end are above those of this run, and the standard error of
        that: by the windows that it is evaluated on, and, where that does not explain it, by the
        batches that a run happens to have.
        """
        difference = losses - self.losses
        gap, sampled = difference.mean().item(), difference.std().item() / len(losses) ** 0.5
        return gap, sampled if gap <= 3 * sampled else math.hypot(self.luck, sampled)

    @cached_property
    def luck(self) -> float:
        """How far the loss at the end moves where the steps after the commit that is taken back are
        made with other batches: the standard deviation over several orders.
        """
        if self.new().whole:
            return 0.0
        found = [self.loss]
        for order in ORDERS:
            training = self.at(RESUMED)
            training.begin()
            training.run(order, RESUMED, MORE)
            found.append(training.loss())
        return statistics.stdev(found)
