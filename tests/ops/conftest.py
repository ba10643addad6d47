"""A folder of checkpoints of one run, and a repository to import it into."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptvcs.repo import Repo
from tests.helpers.importing import State, save
from tests.helpers.training import train


@pytest.fixture(scope="session")
def states() -> list[State]:
    return train(6)


@pytest.fixture
def near(tmp_path: Path) -> Repo:
    """A repository with the default settings: all but the two newest commits fade to near."""
    repo = Repo.init(tmp_path / "near")
    repo.configure("max-weight-error", "off")  # the weights of a model this small move far
    return repo


@pytest.fixture
def folder(tmp_path: Path, states: list[State]) -> Path:
    save(tmp_path / "run", states[:4])
    return tmp_path / "run"
