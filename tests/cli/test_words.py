"""Words and habits of git: -C, -q, help, short options, and errors in one style."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from ckptvcs.cli import app
from ckptvcs.cli.app import COMMANDS
from tests.helpers.command_line import Ckpt


def run(capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, *args: str) -> str:
    """Run the command line in this process as a user starts it; return its standard error."""
    patch.setattr(sys, "argv", ["ckpt", *args])
    assert app.run()
    out, err = capsys.readouterr()
    assert not out
    return err


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        ("log --all=3", "option --all takes no value", "run 'ckpt log --help'"),
        ("commit", "missing argument PATH", "run 'ckpt commit --help'"),
        ("average 1..2", "missing option -o/--output", "run 'ckpt average --help'"),
        ("commit -m", "option -m requires a value", "run 'ckpt commit --help'"),
        ("undo a b", "unexpected argument: a b", "run 'ckpt undo --help'"),
        ("log -n x", "-n/--max-count must be a whole number, got 'x'", "run 'ckpt log --help'"),
        ("log -n 0", "-n/--max-count must be at least 1, got 0", "run 'ckpt log --help'"),
        ("watch . --settle x", "--settle must be a number, got 'x'", "run 'ckpt watch --help'"),
        (
            "diff --only x",
            "--only must be one of 'model', 'optimizer', 'rest', got 'x'",
            "run 'ckpt diff --help'",
        ),
        ("lgo", "unknown command 'lgo'", "did you mean 'log'?"),
        ("help lgo", "unknown command 'lgo'", "did you mean 'log'?"),
        ("log --al", "unknown option '--al'", "did you mean --all?"),
        ("--al", "unknown option '--al'", "run 'ckpt --help'"),
        ("--repo diff status --al", "unknown option '--al'", "run 'ckpt status --help'"),
        ("-C nowhere log", "cannot change to nowhere: No such file or directory", None),
    ],
)
def test_wrong_usage_is_told_like_other_errors(
    args: str,
    message: str,
    hint: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = run(capsys, monkeypatch, *args.split()).splitlines()
    assert lines == [f"error: {message}", *([f"hint: {hint}"] if hint else [])]
    document = json.loads(run(capsys, monkeypatch, *args.split(), "--json"))
    assert document.keys() == {"error", "hint", "kind", "exit_code"}
    assert document["exit_code"] in (2, 3)


def test_json_after_two_dashes_is_a_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, monkeypatch, "bisect", "1", "2", "--", "--json").startswith("error: ")


def test_errors_of_json_commands_are_one_line_of_json(ckpt: Ckpt, history: Path) -> None:
    done = ckpt("show", "99", "--json", code=3)
    assert done.out == ""
    assert json.loads(done.err) == {
        "error": "no commit of step 99",
        "hint": "choose one of the nearest steps: 1, 2, 3, 4, 5",
        "kind": "not-found",
        "exit_code": 3,
    }
    ckpt("tag", "x\u202ey\n", "--json", code=2).err.encode("ascii")


def test_help_of_a_command_is_its_help(ckpt: Ckpt) -> None:
    for name in ("log", "import"):
        shown = ckpt("help", name).out
        assert shown.splitlines()[2:] == ckpt(name, "--help").out.splitlines()[2:]
    listed = ckpt("help").out
    assert all(f"\n  {name} " in listed for name in (*COMMANDS, "help", "version"))
    assert ckpt("version").out == ckpt("--version").out == ckpt("-v").out


def test_a_directory_to_run_in(ckpt: Ckpt, history: Path, tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    here = ckpt("log", "--json").json
    assert ckpt("-C", history, "log", "--json", cwd=inner).json == here
    assert ckpt("-C", "..", "-C", "..", "log", "--json", cwd=inner).json == here
    assert ckpt("-C", "a", "--repo", "..", "log", "--json").json == here


def test_quiet_prints_data_and_errors_only(ckpt: Ckpt, history: Path) -> None:
    done = ckpt("-q", "commit", "model.pt", "-m", "again")
    assert done.out.strip() == ckpt("log", "-n", 1, "--json").json[0]["id"]
    assert done.err == ""
    assert ckpt("checkout", "1").err
    assert ckpt("checkout", "1", "-q").err == ""
    assert ckpt("checkout", "2").err
    assert ckpt("-q", "checkout", "99", code=3).err.startswith("error: no commit of step 99")


def test_short_options_mean_the_same(ckpt: Ckpt, history: Path, tmp_path: Path) -> None:
    assert ckpt("log", "--max-count", 2).out == ckpt("log", "-n", 2).out
    ckpt("tag", "t", 1)
    ckpt("branch", "b", 1)
    done = ckpt("tag", "-d", "t")
    assert (done.out[:13], done.err) == ("deleted tag t", "")
    assert ckpt("branch", "-d", "b").out.startswith("deleted branch b")
    assert ckpt("tag", "--json").json == []
    ckpt("tag", "-d", code=2)
    (tmp_path / "out.pt").write_bytes(b"mine")
    ckpt("export", 1, "out.pt", code=4)
    ckpt("export", 1, "out.pt", "-f")
    (tmp_path / "model.pt").write_bytes(b"mine")
    ckpt("checkout", 1, code=4)
    ckpt("checkout", 1, "-f")


def test_negative_numbers_and_dashes_are_values(ckpt: Ckpt, history: Path) -> None:
    assert "must be an integer of at least 0" in ckpt("config", "keep-exact", -1, code=2).err
    assert "unknown revision '-3'" in ckpt("show", "-3", code=3).err
    assert "unknown revision '--all'" in ckpt("show", "--", "--all", code=3).err
    ckpt("note", 1, "--metric", "val loss/a=b:c=-1.5e-3", "--set", "-x=-y")
    entry = ckpt("show", 1, "--json").json
    assert entry["metrics"]["val loss/a=b:c"] == -1.5e-3
    assert entry["fields"] == {"-x": "-y"}
    assert [e["step"] for e in ckpt("log", "--metric", "loss>-1", "--json").json] == [5, 4, 3, 2, 1]
    ckpt("note", 2, "--metric", "=1", code=2)
    ckpt("bisect", 1, 5, "--metric", "loss", "--above", -1, code=2)


def test_a_branch_is_renamed(ckpt: Ckpt, history: Path) -> None:
    ckpt("branch", "old", 2)
    assert ckpt("branch", "-m", "old", "new").out == "branch old is now new\n"
    ckpt("branch", "--rename", "trunk")
    names = {row["name"]: row["current"] for row in ckpt("branch", "--json").json}
    assert names == {"new": False, "trunk": True}
    assert ckpt("reflog", "main", "--json").json[0]["action"] == "rename to trunk"
    ckpt("commit", "model.pt", "--step", 6)
    assert ckpt("log", "-n", 1, "--json").json[0]["step"] == 6
    ckpt("branch", "-m", "trunk", "new", code=4)
    ckpt("branch", "-m", "nothing", "other", code=3)
    ckpt("branch", "-m", "trunk", "two words", code=2)
    ckpt("branch", "-m", code=2)
    ckpt("branch", "-m", "-d", "new", code=2)
    ckpt("checkout", 1)
    ckpt("branch", "-m", "other", code=3)


def test_a_branch_without_commits_is_renamed(
    ckpt: Ckpt, tmp_path: Path, run_files: list[Path]
) -> None:
    ckpt("init")
    ckpt("branch", "-m", "trunk")
    ckpt("commit", run_files[0])
    assert [row["name"] for row in ckpt("branch", "--json").json] == ["trunk"]


def test_checkout_starts_a_branch(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    ckpt("checkout", "-b", "retry", 2)
    assert (history / "model.pt").read_bytes() == run_files[1].read_bytes()
    (history / "model.pt").write_bytes(run_files[4].read_bytes())
    assert ckpt("commit", "model.pt", "--step", 3).out.startswith("[retry ")
    (history / "model.pt").write_bytes(b"mine")
    ckpt("checkout", "-b", "lost", 1, code=4)
    ckpt("checkout", "-b", "here")
    assert (history / "model.pt").read_bytes() == b"mine"
    names = {row["name"]: row["current"] for row in ckpt("branch", "--json").json}
    assert names == {"main": False, "retry": False, "here": True}
    ckpt("checkout", "-b", "retry", 1, code=4)
    ckpt("checkout", "-b", "beside", 1, "-o", "other.pt")
    assert (history / "other.pt").read_bytes() == run_files[0].read_bytes()
    assert (history / "model.pt").read_bytes() == b"mine"
    assert ckpt("status", "--json").json["branch"] == "beside"
    ckpt("checkout", "-b", "x", 1, "--only", "model", code=2)
    ckpt("checkout", code=2)


def test_an_unknown_setting_is_answered_on_a_line(ckpt: Ckpt, history: Path) -> None:
    lines = ckpt("config", "keep-exat", code=2).err.splitlines()
    assert lines == [
        "error: unknown setting 'keep-exat'",
        "hint: did you mean keep-exact or keep-best?",
    ]
    assert all(len(line) < 80 for line in ckpt("config", "x", code=2).err.splitlines())


def test_the_manual_page_has_every_command_and_option(ckpt: Ckpt) -> None:
    shown = ckpt("help", "--man").out
    lines = shown.splitlines()
    assert lines[0].startswith(".TH CKPT 1")
    assert [line[4:] for line in lines if line.startswith(".SS ")] == list(COMMANDS)
    for name in COMMANDS:
        options = re.findall(r"^  (?:-., )?(--[a-z-]+)", ckpt(name, "--help").out, re.MULTILINE)
        for option in set(options) - {"--help"}:
            assert option.replace("-", "\\-") in shown, (name, option)
    macros = {line.split()[0] for line in lines if line.startswith((".", "'"))}
    assert macros == {".TH", ".SH", ".SS", ".B", ".PP", ".TP", ".nf", ".fi"}


def test_hints_name_the_command_and_names_that_exist(ckpt: Ckpt, history: Path) -> None:
    ckpt("branch", "gone")
    ckpt("branch", "-d", "gone")
    assert "did you mean" not in ckpt("show", "gone", code=3).err
    assert "did you mean 'log'" in ckpt("help", "lgo", code=2).err
    assert "known metrics: loss" in ckpt("config", "keep-best", "los:min").err
    assert ckpt("config", "keep-best", "loss:min").err == ""


def test_undo_says_how_to_keep_what_it_leaves(ckpt: Ckpt, history: Path) -> None:
    tip = ckpt("show", "--json").json["id"]
    ckpt("tag", "named")
    assert ckpt("undo", "--json").json["abandoned"] is None
    below = ckpt("show", "--json").json["id"]
    ckpt("tag", "-d", "named")
    assert f"'ckpt branch NAME {below[:8]}' keeps it" in ckpt("undo").err
    plan = ckpt("gc", "--dry-run")
    assert "deletes 2 commits that no branch, tag or pin reaches any more" in plan.out
    assert ckpt("gc", "--dry-run", "--json").json["abandoned"] == sorted([below, tip])
    ckpt("branch", "kept", tip)
    assert ckpt("gc", "--dry-run", "--json").json["abandoned"] == []
