"""What a run comes to that is taken back from a near commit."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ckptvcs.history.log import LogEntry
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.corpus.directories import DIRECTORIES
from tests.corpus.layouts import LAYOUTS, Layout
from tests.corpus.optimizers import ENTRIES, run_of
from tests.corpus.training import (
    COMMITS,
    MORE,
    RESUMED,
    Reference,
    Snapshot,
    Training,
    batch,
    losses_of,
)
from tests.corpus.written import MasterAdam

ALL_LAYOUTS: dict[str, Layout] = {**LAYOUTS, **DIRECTORIES}

LARGER, ABOVE, ABOVE_ONE = 1.25, 0.02, 0.1
"""A commit measures the next step on a sample, with gradients drawn at random.  With those of a
batch the error may be this many times as large, and this much above that: over all weights, and of
a single one, which may have few elements.
"""

MOST = 0.9
"""No tensor's next step may be wrong by more, by default; without exp_avg at all it is by 0.83."""


def pairs() -> list[tuple[str, str]]:
    """Every optimizer in every layout that can hold its state."""
    return [
        (optimizer, layout)
        for optimizer, entry in ENTRIES.items()
        for layout, how in ALL_LAYOUTS.items()
        if entry.form <= how.form
    ]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested state that is no container."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}.{number}")
    else:
        yield path, value


def tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """All tensors of a snapshot, by path; complex ones as pairs of numbers."""
    both = {"model": snapshot.model, "optimizer": snapshot.optimizer}
    return {
        path: torch.view_as_real(leaf) if leaf.is_complex() else leaf
        for path, leaf in leaves(both)
        if isinstance(leaf, torch.Tensor)
    }


def same(first: Any, second: Any) -> bool:
    """Whether two tensors or arrays are equal in every bit."""
    one, other = torch.as_tensor(first), torch.as_tensor(second)
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def changed_numbers(true: Snapshot, back: Snapshot) -> list[str]:
    """Paths of leaves that are no tensors and are not what they were, or are not there."""

    def others(snapshot: Snapshot) -> dict[str, Any]:
        return {
            path: None if isinstance(leaf, torch.Tensor) else leaf
            for path, leaf in leaves(snapshot.optimizer)
        }

    was, now = others(true), others(back)
    return sorted(
        key
        for key in was.keys() | now.keys()
        if key not in was or key not in now or was[key] != now[key]
    )


@dataclass
class Outcome:
    """How far a near commit of an optimizer in a layout, and what goes on from it, is from the run.

    `recorded` is the error of the next step that the commit says, `recorded_worst` that of the
    worst tensor; `update` and `worst` are the true ones with the gradient of the next batch (None
    for an optimizer that takes its own gradients).  `gap` is the
    loss above that of the uninterrupted run, `error` the standard error of that (both 0 where the
    state is exact).  `faults` says what must not be.
    """

    ratio: float
    exact: bool
    recorded: float = 0.0
    recorded_worst: float = 0.0
    update: float | None = None
    worst: float | None = None
    gap: float = 0.0
    error: float = 0.0
    faults: list[str] = field(default_factory=list)


