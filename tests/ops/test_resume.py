"""Resuming: the newest commit that proves itself, and never a silent start at step 0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs import CorruptionError, InvalidInputError, NotFoundError, Policy, Repo
from ckptvcs.ops.history_reader import handle
from tests.helpers.comparing import same


class Run:
    """A small run: each step changes the model, and each state is remembered."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.repo = Repo.init(folder)
        self.model = torch.nn.Linear(40, 30)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.weights: dict[int, torch.Tensor] = {}

    def commit(self, steps: range, *, bad: bool = False, **options: Any) -> None:
        for step in steps:
            self.model(torch.randn(3, 40)).square().sum().backward()
            self.optimizer.step()
            if bad:
                self.model.weight.data[0, 0] = float("inf")
            self.weights[step] = self.model.weight.detach().clone()
            extra = {"rng": torch.get_rng_state()} | options
            self.repo.commit(
                model=self.model,
                optimizer=self.optimizer,
                extra=extra,
                step=step,
                metrics={"loss": 1 / step},
            )

    def damage(self, step: int) -> None:
        """Overwrite the bytes of all packs that only this commit needs."""
        name = self.repo.resolve(step)
        for patch in handle(self.repo).fader().patches():
            if patch.commits == (name,):
                pack = self.repo.folder / patch.folder / patch.pack[:2] / f"{patch.pack}.pack"
                pack.chmod(0o644)
                data = bytearray(pack.read_bytes())
                data[len(data) // 3] ^= 0xFF
                pack.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_an_empty_repository_starts_from_the_beginning(run: Run) -> None:
    assert run.repo.resume(into=run.model) is None


def test_a_run_resumes_from_the_newest_commit(run: Run) -> None:
    run.commit(range(1, 4), epoch=7)
    other = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(other.parameters())
    resumed = run.repo.resume(into={"model": other, "optimizer": optimizer})
    assert resumed is not None
    assert (resumed.step, resumed.metrics, resumed.id) == (3, {"loss": 1 / 3}, run.repo.resolve(3))
    assert resumed.extra.keys() == {"rng", "epoch", "step"}
    assert resumed.extra["epoch"] == 7
    assert torch.equal(other.weight, run.weights[3])
    assert same(optimizer.state_dict(), run.optimizer.state_dict())
    assert (resumed.skipped, resumed.lacks) == ((), ())


def test_checkout_gives_the_step_of_the_commit(run: Run) -> None:
    run.commit(range(5, 6))
    assert run.repo.checkout()["step"] == 5
    run.repo.commit(model=run.model, extra={"step": "mine"}, step=6)
    assert run.repo.checkout()["step"] == "mine"
    run.repo.commit({"w": torch.ones(3)}, step=7)  # a state comes back as it was passed
    assert run.repo.checkout().keys() == {"w"}


def test_damaged_commits_are_skipped_and_named(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.commit(range(1, 4))
    run.damage(3)
    resumed = Repo.open(run.repo.folder).resume(into=run.model)
    assert resumed is not None
    assert resumed.step == 2
    assert torch.equal(run.model.weight, run.weights[2])
    ((skipped,), newest) = resumed.skipped, run.repo.resolve(3)
    assert (skipped.id, skipped.step) == (newest, 3)
    assert skipped.reason
    assert f"skipped step 3 ({newest[:8]}): {skipped.reason}" in caplog.text


def test_commits_with_values_that_are_not_finite_are_skipped(run: Run) -> None:
    run.commit(range(1, 3))
    run.commit(range(3, 5), bad=True)
    resumed = run.repo.resume()
    assert resumed is not None
    assert resumed.step == 2
    assert ["infinite" in one.reason for one in resumed.skipped] == [True, True]


def test_commits_without_their_optimizer_are_skipped(run: Run) -> None:
    run.commit(range(1, 4))
    run.repo.tag("keep", 1)
    run.repo.gc(Policy(optimizer_last=1), now=True)
    run.damage(3)
    resumed = run.repo.resume()
    assert resumed is not None
    assert resumed.step == 1
    assert ["was dropped" in one.reason for one in resumed.skipped] == [False, True]


def test_no_commit_that_proves_itself_is_an_error(run: Run) -> None:
    run.commit(range(1, 4), bad=True)
    with pytest.raises(
        CorruptionError, match=r"no commit can be resumed from: 3 were tried; step 3"
    ):
        run.repo.resume(into=run.model)
    with pytest.raises(CorruptionError):
        run.repo.resolve("latest-good")


def test_a_branch_without_commits_is_no_new_run(run: Run) -> None:
    run.commit(range(1, 3))
    refs = handle(run.repo).refs
    refs.publish(
        "HEAD",
        refs.read("HEAD"),
        commit=None,
        branch="other",
        time="2026-01-01T00:00:00+00:00",
        action="checkout",
    )
    with pytest.raises(NotFoundError, match="others have") as raised:
        Repo.open(run.repo.folder).resume()
    assert "ckpt checkout main" in str(raised.value.hint)


def test_a_state_that_does_not_fit_is_an_error(run: Run) -> None:
    run.commit(range(1, 3))
    with pytest.raises(InvalidInputError):
        run.repo.resume(into=torch.nn.Linear(4, 3))
    with pytest.raises(NotFoundError):
        run.repo.resume(into={"discriminator": run.model})


def test_what_a_state_lacks_is_said_when_asked(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    scheduler, loader = {"last_epoch": 1}, {"position": 5}
    run.repo.commit({"model": run.model.state_dict()}, step=1)
    lacks = {"optimizer", "random state", "scheduler", "data position"}
    first = run.repo.resume(check=True)
    assert first is not None
    assert set(first.lacks) == lacks
    assert "lacks: optimizer, random state, scheduler, data position" in caplog.text
    run.commit(range(2, 3), scheduler=scheduler)
    second = run.repo.resume(check=True)
    assert second is not None
    assert second.lacks == ("data position",)
    run.commit(range(3, 4), lr_scheduler=scheduler, train_loader=loader)
    third = run.repo.resume(check=True)
    assert third is not None
    assert third.lacks == ()


def test_a_near_commit_is_said_to_be_near(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.repo.configure("keep-exact", "0")
    run.commit(range(1, 4))
    with caplog.at_level(logging.WARNING):
        assert run.repo.resume() is not None
    assert "step 3" in caplog.text
    assert "does not continue bit for bit" in caplog.text


def test_latest_good_is_a_revision(run: Run) -> None:
    run.commit(range(1, 4))
    assert run.repo.resolve("latest-good") == run.repo.resolve(3)
    run.damage(3)
    repo = Repo.open(run.repo.folder)
    assert repo.resolve("latest-good") == repo.resolve(2)
    assert torch.equal(repo.checkout("latest-good")["model"]["weight"], run.weights[2])
    with pytest.raises(InvalidInputError):
        repo.branch("latest-good")


def test_latest_good_is_a_revision_like_others(run: Run) -> None:
    run.commit(range(1, 4))
    run.commit(range(4, 5), bad=True)
    good = run.repo.resolve(3)
    assert run.repo.resolve("latest-good") == good
    assert run.repo.resolve("latest-good~1") == run.repo.resolve(2)
    assert [entry.step for entry in run.repo.line("1", "latest-good")] == [1, 2, 3]
    assert run.repo.select(["2..latest-good"]) == [run.repo.resolve(step) for step in (2, 3)]
    assert [entry.step for entry in run.repo.log(revision="latest-good")] == [3, 2, 1]
