"""Standard streams that the system refuses: full, closed, gone, slow.  A command ends with a
documented code and one line, and says of a commit that it was made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from ckptvcs import Repo, StorageError
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import set_ref
from tests.helpers.command_line import environment
from tests.helpers.crashing import save

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A repository of two commits, files for more, and a folder to import."""
    save(tmp_path, range(1, 5))
    repo = Repo.init(tmp_path)
    for step in (1, 2):
        repo.commit_path(tmp_path / f"step-{step}.pt", message="")
    save(tmp_path / "found", range(5, 7))
    return tmp_path


def start(
    folder: Path,
    *args: str,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int | IO[str] = subprocess.PIPE,
    unbuffered: str = "",
) -> subprocess.Popen[str]:
    env = environment() | {"PYTHONUNBUFFERED": unbuffered}
    return subprocess.Popen(
        [sys.executable, "-m", "ckptvcs", *args],
        cwd=folder,
        text=True,
        env=env,
        stdout=stdout,
        stderr=stderr,
    )


def to_full(folder: Path, *args: str, unbuffered: str = "") -> list[str]:
    """What a command says whose output has no room: one line and a hint."""
    with FULL.open("w") as full:
        process = start(folder, *args, stdout=full, unbuffered=unbuffered)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == StorageError.exit_code, err
    lines = [line for line in err.splitlines() if not line.startswith(("note: ", "removed: "))]
    if "--json" in args:
        (line,) = lines
        lines = [f"{key}: {json.loads(line)[key]}" for key in ("error", "hint")]
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], err
    assert "standard output" in lines[0]
    return lines


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_commit_that_was_made_is_said_to_be(run: Path, unbuffered: str) -> None:
    (line, _) = to_full(run, "commit", "step-3.pt", unbuffered=unbuffered)
    made = Repo.open(run).log(1)[0]
    assert made.step == 3
    assert line.startswith(f"error: commit {made.id[:8]} was made, but: ")


def test_what_was_imported_and_watched_is_said(run: Path) -> None:
    (line, _) = to_full(run, "watch", "found", "--once", "--settle", "0")
    made = Repo.open(run).log(1)[0]
    assert line.startswith(f"error: commit {made.id[:8]} was made, but: ")
    (line, _) = to_full(run, "import", "found")
    assert line.startswith("error: 1 of 2 checkpoints were committed, but: ")
    assert [entry.step for entry in Repo.open(run).log(2)] == [6, 5]


@pytest.mark.parametrize(
    "args",
    [
        "log",
        "log --json",
        "show",
        "status",
        "stats",
        "verify",
        "--help",
        "--version",
        "config",
        "gc",
        "diff 1 2",
        "reflog",
        "commit --help",
    ],
)
def test_any_output_without_room(run: Path, args: str) -> None:
    to_full(run, *args.split())


def test_talk_without_room_is_no_error(run: Path) -> None:
    with FULL.open("w") as full:
        process = start(run, "commit", "step-4.pt", "--step", "2", stderr=full)
        out = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "main-2" in out
    with FULL.open("w") as full:
        process = start(run, "log", "nothing", stdout=full, stderr=full)
        assert process.wait(120) == 3


@pytest.mark.parametrize("args", ["log --json", "--help", "commit step-3.pt"])
def test_a_reader_that_has_gone(run: Path, args: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(run, *args.split(), stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0
    assert Repo.open(run).log(1)[0].step == (3 if "commit" in args else 2)


def test_a_pipe_that_does_not_wait(run: Path) -> None:
    repo = Repo.open(run)
    for number in range(40):
        set_ref(
            handle(repo),
            "tags",
            f"a-very-long-name-of-a-tag-{'x' * 150}-{number}",
            repo.resolve(2),
            "tag",
        )
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = start(run, "log", "--json", stdout=writing)
    os.close(writing)
    time.sleep(0.5)
    with os.fdopen(reading) as pipe:
        rows = json.load(pipe)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0
    assert len(rows[0]["tags"]) == 40


_CLOSED = """
import os, sys
for number in {numbers}:
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", "ckptvcs", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 1, 2),
        *(
            pytest.param(closed, marks=pytest.mark.slow)
            for closed in ((0,), (1,), (2,), (0, 1), (1, 2))
        ),
    ],
)
def test_streams_that_were_closed(run: Path, numbers: tuple[int, ...]) -> None:
    command = [sys.executable, "-c", _CLOSED.format(numbers=numbers)]
    for args in (["commit", "step-3.pt"], ["import", "found", "--delete-originals"], ["verify"]):
        done = subprocess.run(
            [*command, *args], cwd=run, env=environment(), timeout=120, check=False
        )
        assert done.returncode in (0, 4), args
    repo = Repo.open(run)
    assert [entry.step for entry in repo.log()] == [6, 5, 3, 2, 1]
    assert repo.verify().damage == []


_IN_PYTHON = """
import os, sys
from pathlib import Path
from ckptvcs import Repo
for number in range(3):
    os.close(number)
repo = Repo.open(sys.argv[1])
opened = [Path(f"/proc/self/fd/{number}").readlink() for number in range(3)]
assert {str(file) for file in opened} == {"/dev/null"}, opened
repo.commit({"w": [1]}, step=9)
os.write(2, b"what a library prints")
os._exit(7)
"""


def test_descriptors_of_standard_streams_are_never_those_of_files(run: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _IN_PYTHON, run], timeout=120, check=False)
    assert done.returncode == 7
    repo = Repo.open(run)
    assert repo.log(1)[0].step == 9
    assert repo.verify().damage == []
