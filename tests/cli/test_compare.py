"""diff, bisect, log --graph, branch --delete: what a user does about a run that went wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ckptvcs.cli import diff, render
from ckptvcs.history.schema import TensorInfo
from ckptvcs.ops.diff_sides import Indistinct
from tests.helpers.command_line import Ckpt, environment
from tests.helpers.training import save_run, train

NUMBERS = {
    "norm_a",
    "norm_b",
    "norm_difference",
    "relative",
    "update_ratio",
    "cosine",
    "max_abs",
    "entries",
    "changed",
    "nonfinite_a",
    "nonfinite_b",
}
INFO = {"name", "part", "role", "dtype", "shape"}


@pytest.fixture
def temporary(history: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bisect checks commits out."""
    folder = history / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_diff_reports_tensors_as_json(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    found = ckpt("diff", 2, 5, "--json").json
    assert found.keys() == {
        "a",
        "b",
        "steps",
        "metadata",
        "total",
        "tensors",
        "added",
        "removed",
        "reshaped",
        "unchanged",
        "indistinguishable",
        "dropped",
    }
    assert (found["a"]["step"], found["b"]["step"], found["steps"]) == (2, 5, 3)
    assert found["total"].keys() == NUMBERS
    for row in found["tensors"]:
        assert row.keys() == INFO | NUMBERS | {
            "error_a",
            "error_b",
            "near_a",
            "near_b",
            "below_error",
            "layer",
        }
    told = {row["name"]: (row["a"], row["b"]) for row in found["metadata"]}
    assert told["metrics.loss"] == (4, 1)
    assert told["step"] == (2, 5)
    a, b = (torch.load(run_files[n], weights_only=True)["model"]["0.weight"] for n in (1, 4))
    (row,) = (row for row in found["tensors"] if row["name"] == "model.0.weight")
    relative = float((b.double() - a.double()).norm() / a.double().norm())
    assert row["relative"] == pytest.approx(relative)
    assert row["update_ratio"] == pytest.approx(relative / 3)
    weights = [row["relative"] for row in found["tensors"] if row["part"] == "model"]
    assert weights == sorted(weights, reverse=True)
    assert {info["name"] for info in found["unchanged"]} >= {"model.4.weight", "model.4.bias"}


def test_how_diff_names_its_sides(ckpt: Ckpt, history: Path) -> None:
    def sides(*args: object) -> tuple[int, int]:
        found = ckpt("diff", *args, "--json", "--only", "model").json
        assert {row["part"] for row in found["tensors"]} <= {"model"}
        return found["a"]["step"], found["b"]["step"]

    assert sides() == (4, 5)
    assert sides(2) == (2, 5)
    assert sides(2, 3) == sides("2..3") == (2, 3)
    assert sides("2..") == (2, 5)
    assert sides("..2") == (5, 2)
    assert sides("main@1..main~1") == (1, 4)


def test_diff_for_people(ckpt: Ckpt, history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ckpt("diff", "3", "--only", "model", "-n", 2).out.splitlines()
    assert "step 3, exact" in lines[0]
    assert "step 5, exact" in lines[1]
    assert "  metrics.loss: 3 -> 1" in lines
    start = next(n for n, text in enumerate(lines) if text.startswith("name"))
    heading = ["name", "|A|", "|B|", "|B-A|", "change", "per", "step", "cosine", "max", "changed"]
    assert lines[start].split() == heading
    assert len(lines[start:]) == 5  # two tensors, the total, the unchanged ones
    assert lines[start + 3].startswith("all changed weights")
    assert "the same on both sides" in lines[-1]
    monkeypatch.setattr(render, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(diff, "DEFAULT_ROWS", 4)
    shown = ckpt("diff", 3)
    assert sum("%" in line for line in shown.out.splitlines()) == 4 + 1
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "use -n N to show more" in shown.err


def test_diff_of_what_is_the_same_and_of_near(ckpt: Ckpt, history: Path) -> None:
    same = ckpt("diff", "HEAD", "HEAD", "--json").json
    assert (same["tensors"], same["total"], same["metadata"]) == ([], None, [])
    assert "the same on both sides" in ckpt("diff", "HEAD", "HEAD").out
    state = torch.load(history / "model.pt", weights_only=True)
    state["model"]["2.weight"] *= 1 + 1e-5
    state["model"]["0.weight"][0, 0] = torch.nan
    torch.save(state | {"step": 6}, history / "model.pt")
    config = history / ".ckpt" / "config.toml"
    config.write_text(config.read_text("utf-8") + "keep-exact = 0\n", "utf-8")
    ckpt("commit", "model.pt", "--codec", "excp", "--metric", "loss=nan")
    shown = ckpt("diff").out
    assert "step 6, near" in shown
    assert "~" in shown
    assert "0 -> 1" in shown
    assert "metrics.loss: 1 -> nan" in shown
    found = ckpt("diff", "--json", "--sort", "name").json
    json.dumps(found, allow_nan=False)
    names = [row["name"] for row in found["tensors"] if row["part"] == "optimizer"]
    assert names == sorted(names)
    assert any(row["error_b"] for row in found["tensors"])
    assert {"name": "metrics.loss", "a": 1, "b": "NaN"} in found["metadata"]


def test_diff_of_near_sides_claims_nothing(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    ckpt("config", "keep-exact", "0")
    states = train(4)
    for step, state in enumerate(states, 1):
        torch.save(state | {"step": step}, tmp_path / "m.pt")
        ckpt("commit", "m.pt")
    found = ckpt("diff", 2, 3, "--json").json
    said = ckpt("diff", 2, 3).out
    near = [row for row in found["tensors"] if row["near_a"] or row["near_b"]]
    assert near
    assert all(row["changed"] is None for row in near)
    assert all(row["changed"] > 0 for row in found["tensors"] if row not in near)
    assert found["total"]["changed"] is None
    (total,) = (line for line in said.splitlines() if line.startswith("all changed"))
    assert "%" not in total
    # The near form of step 4, committed as it is, is exact there; what it came from is not known.
    ckpt("checkout", 4, "-o", "m.pt", "--force")
    ckpt("commit", "m.pt", "--step", 5)
    found = ckpt("diff", 4, 5, "--json").json
    assert found["tensors"] == []
    assert found["indistinguishable"]
    for row in found["indistinguishable"]:
        assert row.keys() == INFO | {"near_a", "near_b", "differs"}
        assert (row["near_a"], row["near_b"], row["differs"]) == (True, False, None)
    count = len(found["indistinguishable"])
    said = ckpt("diff", 4, 5).out.splitlines()[-1]
    assert said == f"{count} tensors cannot be told apart (near on one side or both)"


def test_diff_leaves_out_what_was_dropped(ckpt: Ckpt, history: Path) -> None:
    before = ckpt("diff", 2, 3, "--json").json
    assert before["dropped"] == []
    ckpt("gc", "--keep-optimizer-last", 2, "--now")
    for a, b in ((2, 3), (3, 5), (5, 3)):
        found = ckpt("diff", a, b, "--json").json
        assert found["dropped"] == ["optimizer"]
        parts = {
            row["part"]
            for key in ("tensors", "added", "removed", "unchanged", "indistinguishable")
            for row in found[key]
        }
        assert "optimizer" not in parts
        assert "model" in parts
    found = ckpt("diff", 2, 3, "--json").json
    for key in ("tensors", "unchanged"):
        assert found[key] == [row for row in before[key] if row["part"] != "optimizer"]
    assert "optimizer: not compared: a rule dropped it" in ckpt("diff", 2, 3).out
    assert "was dropped" in ckpt("diff", 2, 3, "--only", "optimizer", code=3).err
    assert ckpt("diff", 4, 5, "--json").json["dropped"] == []


def test_how_diff_says_that_it_cannot_tell() -> None:
    info = TensorInfo("w", "F32", (3,), "model", "weight", inline=False)
    both, left = Indistinct(info, True, True, False), Indistinct(info, True, False, False)
    known = Indistinct(info, True, True, True)
    for found, said in (
        ([both] * 33, "33 tensors cannot be told apart (near on both sides)"),
        ([both], "1 tensor cannot be told apart (near on both sides)"),
        ([both, left], "2 tensors cannot be told apart (near on one side or both)"),
        (
            [both, known],
            "2 tensors cannot be told apart (near on both sides); the originals of 1 tensor differ",
        ),
    ):
        assert diff.describe_indistinct(found) == said


def test_diff_that_cannot_be(ckpt: Ckpt, history: Path) -> None:
    assert "names both" in ckpt("diff", "2..3", "4", code=2).err
    assert "model" in ckpt("diff", "--only", "weights", code=2).err
    assert "one of relative" in ckpt("diff", "--sort", "size", code=2).err
    assert "x>=1" in ckpt("diff", "-n", "0", code=2).err
    ckpt("diff", "99", code=3)
    ckpt("diff", "HEAD~5", code=3)


JUDGE = "import os, sys; sys.exit(int(os.environ['CKPT_STEP']) >= 4)"


def test_bisect_with_a_command(
    ckpt: Ckpt, history: Path, temporary: Path, run_files: list[Path]
) -> None:
    log = history / "log"
    before = (history / "model.pt").read_bytes()
    code = (
        "import hashlib, os, pathlib, sys\n"
        "path = sys.argv[1].removeprefix('file:')\n"
        "assert path == os.environ['CKPT_PATH'] and os.environ['CKPT_COMMIT']\n"
        "digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()\n"
        f"print(os.environ['CKPT_STEP'], digest, file=open({str(log)!r}, 'a'))\n" + JUDGE
    )
    found = ckpt("bisect", 1, 5, "--json", "--", sys.executable, "-c", code, "file:{}")
    assert ckpt("show", found.json["first_bad"], "--json").json["step"] == 4
    assert [entry["step"] for entry in found.json["candidates"]] == [4]
    tested = [(row["step"], row["result"]) for row in found.json["tested"]]
    assert tested == [(1, "good"), (5, "bad"), (3, "good"), (4, "bad")]
    assert "step 3" in found.err
    import hashlib

    true = {str(n): hashlib.sha256(p.read_bytes()).hexdigest() for n, p in enumerate(run_files, 1)}
    assert {tuple(line.split()) for line in log.read_text().splitlines()} == {
        (str(step), true[str(step)]) for step, _ in tested
    }
    plain = ckpt("bisect", 1, 5, "--", sys.executable, "-c", code)  # the path is added at the end
    assert plain.out.splitlines()[0] == "first bad commit:"
    assert "step 4" in plain.out
    assert list(temporary.iterdir()) == []
    assert (history / "model.pt").read_bytes() == before
    assert ckpt("status", "--json").json["branch"] == "main"


def test_exit_codes_of_a_command(ckpt: Ckpt, history: Path, temporary: Path) -> None:
    def run(code: object, expected: int = 0, good: int = 1) -> str:
        text = f"import os, sys; step = int(os.environ['CKPT_STEP']); sys.exit({code})"
        done = ckpt("bisect", good, 5, "--", sys.executable, "-c", text, code=expected)
        return done.out + done.err

    for bad in (1, 124, 126, 127):
        assert "first bad commit:" in run(f"{bad} if step >= 2 else 0")
    skipped = run("0 if step == 1 else 1 if step == 5 else 125")
    assert "one of" in skipped
    assert skipped.count("step ") >= 4
    assert "first bad commit:" in run("0 if step < 3 else 125 if step == 4 else 1")
    for code in (128, 255):
        assert f"ended with exit code {code}" in run(f"{code} if step == 3 else step > 3", 2)
    killed = "os.kill(os.getpid(), 9) if step == 3 else step > 3"
    assert "signal 9" in run(killed, 2)
    assert "given as good, but is bad" in run("1", 2)
    assert "given as bad, but is good" in run("0", 2)
    assert "not an ancestor" in ckpt("bisect", 5, 1, "--nan", code=2).err
    assert "cannot run 'nothing-here'" in ckpt("bisect", 1, 5, "--", "nothing-here", code=2).err
    assert list(temporary.iterdir()) == []


def test_tests_that_are_built_in(ckpt: Ckpt, history: Path) -> None:
    below = ckpt("bisect", 1, 5, "--metric", "loss", "--below", "3.5", "--json").json
    assert [entry["step"] for entry in below["candidates"]] == [3]
    state = torch.load(history / "model.pt", weights_only=True)
    for step in (6, 7, 8):
        state["model"]["0.weight"][0, 0] = torch.inf if step > 6 else 1
        torch.save(state | {"step": step}, history / "model.pt")
        ckpt("commit", "model.pt")
    assert [e["step"] for e in ckpt("bisect", 1, 8, "--nan", "--json").json["candidates"]] == [7]
    for args in (
        [],
        ["--nan", "--metric", "loss", "--above", 1],
        ["--metric", "loss"],
        ["--nan", "--above", "1"],
        ["--nan", "--", "true"],
    ):
        assert "hint" in ckpt("bisect", 1, 8, *args, code=2).err or args


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bisect_leaves_nothing(
    number: signal.Signals, history: Path, temporary: Path
) -> None:
    ready = history / "ready"
    wait = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(300)"
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptvcs", "bisect", "1", "5", "--", sys.executable, "-c", wait],
        cwd=history,
        env=environment() | {"TMPDIR": str(temporary)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert any(temporary.iterdir())
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert list(temporary.iterdir()) == []


def test_a_directory_is_checked_out_as_one(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init", "--codec", "lossless")
    for step, state in enumerate(train(3), 1):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save(state, folder / "model.pt")
        ckpt("commit", folder, "--step", step)
    code = (
        "import pathlib, sys; path = pathlib.Path(sys.argv[1])\n"
        "assert (path / 'model.pt').is_file()\nsys.exit(path.name > 'checkpoint-1')"
    )
    found = ckpt("bisect", 1, 3, "--json", "--", sys.executable, "-c", code).json
    assert [entry["step"] for entry in found["candidates"]] == [2]


def test_rolling_back_and_going_on(ckpt: Ckpt, tmp_path: Path) -> None:
    """Three commits, back to the second, on from there: the graph tells the story."""
    ckpt("init", "--codec", "lossless")
    first = save_run(tmp_path / "first", train(3))
    second = save_run(tmp_path / "second", train(4, seed=1))
    for number, path in enumerate(first, 1):
        shutil.copy(path, tmp_path / "model.pt")
        ckpt("commit", "model.pt", "-m", f"try {number}", "--metric", f"loss={number}.5")
    ckpt("tag", "spike", "3")
    ckpt("checkout", 2)
    for number, path in enumerate(second[2:], 3):
        shutil.copy(path, tmp_path / "model.pt")
        made = ckpt("commit", "model.pt", "-m", "lower rate", "--metric", f"loss={5 - number}.5")
        assert ("started branch 'main-2'" in made.err) == (number == 3)
    rows = [line.rstrip() for line in ckpt("log", "--graph").out.splitlines()]
    assert rows[0].split()[:5] == ["step", "id", "when", "message", "loss"]
    assert [line[:4].rstrip() for line in rows[1:]] == ["*", "*", "| *", "|/", "*", "*"]
    for row, words in zip(
        rows[1:],
        [
            ["4", "(HEAD -> main-2) lower rate", "1.5 "],
            ["3", "lower rate", "2.5 "],
            ["3", "(main, tag: spike) try 3", "3.5 "],
            [],
            ["2", "try 2", "2.5 "],
            ["1", "try 1", "1.5 "],
        ],
        strict=True,
    ):
        assert all(f" {word}" in row for word in words), row
    listed = ckpt("log", "--graph", "--json").json
    assert listed == ckpt("log", "--all", "--json").json
    parents = {entry["id"]: entry["parents"] for entry in listed}
    assert sum(len(found) for found in parents.values()) == 4
    assert len(ckpt("log", "--graph", "-n", 3).out.splitlines()) == 4
    line = ckpt("log", "--graph", "main").out.splitlines()
    assert [row.split()[:2] for row in line[1:]] == [["*", "3"], ["*", "2"], ["*", "1"]]
    ckpt("branch", "None", 2)
    ckpt("checkout", 1)
    detached = ckpt("log", "--graph").out
    assert all(f"({names}) " in detached for names in ("main-2", "None", "HEAD"))
    found = ckpt("bisect", 1, "main", "--metric", "loss", "--above", 3, "--json").json
    assert [entry["step"] for entry in found["candidates"]] == [3]


def test_graph_on_a_terminal(
    ckpt: Ckpt, history: Path, monkeypatch: pytest.MonkeyPatch, run_files: list[Path]
) -> None:
    ckpt("checkout", 2)
    (history / "model.pt").write_bytes(run_files[3].read_bytes())
    ckpt("commit", "model.pt", "-m", "a message that is longer than there is room for it")
    monkeypatch.setattr(render, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = ckpt("log", "--graph").out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.rstrip().endswith(("exact", "fidelity")) for line in lines] == [
        drawn != "|/" for drawn in (line.split(" ")[0] for line in lines)
    ]
    assert "loss" in lines[0].split()
    assert len(ckpt("log", "--graph", "-n", 1).out.splitlines()) == 2


def test_deleting_a_branch(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    ckpt("checkout", 3)
    (history / "model.pt").write_bytes(run_files[4].read_bytes())
    ckpt("commit", "model.pt", "-m", "other")
    main = ckpt("log", "main", "--json").json
    assert "HEAD is on branch" in ckpt("branch", "--delete", "main-2", code=4).err
    assert "no branch" in ckpt("branch", "--delete", "nothing", code=3).err
    assert "name" in ckpt("branch", "--delete", code=2).err
    ckpt("tag", "kept", "main~1")
    done = ckpt("branch", "--delete", "main")
    assert main[0]["id"][:8] in done.err
    assert main[1]["id"][:8] not in done.err  # a tag holds it
    assert [row["name"] for row in ckpt("branch", "--json").json] == ["main-2"]
    ckpt("branch", "main", main[0]["id"][:8])
    assert [e["step"] for e in ckpt("log", "main", "--json").json] == [5, 4, 3, 2, 1]
    gone = ckpt("branch", "--delete", "main", "--json").json
    assert gone == {
        "name": "main",
        "commit": main[0]["id"],
        "deleted": True,
        "unreachable": [main[0]["id"]],
    }
    ckpt("gc")
    assert ckpt("verify", "--json").json["ok"]
    ckpt("branch", "main", main[0]["id"], code=3)
    assert ckpt("show", "kept", "--json").json["id"] == main[1]["id"]
