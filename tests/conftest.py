"""Fixtures and Hypothesis profiles.  No test sets its own number of examples."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from typer.testing import CliRunner

from ckptvcs.cli.app import app
from ckptvcs.ops.repository import Repository
from ckptvcs.repo import Repo
from tests.helpers.command_line import Ckpt, Done, check, environment
from tests.helpers.crashing import SCENARIOS, Cut
from tests.helpers.forging import Forger
from tests.helpers.memory_backend import memory_backends
from tests.helpers.profiles import short

settings.register_profile("dev", max_examples=30, stateful_step_count=10, deadline=None)
settings.register_profile(
    "ci",
    max_examples=5,
    stateful_step_count=8,
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

# No test depends on the settings of the person who runs it.
os.environ["CKPT_CONFIG"] = str(Path(__file__).parent / "config.toml")


_ON_BOTH = {"tests.test_repo", "tests.gc.test_grace", "tests.ops.test_repository_backend"}
"""The modules whose tests run on both backends in the short profile, too."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests marked `any_backend` on a directory and on a backend in memory."""
    marks = metafunc.definition.get_closest_marker
    if marks("any_backend") and not marks("directory_only"):
        often = metafunc.module.__name__ in _ON_BOTH
        memory = pytest.param("memory", marks=() if often else pytest.mark.slow)
        metafunc.parametrize("chosen_backend", ["directory", memory], indirect=True)


@pytest.fixture(autouse=True)
def chosen_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand each repository a backend from outside, unless it is the one on a directory."""
    if getattr(request, "param", "directory") == "memory":
        monkeypatch.setattr(Repository, "backend_at", staticmethod(memory_backends()))


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
def ckpt_process(tmp_path: Path) -> Ckpt:
    """Run `ckpt ARGS` as a process in `tmp_path`; any exit code but `code` (0) fails the test."""

    def run(*args: object, code: int | None = 0, cwd: Path = tmp_path, **env: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "ckptvcs", *map(str, args)],
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=300,
            env=environment() | env,
            check=False,
        )
        return check(Done(done.returncode, done.stdout, done.stderr), args, code)

    return run


@pytest.fixture
def ckpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ckpt:
    """The same in this process, which is several times faster."""

    def run(*args: object, code: int | None = 0, cwd: Path = tmp_path, **env: str) -> Done:
        monkeypatch.chdir(cwd)
        given = {"CKPT_DIR": env.get("CKPT_DIR")}
        done = CliRunner().invoke(app, [*map(str, args)], env=given)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return check(Done(done.exit_code, done.stdout, done.stderr), args, code)

    return run


@pytest.fixture
def forger(tmp_path: Path) -> Forger:
    """A writer of forged objects, with a repository of its own."""
    return Forger(tmp_path)


@pytest.fixture
def cut_folder() -> Iterator[Path]:
    """A folder where syncing costs nothing, if there is one."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-test-", dir=place) as folder,
        mock.patch.object(tempfile, "tempdir", folder),  # killed processes leave files there
    ):
        yield Path(folder)


_SHORT = {"archive now", "commit", "gc", "import one by one"}
"""The nightly profile runs all scenarios; the others take the steps of these."""


@pytest.fixture(params=short(SCENARIOS, _SHORT))
def cut(request: pytest.FixtureRequest, cut_folder: Path) -> Cut:
    """A scenario of `tests.helpers.crashing`, prepared."""
    return Cut(SCENARIOS[request.param], cut_folder)
