"""SIGINT and SIGTERM at any moment, and twice: nothing is lost, and the next try works."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.command_line import environment
from tests.helpers.crashing import SCENARIOS, Expected, expected
from tests.helpers.profiles import short

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
SEED = int(os.environ.get("CKPT_TEST_SEED", "0"))
TIMES = 40 if NIGHTLY else 2
SIZE = 'echo "{\\"bytes\\": $(wc -c < "$1")}"'
COMMANDS = {
    "commit": ["commit", "../step-4.pt", "-m", "next"],
    "gc": ["gc", "--keep-last", "2", "--now"],
    "each": ["each", "..", "--metric", "bytes", "--", "sh", "-c", SIZE, "sh"],
    "import": ["import", "../found", "--delete-originals", "--yes"],
}
ENDS = {
    signal.SIGINT: (130, -signal.SIGINT),  # the second one: before there is anybody to catch it
    signal.SIGTERM: (143, -signal.SIGTERM),
}


def ckpt(root: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ckptvcs", *args],
        cwd=root / "repo",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


@pytest.mark.parametrize("name", short(COMMANDS, ["commit", "import"]))
def test_a_signal_at_any_moment_loses_nothing(name: str, cut_folder: Path) -> None:
    scenario = SCENARIOS[name]
    template = cut_folder / "template"
    template.mkdir()
    scenario.build(template)
    wanted: Expected = expected(scenario, template, cut_folder / "calm")
    timed = cut_folder / "timed"
    shutil.copytree(template, timed)
    start = time.monotonic()
    _, err = (process := ckpt(timed, *COMMANDS[name])).communicate()
    assert process.returncode == 0, err
    length = time.monotonic() - start
    draw = random.Random(SEED)
    for number in range(TIMES):
        first = (signal.SIGINT, signal.SIGTERM)[number % 2]
        sent = [first]
        root = cut_folder / str(number)
        shutil.copytree(template, root)
        process = ckpt(root, *COMMANDS[name])
        time.sleep(length * draw.uniform(0.5, 1))  # mostly behind the imports
        process.send_signal(first)
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, 0.05))
            sent.append(draw.choice([signal.SIGINT, signal.SIGTERM]))
            process.send_signal(sent[1])
        _, err = process.communicate(timeout=120)
        assert process.returncode in (0, *(code for one in sent for code in ENDS[one])), err
        if process.returncode > 0:
            assert len(sent) > 1 or "Traceback" not in err, err
        wanted.check(scenario, root)
        shutil.rmtree(root)


def test_a_checkout_leaves_the_file_that_was_there(cut_folder: Path) -> None:
    scenario = SCENARIOS["commit"]
    scenario.build(cut_folder)
    target = cut_folder / "model.pt"
    shutil.copy(cut_folder / "step-1.pt", target)
    before = target.read_bytes()
    after = (cut_folder / "step-3.pt").read_bytes()
    names = {path.name for path in cut_folder.iterdir()}
    draw = random.Random(SEED)
    for number in range(TIMES):
        process = ckpt(cut_folder, "checkout", "3", "-o", "../model.pt", "--force")
        time.sleep(draw.uniform(0.4, 1.2))
        process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
        process.communicate(timeout=120)
        assert target.read_bytes() in (before, after)
        assert {path.name for path in cut_folder.iterdir()} == names