def _nonfinite(state: Snapshot) -> list[str]:
    return [
        path
        for path, tensor in tensors(state).items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def _one_signed(true: Snapshot, back: Snapshot, *, joined: bool) -> Iterator[str]:
    """Tensors that had one sign and have not any more; states that were not zero and are.  Weights
    that are `joined` have both signs together, whatever one of them has.
    """
    now = tensors(back)
    for path, was in tensors(true).items():
        if joined and path.startswith("model"):
            continue
        if path not in now or not was.is_floating_point() or was.numel() < 2:
            continue
        got = now[path]
        if not (was < 0).any() and (got < 0).any():
            yield f"{path}: {int((got < 0).sum())} of {got.numel()} became negative"
        elif not (was > 0).any() and (got > 0).any():
            yield f"{path}: {int((got > 0).sum())} of {got.numel()} became positive"
        elif not (was < 0).any() and path.startswith("optimizer"):
            lost = int(((was > 0) & (got == 0)).sum())
            if lost:
                yield f"{path}: {lost} of {got.numel()} became zero"


def _unsaid(
    repo: Repo, entry: LogEntry, layout: Layout, training: Training, folder: Path
) -> list[str]:
    """Tensors that the commit says are exact, and that are not what was committed: by comparison
    with a lossless commit of the same files.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        other = Repo.init(Path(place) / "repo", codec="lossless")
        (Path(place) / "file").mkdir()
        layout.commit(other, training, RESUMED, Path(place) / "file")
        ((_, true),) = other.trajectory("*", revision="HEAD")
        other.close()
    ((_, near),) = repo.trajectory("*", start=RESUMED, stop=RESUMED)
    infos = handle(repo).catalog.schema(entry.commit.schema).tensors
    said = {infos[number].name for number in handle(repo).history.errors(entry.id)}
    if true.keys() != near.keys():
        return [f"other tensors: {sorted(true.keys() ^ near.keys())[:4]}"]
    return [name for name in true if name not in said and not same(true[name], near[name])]


def _masters(training: Training) -> list[torch.Tensor]:
    """The weights, or their float32 masters, whose steps 16 bits cannot show; in float64."""
    optimizer, weights = training.optimizer, list(training.model.parameters())
    if isinstance(optimizer, MasterAdam):
        weights = [optimizer.master(p) for p in weights]  # type: ignore[misc]
    real = [torch.view_as_real(p) if p.is_complex() else p for p in weights]
    return [p.detach().double().clone() for p in real]


def _first_updates(run: Reference, back: Training) -> tuple[float, float] | None:
    """The relative squared error of the first update after a resume with the gradient of the true
    run: over all weights, and of the worst one.
    """
    true = run.at(RESUMED)
    if true.whole:
        return None
    losses_of(true.model, batch(0, RESUMED + 1)).mean().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in true.model.parameters()]
    with torch.no_grad():  # errors of weights are recorded as such: an update is that of the state
        for restored, p in zip(back.model.parameters(), true.model.parameters(), strict=True):
            restored.copy_(p)
    steps = []
    for training in (true, back):
        training.begin()
        before = _masters(training)
        for p, gradient in zip(training.model.parameters(), gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        training.optimizer.step()
        steps.append([p - was for p, was in zip(_masters(training), before, strict=True)])
    errors = [float((b - a).square().sum()) for a, b in zip(*steps, strict=True)]
    energies = [float(a.square().sum()) for a in steps[0]]
    return sum(errors) / sum(energies), max(
        error / energy if energy else math.inf if error else 0.0
        for error, energy in zip(errors, energies, strict=True)
    )


def _committed(
    optimizer: str, layout: str, folder: Path, codec: str
) -> tuple[Repo, dict[int, LogEntry]]:
    """A repository with a commit of each saved step of a run, all near if the codec is."""
    run, how = run_of(optimizer), ALL_LAYOUTS[layout]
    repo = Repo.init(folder / "repo", codec=codec)
    repo.configure("keep-exact", "0")
    entries = {}
    for step in COMMITS:
        (folder / f"at-{step}").mkdir()
        entries[step] = how.commit(repo, run.at(step), step, folder / f"at-{step}")
    return repo, {step: repo.entry(entry.id) for step, entry in entries.items()}


def _ratio(entry: LogEntry) -> float:
    return entry.commit.raw_bytes / entry.stored_bytes


def ratio_of(optimizer: str, layout: str, folder: Path) -> float:
    """How many times smaller than the state a later near commit is."""
    repo, entries = _committed(optimizer, layout, folder, "near")
    repo.close()
    return _ratio(entries[RESUMED])


def try_out(optimizer: str, layout: str, folder: Path, codec: str = "near") -> Outcome:
    """Commit a run, take the commit of step `RESUMED` back, and train on from it."""
    run, how = run_of(optimizer), ALL_LAYOUTS[layout]
    repo, entries = _committed(optimizer, layout, folder, codec)
    entry, back = entries[RESUMED], run.new()
    (folder / "out").mkdir()
    how.restore(repo, RESUMED, back, folder / "out")
    true, now = run.states[RESUMED], Snapshot(back.model.state_dict(), back.optimizer.state_dict())
    was, got = tensors(true), tensors(now)
    exact = was.keys() == got.keys() and all(same(was[key], got[key]) for key in was)
    errors = handle(repo).history.errors(entry.id).values()
    found = Outcome(
        _ratio(entry),
        exact,
        entry.commit.error.update_nmse,
        max((error.update_nmse for error in errors), default=0.0),
    )
    if not found.recorded_worst <= MOST:
        found.faults.append(f"the next step of a tensor is wrong by {found.recorded_worst:.3g}")
    if was.keys() != got.keys():
        found.faults.append(f"other tensors came back: {sorted(was.keys() ^ got.keys())[:4]}")
    if numbers := changed_numbers(true, now):
        found.faults.append(f"not what they were: {numbers[:4]}")
    if names := _unsaid(repo, entry, how, run.at(RESUMED), folder):
        found.faults.append(f"said to be exact, and are not: {names[:4]}")
    found.faults += _one_signed(true, now, joined=how.joined)
    if names := _nonfinite(now):
        found.faults.append(f"came back not finite: {names[:4]}")
    if not exact:
        _go_on(found, run, now, joined=how.joined)
    repo.close()
    return found


def _go_on(found: Outcome, run: Reference, state: Snapshot, *, joined: bool) -> None:
    """What follows from a state that is not exact."""
    updates = _first_updates(run, Training.saved(run.model, run.make, state))
    if updates is not None:
        found.update, found.worst = updates
        # Two kinds of steps have no sum: their sizes differ by what no moment says.
        kinds = {frozenset(own) for own in run.states[RESUMED].optimizer["state"].values()}
        recorded = found.recorded if len(kinds) == 1 else found.recorded_worst
        if not found.update <= LARGER * recorded + ABOVE:
            found.faults.append(
                f"the first update is wrong by {found.update:.3g}, recorded {found.recorded:.3g}"
            )
        if not joined and not found.worst <= LARGER * found.recorded_worst + ABOVE_ONE:
            found.faults.append(
                f"that of one weight by {found.worst:.3g}, recorded {found.recorded_worst:.3g}"
            )
    training = Training.saved(run.model, run.make, state)
    training.begin()
    training.run(0, RESUMED, MORE)
    found.gap, found.error = run.above(training.losses())
    training.rest()
    after = Snapshot(training.model.state_dict(), training.optimizer.state_dict())
    if names := _nonfinite(after):
        found.faults.append(f"not finite after {MORE} steps: {names[:4]}")
    if not found.gap <= 3 * found.error:
        found.faults.append(
            f"the loss is {found.gap:.3g} above the run's, at a standard error of {found.error:.3g}"
        )
