"""Fixtures and Hypothesis profiles.  No test sets its own number of examples."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ckptvcs.repo import Repo
from tests.helpers.crashing import SCENARIOS, Cut

settings.register_profile("dev", max_examples=30, stateful_step_count=10, deadline=None)
settings.register_profile(
    "ci",
    max_examples=15,
    stateful_step_count=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    max_examples=int(os.environ.get("CKPT_TEST_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("CKPT_TEST_PROFILE", "dev"))

# What a shell starts in the background ignores Ctrl-C, and so would the processes of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# They would be loaded in the midst of some test, and measure with other roundings from there on.
os.environ.setdefault("CKPT_COMPILED", "0")


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    """An empty repository."""
    return Repo.init(tmp_path / "repo", codec="lossless")


@pytest.fixture
def round_trip(repo: Repo, tmp_path: Path) -> Callable[[Path], None]:
    """Commit a path, check it out elsewhere, compare every byte."""

    def run(path: Path) -> None:
        result = repo.commit_path(path, message="round trip")
        assert result.commit.exact
        target = tmp_path / "out" / path.name
        done = repo.checkout_files(result.id, target)
        assert done.exact
        if path.is_dir():
            names = sorted(p.relative_to(path) for p in path.rglob("*"))
            assert sorted(p.relative_to(target) for p in target.rglob("*")) == names
            for name in names:
                if (path / name).is_file():
                    assert (target / name).read_bytes() == (path / name).read_bytes(), name
        else:
            assert target.read_bytes() == path.read_bytes()

    return run


@pytest.fixture
def cut_folder() -> Iterator[Path]:
    """A folder where syncing costs nothing, if there is one."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ckpt-test-", dir=place) as folder:
        yield Path(folder)


_LONG = {"commit together": pytest.mark.slow}


@pytest.fixture(params=[pytest.param(name, marks=_LONG.get(name, ())) for name in SCENARIOS])
def cut(request: pytest.FixtureRequest, cut_folder: Path) -> Cut:
    """A scenario of `tests.helpers.crashing`, prepared."""
    return Cut(SCENARIOS[request.param], cut_folder)
