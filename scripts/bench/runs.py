"""Train the runs of the benchmark.

python -m scripts.bench.runs RUNS

RUNS gets a folder for each run, with files step<N>.pt; existing runs are kept. The text is the
source of Python's standard library, the images are the digits in scikit-learn: nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import nn

from scripts.tinygpt import PIECE, TinyGPT, TrainSpec, corpus, train, vocabulary

State = dict[str, Any]
Keep = Callable[[int, State], None]

MAIN = {
    "gpt-b0.95": TrainSpec(also=range(1050, 1151, 10)),
    "gpt-b0.999": TrainSpec(beta2=0.999, seed=1, also=range(1050, 1151, 10)),
}
LONG = "gpt-long"  # 200 checkpoints, for scripts.bench.history
RESUME = {
    f"resume-b{beta2}-s{seed}": TrainSpec(beta2=beta2, seed=seed)
    for beta2 in (0.95, 0.999)
    for seed in range(3)
}
RESUME_STEPS = 1050  # of a schedule of 1500
FINETUNE, VISION = "finetune-bf16", "vision-sgd"
FINETUNE_STEPS, FINETUNE_EVERY, FINETUNE_LR = 500, 50, 5e-5
VISION_STEPS, VISION_EVERY = 1000, 50


def unseen_tokens(spec: TrainSpec, count: int) -> torch.Tensor:
    """Return tokens that `train` never uses: the tests of the standard library."""
    ids = vocabulary(corpus(spec.corpus_bytes), spec.vocab)
    out: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"], "test").rglob("*.py")):
        for piece in PIECE.findall(path.read_bytes()):
            known = ids.get(piece)
            out.extend(piece if known is None else (known,))
        if len(out) >= count:
            break
    return torch.tensor(out[:count])


def finetune(start: State, spec: TrainSpec, keep: Keep) -> None:
    """Continue in bfloat16 on other text, at a small constant learning rate."""
    torch.manual_seed(7)
    tokens = unseen_tokens(spec, 2_000_000)
    model = TinyGPT(spec)
    model.load_state_dict(start["model"])
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FINETUNE_LR, weight_decay=0.01)
    draw = torch.Generator().manual_seed(8)
    for step in range(1, FINETUNE_STEPS + 1):
        starts = torch.randint(len(tokens) - spec.context - 1, (spec.batch,), generator=draw)
        window = torch.stack([tokens[s : s + spec.context + 1] for s in starts.tolist()])
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1).float(), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % FINETUNE_EVERY == 0:
            keep(
                step,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
            )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))


def digits_model(width: int = 96, blocks: int = 4) -> nn.Module:
    """Return a residual network: images [batch, 1, 8, 8] -> logits [batch, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(_Residual(width) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def vision(keep: Keep) -> None:
    """Train on the digits with SGD, momentum, weight decay and batch norm."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  an extra

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target)
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, VISION_STEPS)
    draw = torch.Generator().manual_seed(1)
    for step in range(1, VISION_STEPS + 1):
        picked = torch.randint(len(images), (64,), generator=draw)
        shift = torch.randint(-1, 2, (2,), generator=draw).tolist()
        batch = images[picked].roll(shift, (2, 3))
        batch = batch + 0.2 * torch.randn(batch.shape, generator=draw)
        loss = F.cross_entropy(model(batch), labels[picked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % VISION_EVERY == 0:
            keep(
                step,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step,
                },
            )


def _gpt(spec: TrainSpec, stop: int) -> Callable[[Keep], None]:
    """Return a function that trains a spec up to a step before the end of its schedule."""

    def run(keep: Keep) -> None:
        class Done(Exception):
            pass

        def checkpoint(step: int, _loss: float, state: State) -> None:
            keep(step, state)
            if step >= stop:
                raise Done

        with contextlib.suppress(Done):
            train(spec, lambda _step, _loss: None, checkpoint)

    return run


def make_all(folder: Path) -> None:
    """Train the missing runs."""

    def tune(keep: Keep) -> None:
        start = torch.load(folder / "gpt-b0.95" / "step1500.pt", weights_only=True)
        finetune(start, TrainSpec(), keep)

    specs = {**MAIN, LONG: TrainSpec(steps=1000, every=5, seed=5)}
    runs = {name: (spec.steps, _gpt(spec, spec.steps)) for name, spec in specs.items()}
    runs |= {name: (RESUME_STEPS, _gpt(spec, RESUME_STEPS)) for name, spec in RESUME.items()}
    runs |= {FINETUNE: (FINETUNE_STEPS, tune), VISION: (VISION_STEPS, vision)}
    with Progress(console=Console(stderr=True)) as progress:
        for name, (steps, run) in runs.items():
            task = progress.add_task(name, total=steps)
            place = folder / name
            if not (place / f"step{steps}.pt").exists():
                place.mkdir(parents=True, exist_ok=True)

                def keep(step: int, state: State, place: Path = place, task: Any = task) -> None:
                    torch.save(state, place / f"step{step}.pt")
                    progress.update(task, completed=step)

                run(keep)
            progress.update(task, completed=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="output folder")
    make_all(parser.parse_args().runs)


if __name__ == "__main__":
    main()
