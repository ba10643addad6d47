"""`ckpt each`: what it prints, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptvcs import Repo
from tests.helpers.command_line import Ckpt, environment

SIZE = "import os, sys; print('{\"size\": %d}' % os.path.getsize(sys.argv[1]))"


def test_metrics_are_stored_and_skipped_the_next_time(ckpt: Ckpt, history: Path) -> None:
    done = ckpt("each", "2..4", "--", sys.executable, "-c", SIZE, "{}")
    assert [line.partition(" (")[0] for line in done.out.splitlines()] == [
        "step 2",
        "step 3",
        "step 4",
    ]
    assert Repo.open(history).show(3).metrics["size"] > 1000
    done = ckpt("each", "..", "--metric", "size", "--json", "--", sys.executable, "-c", SIZE)
    assert [row["state"] for row in done.json] == ["done", *["skipped"] * 3, "done"]
    assert "skipped 3 of 5 commits: they have size" in done.err


def test_failures_are_reported_and_end_with_an_exit_code(ckpt: Ckpt, history: Path) -> None:
    code = f"{SIZE}; sys.exit(sys.argv[2] == '3')"
    done = ckpt("each", "..", "--", sys.executable, "-c", code, "{}", "{step}", code=1)
    assert len(done.out.splitlines()) == 4
    assert "error: step 3" in done.err
    assert "1 of 5 commits failed" in done.err
    assert "with --metric size" in done.err
    command = ("--", sys.executable, "-c", code, "{}", "{step}")
    done = ckpt("each", "..", "--fail-fast", "--json", *command, code=1)
    assert [row["state"] for row in done.json] == ["done", "done", "failed"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["3", "--", "true"], "invalid range"),
        (["1..2", "--", "no-such-program-at-all"], "no such program"),
        (["1..2", "--only", "model", "--format", "zip", "--", "true"], "unknown format"),
    ],
)
def test_wrong_arguments(ckpt: Ckpt, history: Path, arguments: list[str], text: str) -> None:
    assert text in ckpt("each", *arguments, code=2).err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interruption_ends_the_commands_and_can_be_continued(
    history: Path, tmp_path: Path, number: signal.Signals, code: int, jobs: str
) -> None:
    """The command waits at step 3, in a child of a shell."""
    script = tmp_path / "wait.sh"
    script.write_text(
        f'echo "{{\\"size\\": 1}}"\nif [ "$1" = 3 ]; then echo $$ > {tmp_path}/pid; sleep 600; fi\n'
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptvcs", "each", "..", "-j", jobs, "--", "sh", script, "{step}"],
        cwd=history,
        env=environment() | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "done; continue with --metric size" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list(scratch.iterdir())
    assert Repo.open(history).show(2).metrics["size"] == 1.0
    assert "size" not in Repo.open(history).show(3).metrics


def test_a_child_that_keeps_the_pipe_open_is_not_waited_for(ckpt: Ckpt, history: Path) -> None:
    command = "sleep 300 & echo $! > child; echo '{\"z\": 1}'"
    ckpt("each", "2..2", "--", "sh", "-c", command)
    os.kill(int((history / "child").read_text()), signal.SIGKILL)
    assert Repo.open(history).show(2).metrics["z"] == 1
